"""Who trains when a node is lost and none can take its place, and what the storage remembers of it. Real training."""

from __future__ import annotations

import json
import signal
import threading
import time
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import pytest
from cluster.jobs import cause_of, endless, sized, start

from bench import faults, pods, samples
from bench.follow import Follower
from bench.stage import Stage, wait_until
from stormjib_checkpoint import layout
from stormjib_checkpoint.history import committed, saves
from stormjib_checkpoint.storage import Local
from stormjib_local.hosts import Host

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from bench.faults import Scene
    from stormjib_checkpoint.format import ResumePoint

pytestmark = pytest.mark.timeout(240)


@pytest.fixture
def namespace(quiet_stage: Stage, request: pytest.FixtureRequest) -> Iterator[str]:
    """A namespace of the test's own."""
    name = "m-" + request.node.name.removeprefix("test_").replace("_", "-")[:40].strip("-")
    quiet_stage.make_namespace(name)
    yield name
    for node in quiet_stage.cluster.nodes:
        quiet_stage.cluster.heal(node)
    quiet_stage.kubectl("delete", "trainingjob", "--all", "-n", name)
    quiet_stage.kubectl("delete", "namespace", name, "--wait=false")


def points(scene: Scene) -> list[ResumePoint]:
    """The committed steps in the history of the job's highest generation, newest first."""
    return committed(Local(samples.root(scene)))


def test_a_job_without_a_spare_shrinks_and_grows_again(quiet_stage: Stage, namespace: str) -> None:
    scene = start(quiet_stage, namespace, sized(2, 1, 0))
    victim = scene.member_pods()[0]["spec"]["nodeName"]
    record = faults.node_cut(scene)
    shrunk = scene.follower.latest
    assert shrunk is not None
    assert (shrunk.world, cause_of(scene, record.generation)) == (1, "AgentSilent")
    wide = scene.follower.wait(
        lambda: next((s for s in scene.follower.steps if s.at > shrunk.at and s.world == 2), None),
        120,
        "growth",
    )
    assert cause_of(scene, wide.generation) == "Grow"
    reached = max(s.step for s in list(scene.follower.steps) if s.at < wide.at)
    assert wide.step == reached + 1, "growing loses no step"
    assert victim in [p["spec"]["nodeName"] for p in scene.member_pods()]
    scene.follower.close()


def test_a_killed_container_comes_back_as_the_same_slot(quiet_stage: Stage, namespace: str) -> None:
    scene = start(quiet_stage, namespace, sized(2, 1, 0))
    before = faults.latest(scene)
    pod = scene.member_pods()[-1]
    uid = pod["metadata"]["uid"]
    agent = pods.agent_of(uid)
    assert agent is not None
    at = time.time()
    agent.send(
        signal.SIGKILL
    )  # PID 1 of the container: the kernel ends everything in it at once, as an OOM does
    again = scene.follower.first_step_after(at, 60, newer_than=before.generation)
    assert cause_of(scene, again.generation) == "ContainerExit"
    wide = scene.follower.wait(
        lambda: next((s for s in scene.follower.steps if s.at > at + 1 and s.world == 2), None),
        120,
        "both nodes",
    )
    assert int(wide.generation.split(".")[1]) > int(before.generation.split(".")[1])
    assert uid in [p["metadata"]["uid"] for p in scene.member_pods()], "the same pod, another agent"
    scene.follower.close()


