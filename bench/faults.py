"""The faults of the demo and the recovery bench. Each is shown to have fired, and measured from the moment it did."""

from __future__ import annotations

import itertools
import re
import signal
import time
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

from bench import pods
from bench.report import FaultRecord
from bench.samples import events
from bench.stage import StageError, kill_rank, wait_until

if TYPE_CHECKING:
    from collections.abc import Callable

    from bench.follow import Follower, Step
    from bench.stage import Stage

# Where nothing should stop, the longest gap between two steps in this time is the figure.
QUIET_S = 20.0


@dataclass(frozen=True)
class Scene:
    """One running job on a stage, and who follows it."""

    stage: Stage
    follower: Follower
    namespace: str
    job: str

    def member_pods(self) -> list[dict[str, Any]]:
        """Pods of the slots that hold ranks now."""
        slots = self.stage.pods_of(self.namespace, self.job, "trainer")
        return [p for p in slots if pods.ranks_of(p["metadata"]["uid"])]

    def coordinator(self) -> dict[str, Any]:
        """The newest coordinator pod that is running."""
        found = self.stage.pods_of(self.namespace, self.job, "coordinator")
        return max(found, key=lambda p: int(p["metadata"]["labels"]["stormjib.io/incarnation"]))


def rank_kill(scene: Scene) -> FaultRecord:
    """SIGKILL one rank."""
    return _stopping(scene, "rank-kill", lambda: kill_rank(scene.member_pods()[-1], signal.SIGKILL))


def rank_freeze(scene: Scene) -> FaultRecord:
    """SIGSTOP one rank."""
    return _stopping(scene, "rank-freeze", lambda: kill_rank(scene.member_pods()[-1], signal.SIGSTOP))


def node_cut(scene: Scene) -> FaultRecord:
    """Cut the node of a slot that holds ranks (not the coordinator's: that is another fault), heal it."""
    coordinator = scene.coordinator()["spec"]["nodeName"]
    nodes = [p["spec"]["nodeName"] for p in scene.member_pods()]
    victim = next((node for node in nodes if node != coordinator), nodes[0])
    try:
        return _stopping(scene, "node-cut", lambda: _cut(scene, victim))
    finally:
        scene.stage.cluster.heal(victim)


def operator_kill(scene: Scene) -> FaultRecord:
    """SIGKILL the operator's process; the kubelet starts it again."""
    uid = scene.stage.operator_pod()["metadata"]["uid"]

    def fault() -> float:
        process = next(p for p in pods.of_pod(uid) if "stormjib_operator" in p.command)
        at = time.time()
        process.send(signal.SIGKILL)
        wait_until(lambda: not any(p.pid == process.pid for p in pods.of_pod(uid)), 5, "the operator's death")
        return at

    return _quiet(scene, "operator-kill", fault)


def helm_upgrade(scene: Scene) -> FaultRecord:
    """Upgrade the chart, so that the operator's pod is replaced."""

    def fault() -> float:
        at = time.time()
        scene.stage.install(f"podAnnotations.upgraded=at-{int(at)}")
        return at

    return _quiet(scene, "helm-upgrade", fault)


def coordinator_cut(scene: Scene) -> tuple[FaultRecord, float]:
    """Cut the coordinator's node (no rank may be there), heal it. Also returns the seconds until every agent registered anew."""
    node = seat_coordinator(scene)
    agents = len(scene.member_pods())
    at = 0.0

    def fault() -> float:
        nonlocal at
        at = _cut(scene, node)
        return at

    try:
        record = _quiet(scene, "coordinator-cut", fault)
        registered = scene.follower.wait(
            lambda: _registered(scene.follower, at, agents), 30, "a new coordinator"
        )
    finally:
        scene.stage.cluster.heal(node)
    return record, registered - at


def torchrun_rank_kill(scene: Scene) -> float:
    """SIGKILL one worker of stock torchrun; seconds until the first step after the workers started anew."""
    found = [
        pods.torchrun_workers_of(p["metadata"]["uid"])
        for p in scene.stage.pods_of(scene.namespace, scene.job, "trainer")
    ]
    worker = next((workers[-1] for workers in reversed(found) if workers), None)
    if worker is None:
        raise StageError(
            f"no worker of torchrun runs in {scene.namespace}/{scene.job}: the fault would not fire"
        )
    at = time.time()
    worker.send(signal.SIGKILL)
    restarted = scene.follower.wait(
        lambda: _started_after(scene.follower, at), 120, "torchrun's workers to start anew"
    )
    return scene.follower.first_step_after(restarted, 60).at - at


