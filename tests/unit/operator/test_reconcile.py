"""Whole passes against an API server in memory: what is written, in which order, and what a broken pass leaves."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from fakes.cluster import FakeCluster
from fakes.job import IP, RENDER, UID, generation, manifest, now
from stormjib_operator.errors import CoordinatorError, Unreachable
from stormjib_operator.events import Recorder
from stormjib_operator.observed import Link, Target
from stormjib_operator.queue import Key, Retry
from stormjib_operator.reconcile import TERM, Reconciler
from stormjib_runtime.wire import PROTOCOL, Bounds, JobPhase, JobState

KEY = Key("ns", "j")


class FakeStreams:
    """Streams that say what a test makes them say."""

    def __init__(self) -> None:
        self.target: Target | None = None
        self.token = ""
        self.state: JobState | None = None
        self.pushed: list[Bounds] = []
        self.deaf = False

    def aim(self, key: Key, target: Target | None, token: str = "") -> None:
        self.target, self.token = target, token

    def link(self, key: Key) -> Link:
        return Link(self.target.pod_uid, self.state) if self.target else Link()

    async def push(self, key: Key, bounds: Bounds) -> None:
        if self.deaf:
            raise CoordinatorError("no answer")
        self.pushed.append(bounds)
        if self.state is not None:
            self.state = replace(self.state, bounds_version=bounds.version)


class Scene:
    """A cluster with one job, and an operator that looks at it."""

    def __init__(self, **spec: Any) -> None:
        self.cluster, self.streams, self.at, self.term = FakeCluster(), FakeStreams(), 0.0, 3
        self.cluster.put(manifest(**spec))
        self.restart()

    def restart(self) -> None:
        """A new operator, which remembers nothing."""
        self.operator = Reconciler(
            self.cluster,
            self.streams,  # type: ignore[arg-type]
            Recorder(self.cluster),
            RENDER,
            b"key",
            lambda: self.term,
            lambda: now(self.at),
        )

    async def look(self, times: int = 1) -> float | None:
        """Passes; what the last one says about the next."""
        again = None
        for _ in range(times):
            again = await self.operator.look(KEY)
        return again

    async def trains(self) -> None:
        """Up to generation 1.1."""
        await self.look(3)
        for place, pod in list(self.cluster.objects.items()):
            if place[0] == "Pod":
                status = {
                    "phase": "Running",
                    "podIP": "10.1.0.1",
                    "conditions": [{"type": "Ready", "status": "True"}],
                }
                self.cluster.put({**pod, "spec": {**pod["spec"], "nodeName": "n"}, "status": status})
        await self.look()
        self.streams.state = JobState(
            PROTOCOL, UID, 1, 1, JobPhase.RUNNING, generation=generation(slots=()), step=5
        )
        await self.look(2)

    @property
    def status(self) -> dict[str, Any]:
        """The job's status as written."""
        found: dict[str, Any] = self.cluster.objects["TrainingJob", "ns", "j"].get("status", {})
        return found


async def test_the_status_is_written_before_what_it_names_and_once_a_pass() -> None:
    scene = Scene()
    await scene.look()
    assert scene.cluster.log[:3] == [
        "status TrainingJob j",
        "create Secret j-token-3f0c2a4e",
        "create ControllerRevision j-3f0c2a4e-1",
    ]
    scene.cluster.log.clear()
    await scene.look(2)
    writes = [line for line in scene.cluster.log if line.startswith("status")]
    assert scene.cluster.log.index("status TrainingJob j") < scene.cluster.log.index("create Pod j-0-1")
    assert len(writes) <= 2
    assert scene.cluster.names("Pod") == ["j-0-1", "j-1-2", "j-2-3", "j-coord-1"]


async def test_a_settled_job_causes_no_write() -> None:
    scene = Scene()
    await scene.trains()
    scene.cluster.log.clear()
    await scene.look(3)
    assert scene.cluster.log == []


async def test_a_restarted_operator_changes_nothing() -> None:
    scene = Scene()
    await scene.trains()
    scene.cluster.log.clear()
    scene.restart()
    await scene.look(3)
    assert scene.cluster.log == []