def test_what_a_cut_node_goes_on_committing_is_neither_loaded_nor_counted(
    quiet_stage: Stage, namespace: str
) -> None:
    scene = start(quiet_stage, namespace, often(sized(1, 1, 1)))
    before = faults.latest(scene)
    victim = scene.member_pods()[0]["spec"]["nodeName"]
    spare = spare_pod(scene)
    at = time.time()
    with collected(samples.root(scene), before.generation) as commits:
        quiet_stage.cluster.cut(victim)
        wait_until(lambda: pods.ranks_of(spare), 60, "ranks on the spare", every=0.02)
        with no_commits(spare):
            again = scene.follower.first_step_after(at, 60, newer_than=before.generation)
            resumed = next(r for line, r in samples.events(scene.follower.lines, "resumed") if line.at > at)
            wait_until(
                lambda: sum(step > resumed["step"] for step in list(commits)) >= 2, 60, "two zombie commits"
            )
    wait_until(lambda: points(scene)[0].generation == again.generation, 60, "a commit of the new generation")
    known = points(scene)
    zombie = [p.step for p in known if p.generation == before.generation and p.step > resumed["step"]]
    assert zombie == []
    found = samples.audit(scene)
    assert (found.missing, found.twice) == (0, 0)
    quiet_stage.cluster.heal(victim)
    scene.follower.close()


def test_a_job_applied_again_goes_on_from_its_predecessor_past_a_damaged_step(
    quiet_stage: Stage, namespace: str
) -> None:
    scene = start(quiet_stage, namespace, sized(1, 1, 0, processes=2), step=25)
    wait_until(lambda: len(points(scene)) >= 2, 60, "two commits")
    quiet_stage.kubectl("delete", "trainingjob", scene.job, "-n", namespace)
    gone = f"stormjib.io/job={scene.job}"
    wait_until(
        lambda: not quiet_stage.get("pods", "-n", namespace, "-l", gone)["items"], 60, "the pods to be gone"
    )
    good = points(scene)[1]
    damage_after(samples.root(scene), good.step)
    scene.follower.close()
    again = start(quiet_stage, namespace, sized(1, 1, 0, processes=2), step=good.step + 1)
    resumed = next(r for _, r in samples.events(again.follower.lines, "resumed"))
    assert (resumed["step"], resumed["of"]) == (good.step, good.generation)
    assert resumed["generation"] > good.generation
    again.follower.close()


def test_a_rank_killed_under_torchrun_is_restarted_by_torchrun(quiet_stage: Stage, namespace: str) -> None:
    job = quiet_stage.apply_sample("tiny-llama-torchrun.yaml", namespace, endless)
    scene = faults.Scene(
        quiet_stage, Follower(quiet_stage.cluster.kubeconfig, namespace, job), namespace, job
    )
    scene.follower.wait_step(12, 150)
    assert faults.torchrun_rank_kill(scene) < 60
    status = quiet_stage.job(namespace, job)["status"]
    assert status["generation"] == "1.1", "torchrun restarted its own workers; no agent was lost"
    scene.follower.close()


@pytest.fixture
def small_volume(quiet_stage: Stage) -> Iterator[Callable[[Path], None]]:
    """Puts a file system over a folder, on every node, that is soon full, and takes it away again."""
    cluster = quiet_stage.cluster
    nodes = [Host(cluster.layout, name) for name in cluster.nodes]
    mounted: list[Path] = []

    def cover(folder: Path) -> None:
        kept = folder.stat()
        options = f"size=64k,mode={kept.st_mode & 0o7777:o},uid={kept.st_uid},gid={kept.st_gid}"
        mounted.append(folder)
        for node in nodes:
            node.inside("mount", "-t", "tmpfs", "-o", options, "tmpfs", folder)

    yield cover
    for folder in mounted:
        for node in nodes:
            node.inside("umount", "--lazy", folder)


def test_a_checkpoint_folder_that_cannot_be_written_fails_the_job_in_words(
    quiet_stage: Stage, namespace: str
) -> None:
    failed = fails_on_its_storage(quiet_stage, namespace, lambda folder: folder.chmod(0o555))
    assert "Permission denied" in failed["message"], json.dumps(failed)


def test_a_checkpoint_folder_that_is_full_fails_the_job_in_words(
    quiet_stage: Stage, namespace: str, small_volume: Callable[[Path], None]
) -> None:
    failed = fails_on_its_storage(quiet_stage, namespace, small_volume)
    assert "No space left on device" in failed["message"], json.dumps(failed)