def _started_after(follower: Follower, at: float) -> float | None:
    return next((line.at for line, _ in events(follower.lines, "start") if line.at > at), None)


def seat_coordinator(scene: Scene) -> str:
    """A node with the coordinator and no rank on it. Deletes the coordinator's pod where ranks run beside it: the next
    one is put beside the spare."""
    for _ in range(3):
        pod = scene.coordinator()
        name, node = pod["metadata"]["name"], str(pod["spec"]["nodeName"])
        if all(p["spec"]["nodeName"] != node for p in scene.member_pods()):
            return node
        at = time.time()
        scene.stage.kubectl("delete", "pod", name, "-n", scene.namespace)
        agents = len(scene.member_pods())
        scene.follower.wait(partial(_registered, scene.follower, at, agents), 60, "the next coordinator")
    raise StageError(
        f"the coordinator of {scene.job} keeps being put beside ranks; this scene wants it beside the spare"
    )


def _registered(follower: Follower, at: float, agents: int) -> float | None:
    """When a coordinator younger than `at` had `agents` agents registered, from its log."""
    times: dict[str, float] = {}
    for line in list(follower.lines):
        match = re.search(r"slot (\d+): agent \d+ registered", line.text)
        if match and line.at > at and "-coord-" in line.pod:
            times.setdefault(match[1], line.at)
    return sorted(times.values())[agents - 1] if len(times) >= agents else None


def _cut(scene: Scene, node: str) -> float:
    at = time.time()
    scene.stage.cluster.cut(node)
    return at


def _stopping(scene: Scene, kind: str, fault: Callable[[], float]) -> FaultRecord:
    """A fault that must end the generation: from the fault to the first step of the next one."""
    before = latest(scene)
    at = fault()
    again = scene.follower.first_step_after(at, 60, newer_than=before.generation)
    reached = max(s.step for s in list(scene.follower.steps) if s.generation == before.generation)
    decided = next(
        (x.at - at for x in list(scene.follower.lines) if x.at > at and _decision(x.text, again)), None
    )
    return FaultRecord(
        kind, reached, decided, again.at - at, max(0, reached - again.step + 1), again.generation
    )


def _decision(text: str, again: Step) -> bool:
    return text.startswith(f"generation {again.generation}:")


def _quiet(scene: Scene, kind: str, fault: Callable[[], float]) -> FaultRecord:
    """A fault that must stop nothing: the longest gap between two steps in the next seconds."""
    before = latest(scene)
    at = fault()
    scene.follower.wait(
        lambda: any(s.at > at + QUIET_S for s in scene.follower.steps), QUIET_S + 60, "steps to go on"
    )
    window = [s for s in list(scene.follower.steps) if before.at <= s.at <= at + QUIET_S]
    gap = max(b.at - a.at for a, b in itertools.pairwise(window))
    repeated = len(window) - len({s.step for s in window})
    after = latest(scene)
    if after.generation != before.generation:
        raise StageError(f"{kind} changed the generation from {before.generation} to {after.generation}")
    return FaultRecord(kind, before.step, None, gap, repeated, after.generation)


def latest(scene: Scene) -> Step:
    """The newest step of the job."""
    step = scene.follower.latest
    if step is None:
        raise StageError("the job has not stepped yet")
    return step


def settle(scene: Scene, steps: int = 10) -> None:
    """Wait until the job has made so many steps more, and every slot's agent is ready."""
    scene.follower.wait_step(latest(scene).step + steps, 90)
    all_ready(scene)


def all_ready(scene: Scene) -> None:
    """Wait until every slot's agent is ready, those of the spares too: until then they import torch beside the ranks."""
    nodes = scene.stage.job(scene.namespace, scene.job)["spec"]["nodes"]
    wanted = nodes["replicas"] + nodes.get("spares", 0)
    wait_until(lambda: _ready(scene) >= wanted, 90, f"{wanted} agents ready", every=0.5)


def _ready(scene: Scene) -> int:
    status = scene.stage.job(scene.namespace, scene.job).get("status", {})
    return int(status.get("nodes", {}).get("ready", 0))