@pytest.mark.parametrize("broken", range(12))
async def test_a_pass_that_breaks_off_at_any_write_ends_the_same(broken: int) -> None:
    """Crash-point enumeration: the operator dies before write number `broken`, and another one goes on."""
    scene, count = Scene(), 0

    def fall(verb: str, _: dict[str, Any]) -> None:
        nonlocal count
        count += 1
        if count == broken + 1:
            raise Unreachable(0, "the operator died here")

    scene.cluster.before = fall
    for _ in range(6):
        try:
            await scene.look()
        except Retry:
            scene.restart()
    assert count > broken, "the fault has not fired"
    assert scene.cluster.names("Pod") == ["j-0-1", "j-1-2", "j-2-3", "j-coord-1"]
    assert scene.status["attempts"] == 3


async def test_a_status_that_lost_a_race_makes_nothing() -> None:
    scene = Scene()
    await scene.look()
    real = scene.cluster.get

    async def stale(kind: str, namespace: str, name: str) -> dict[str, Any] | None:
        found = await real(kind, namespace, name)
        if found and kind == "TrainingJob":
            found["metadata"]["resourceVersion"] = "1"
        return found

    scene.cluster.get = stale  # type: ignore[method-assign]
    scene.cluster.log.clear()
    with pytest.raises(Retry):
        await scene.look()
    assert scene.cluster.names("Pod") == []


async def test_a_refused_pod_is_told_and_asked_for_again_with_growing_pauses() -> None:
    scene = Scene()
    words = 'pods "j-1-2" is forbidden: exceeded quota: small, requested: pods=1'
    scene.cluster.refuse = lambda m: words if m["metadata"]["name"] == "j-1-2" else None
    await scene.look(3)
    await scene.look()
    condition = next(c for c in scene.status["conditions"] if c["type"] == "Scheduled")
    assert (condition["status"], condition["reason"]) == ("False", "CreateRefused")
    assert words in condition["message"]
    tries = []
    for second in range(30):
        scene.at, before = float(second), len(scene.cluster.log)
        await scene.look()
        if "create Pod j-1-2" in scene.cluster.log[before:]:
            tries.append(second)
    assert len(tries) <= 6
    scene.cluster.refuse = lambda m: None
    scene.at = 100.0
    await scene.look(2)
    assert "j-1-2" in scene.cluster.names("Pod")


async def test_bounds_are_pushed_once_and_again_when_the_coordinator_forgot_them() -> None:
    scene = Scene()
    await scene.trains()
    pushed = len(scene.streams.pushed)
    await scene.look(2)
    assert len(scene.streams.pushed) == pushed
    assert scene.streams.state is not None
    scene.streams.state = replace(scene.streams.state, bounds_version=0)
    await scene.look()
    assert len(scene.streams.pushed) == pushed + 1


async def test_bounds_of_a_later_operator_are_above_and_an_earlier_one_is_silent() -> None:
    scene = Scene()
    await scene.trains()
    old = scene.streams.pushed[-1].version
    scene.term = 4
    scene.restart()
    await scene.look()
    assert scene.streams.pushed[-1].version > max(old, 4 * TERM)
    scene.term = 3
    scene.restart()
    pushed = len(scene.streams.pushed)
    await scene.look()
    assert len(scene.streams.pushed) == pushed


async def test_a_deaf_coordinator_does_not_stop_the_pass() -> None:
    scene = Scene()
    await scene.trains()
    scene.streams.deaf = True
    scene.restart()
    assert await scene.look() is not None


async def test_a_job_that_is_gone_is_forgotten() -> None:
    scene = Scene()
    await scene.trains()
    del scene.cluster.objects["TrainingJob", "ns", "j"]
    assert await scene.look() is None
    assert scene.streams.target is None


async def test_a_job_of_an_older_definition_is_left_alone() -> None:
    scene = Scene()
    scene.cluster.put({**manifest(), "spec": {"nodes": {}}})
    assert await scene.look() is None
    assert scene.cluster.log == []


async def test_pods_know_the_address_of_the_service() -> None:
    scene = Scene()
    await scene.look(3)
    env = scene.cluster.objects["Pod", "ns", "j-0-1"]["spec"]["containers"][0]["env"]
    assert {"name": "STORMJIB_COORDINATOR", "value": f"http://{IP}:7070"} in env


async def test_events_are_written_once_each() -> None:
    scene = Scene()
    await scene.trains()
    assert scene.streams.state is not None
    scene.streams.state = replace(scene.streams.state, events=("slot 0: ZygoteUnfit: why",))
    await scene.look(3)
    scene.restart()
    await scene.look(2)
    events = [m for (kind, _, _), m in scene.cluster.objects.items() if kind == "Event"]
    said = [(e["reason"], e["count"]) for e in events if e["reason"] == "ZygoteUnfit"]
    assert said == [("ZygoteUnfit", 1)]