def fails_on_its_storage(stage: Stage, namespace: str, spoil: Callable[[Path], None]) -> dict[str, str]:
    """Spoil the claim's folder before a job of two tries begins; the condition Failed that it ends with."""

    def change(job: dict[str, object]) -> None:
        sized(1, 1, 0)(job)
        spec = job["spec"]
        assert isinstance(spec, dict)
        spec["recovery"] = {"maxRestarts": 1, "backoff": {"initialSeconds": 1, "maxSeconds": 1}}
        spec["suspend"] = True

    job = stage.apply_sample("tiny-llama.yaml", namespace, change)
    spoil(wait_until(lambda: claim_folder(stage, namespace), 30, "the claim's volume"))
    go = '{"spec":{"suspend":false}}'
    stage.kubectl("patch", "trainingjob", job, "-n", namespace, "--type=merge", "-p", go)
    failed: dict[str, str] = wait_until(
        lambda: (c := stage.condition(namespace, job, "Failed")) and c["status"] == "True" and c,
        90,
        "Failed",
    )
    return failed


def claim_folder(stage: Stage, namespace: str) -> Path | None:
    """The folder of this machine behind the namespace's only claim."""
    volume = stage.get("pvc", "-n", namespace)["items"][0]["spec"].get("volumeName")
    folder = stage.cluster.shared_folder / volume if volume else None
    return folder if folder is not None and folder.exists() else None


def often(change: Callable[[dict[str, Any]], None]) -> Callable[[dict[str, Any]], None]:
    """The job that saves every third step."""

    def changed(job: dict[str, Any]) -> None:
        change(job)
        job["spec"]["checkpoint"]["interval"] = {"steps": 3}

    return changed


def spare_pod(scene: faults.Scene) -> str:
    """The uid of the slot that waits without ranks."""
    members = {p["metadata"]["uid"] for p in scene.member_pods()}
    slots = scene.stage.pods_of(scene.namespace, scene.job, "trainer")
    uid: str = next(p["metadata"]["uid"] for p in slots if p["metadata"]["uid"] not in members)
    return uid


@contextmanager
def no_commits(uid: str) -> Iterator[None]:
    """Hold the committer of a pod. Its first commit would delete what the zombie has saved, and so end the zombie:
    which of the two commits first is anybody's guess on a busy machine."""
    child = next(p for p in pods.of_pod(uid) if "stormjib_checkpoint.child" in p.command)
    child.send(signal.SIGSTOP)
    try:
        yield
    finally:
        child.send(signal.SIGCONT)


@contextmanager
def collected(folder: Path, generation: str) -> Iterator[set[int]]:
    """Steps that a generation commits while the block runs. Looked for all the time, because its successor's retention takes
    each of them away again."""
    commits, over = set[int](), threading.Event()

    def look() -> None:
        while not over.wait(0.005):
            commits.update(manifests(folder, generation))

    thread = threading.Thread(target=look)
    thread.start()
    try:
        yield commits
    finally:
        over.set()
        thread.join()


def manifests(folder: Path, generation: str) -> list[int]:
    """Steps that a generation has committed, whatever the history says."""
    return sorted(
        int(m.parts[-3].removeprefix("step-")) for m in folder.glob(f"step-*/g{generation}/MANIFEST.json")
    )


def damage_after(root: Path, step: int) -> None:
    """Flip one bit in the middle of every rank's data of the later steps: also of one that was left complete but
    uncommitted, because the successor commits it."""
    for save in saves(Local(root)):
        if save[0] > step:
            for path in (root / layout.folder(*save)).glob("rank-*.safetensors"):
                data = bytearray(path.read_bytes())
                data[len(data) // 2] ^= 1
                path.write_bytes(data)
