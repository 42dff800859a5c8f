"""Whole passes of the isolator against an API server in memory: what is written, in which order, and what a crash leaves."""

from __future__ import annotations

from typing import Any

import pytest

from fakes.cluster import FakeCluster
from fakes.isolation import at, evidence
from stormjib_operator import isolator, names
from stormjib_operator.errors import ApiError, Conflict, SettingsError, Unreachable
from stormjib_operator.events import Recorder
from stormjib_operator.isolation import marks, preflight
from stormjib_operator.isolation.actor import MANAGER, Actor
from stormjib_operator.isolation.models import Evidence, Mode, Outcome, PolicySpec
from stormjib_operator.isolation.reporter import Reporter, manifest
from stormjib_operator.isolation.seen import see_node

IMAGE = preflight.Image("stormjib/operator:1", run_as_user=7, args=("--peer", "x:1"))


def node(name: str = "n0", **spec: Any) -> dict[str, Any]:
    """A node as it comes from the API."""
    labels = {names.ISOLATION_LABEL: "enabled"}
    status = {"conditions": [{"type": "Ready", "status": "True"}]}
    meta = {"name": name, "uid": f"uid-{name}", "labels": labels}
    return {"apiVersion": "v1", "kind": "Node", "metadata": meta, "spec": spec, "status": status}


class Scene:
    """A cluster of two nodes, and an isolator that looks at it."""

    def __init__(self, mode: Mode = Mode.TAINT, *nodes: dict[str, Any], **spec: Any) -> None:
        self.cluster, self.seconds = FakeCluster(), 0.0
        for each in nodes or (node("n0"), node("n1")):
            self.cluster.put(each)
        if spec:
            head = {"apiVersion": names.API_VERSION, "kind": names.ISOLATION_POLICY}
            body = head | {"metadata": {"name": names.POLICY}, "spec": {"mode": mode.value} | spec}
            self.cluster.put(body)
        self.mode = mode
        self.restart()

    def restart(self) -> None:
        """A new isolator, which remembers nothing."""
        recorder = Recorder(self.cluster, MANAGER)
        self.actor = Actor(self.cluster, recorder, "sys", IMAGE, self.mode, lambda: at(self.seconds))

    def accuse(self, name: str, said: Evidence) -> None:
        self.cluster.put(manifest(name, said))

    def object(self, kind: str, name: str) -> dict[str, Any]:
        return self.cluster.objects[kind, "", name]

    def state(self, name: str) -> str:
        return str(self.object(names.NODE_ISOLATION, name).get("status", {}).get("state", ""))

    def taints(self, name: str) -> list[str]:
        return [each["key"] for each in self.object("Node", name)["spec"].get("taints", [])]

    def job(self) -> dict[str, Any] | None:
        return next((m for (kind, _, _), m in self.cluster.objects.items() if kind == "Job"), None)


TRUSTED: dict[str, Any] = {"trustedNamespaces": ["a"]}


async def test_the_memory_of_the_limits_is_written_before_the_record_and_that_before_the_node() -> None:
    scene = Scene(**TRUSTED)
    scene.accuse("n0", evidence(confirmed=True))
    await scene.actor.look()
    assert scene.cluster.log[:4] == [
        "status IsolationPolicy default",
        "status NodeIsolation n0",
        "patch Node n0",
        "status Node n0",
    ]
    assert scene.taints("n0") == [names.TAINT]
    events = [m for (kind, ns, _), m in scene.cluster.objects.items() if (kind, ns) == ("Event", "default")]
    assert {e["reason"] for e in events} == {"IsolationProposed", "NodeIsolated"}
    assert {e["involvedObject"]["uid"] for e in events} == {"n0"}


@pytest.mark.parametrize("broken", range(8))
async def test_a_pass_that_dies_at_any_write_ends_the_same_and_counts_the_isolation_once_or_more(
    broken: int,
) -> None:
    scene, count = Scene(**TRUSTED), 0
    scene.accuse("n0", evidence(confirmed=True))

    def fall(verb: str, _: dict[str, Any]) -> None:
        nonlocal count
        count += 1
        if count == broken + 1:
            raise Unreachable(0, "the isolator died here")

    scene.cluster.before = fall
    for _ in range(2):
        try:
            await scene.actor.look()
        except Unreachable:
            scene.restart()
    scene.cluster.before = lambda verb, manifest: None
    for _ in range(3):
        await scene.actor.look()
    assert (scene.state("n0"), scene.taints("n0")) == ("Cooldown", [names.TAINT])
    assert len(scene.object(names.ISOLATION_POLICY, names.POLICY)["status"]["recent"]) >= 1


async def test_a_settled_cluster_causes_no_write() -> None:
    scene = Scene(**TRUSTED)
    scene.accuse("n0", evidence(confirmed=True))
    for _ in range(3):
        await scene.actor.look()
    scene.cluster.log.clear()
    for _ in range(3):
        await scene.actor.look()
    scene.restart()
    await scene.actor.look()
    assert scene.cluster.log == []


async def test_without_a_policy_the_one_of_the_installation_is_made() -> None:
    scene = Scene(Mode.REPORT_ONLY)
    await scene.actor.look()
    assert scene.object(names.ISOLATION_POLICY, names.POLICY)["spec"] == {"mode": "ReportOnly"}


async def test_a_policy_that_cannot_be_read_isolates_nothing() -> None:
    scene = Scene(limits={"maxPerWindow": "many"}, **TRUSTED)
    both = manifest("n0", evidence("a"))
    both["spec"]["evidence"] += manifest("n0", evidence("b"))["spec"]["evidence"]
    scene.cluster.put(both)
    await scene.actor.look()
    assert (scene.state("n0"), scene.taints("n0")) == ("Blocked", [])


async def test_a_record_that_changed_meanwhile_marks_no_node() -> None:
    scene = Scene(**TRUSTED)
    scene.accuse("n0", evidence(confirmed=True))

    def change(verb: str, manifest: dict[str, Any]) -> None:
        if verb == "status" and manifest["kind"] == names.NODE_ISOLATION:
            scene.cluster.before = lambda verb, manifest: None
            raise Conflict(409, "somebody was faster")

    scene.cluster.before = change
    again = await scene.actor.look()
    assert (scene.taints("n0"), again) == ([], 0.2)
    await scene.actor.look()
    assert scene.taints("n0") == [names.TAINT]


async def test_a_node_that_changed_meanwhile_is_not_written_to() -> None:
    scene = Scene(**TRUSTED)
    scene.accuse("n0", evidence(confirmed=True))

    def cordon(verb: str, manifest: dict[str, Any]) -> None:
        if verb == "status" and manifest["kind"] == names.NODE_ISOLATION:
            scene.cluster.before = lambda verb, manifest: None
            scene.cluster.put(node("n0", unschedulable=True))

    scene.cluster.before = cordon
    with pytest.raises(Conflict):
        await scene.actor.look()
    await scene.actor.look()
    assert (scene.state("n0"), scene.taints("n0")) == ("Blocked", [])


async def test_a_node_that_cannot_be_written_to_holds_up_no_other() -> None:
    scene = Scene(**TRUSTED)
    scene.cluster.put(node("n0", taints=[{"key": names.TAINT, "effect": "NoSchedule"}]))
    scene.accuse("n1", evidence(confirmed=True))

    def refuse(verb: str, manifest: dict[str, Any]) -> None:
        if manifest["kind"] == "Node" and manifest["metadata"]["name"] == "n0":
            raise ApiError(403, "admission says no")

    scene.cluster.before = refuse
    await scene.actor.look()
    assert scene.state("n1") == "Blocked", "n0 still bears our mark, and counts"


async def test_a_preflight_is_made_seen_and_cleared_away() -> None:
    scene = Scene(trustedNamespaces=[])
    scene.accuse("n0", evidence())
    await scene.actor.look()
    job = scene.job()
    assert job is not None
    pod = job["spec"]["template"]["spec"]
    container = pod["containers"][0]
    assert container["command"][-1] == "--json"
    assert container["args"] == ["--peer", "x:1"]
    assert pod["automountServiceAccountToken"] is False
    assert {t["key"] for t in pod["tolerations"]} == {names.TAINT, "nvidia.com/gpu"}
    failed = {"type": "Failed", "status": "True", "reason": "PodFailurePolicy"}
    scene.cluster.put({**job, "status": {"conditions": [failed]}})
    await scene.actor.look()
    await scene.actor.look()
    assert (scene.state("n0"), scene.taints("n0"), scene.job()) == ("Cooldown", [names.TAINT], None)


@pytest.mark.parametrize(
    ("condition", "wanted"),
    [
        (None, Outcome.RUNNING),
        (("Complete", "CompletionsReached"), Outcome.PASSED),
        (("SuccessCriteriaMet", "CompletionsReached"), Outcome.PASSED),
        (("FailureTarget", "PodFailurePolicy"), Outcome.FAILED),
        (("Failed", "PodFailurePolicy"), Outcome.FAILED),
        (("Failed", "BackoffLimitExceeded"), Outcome.UNKNOWN),
        (("Failed", "DeadlineExceeded"), Outcome.UNKNOWN),
    ],
)
def test_only_the_programs_own_word_fails_a_node(condition: tuple[str, str] | None, wanted: Outcome) -> None:
    conditions = [{"type": condition[0], "status": "True", "reason": condition[1]}] if condition else []
    assert preflight.outcome({"status": {"conditions": conditions}}) is wanted


def test_a_preflight_that_asks_for_devices_goes_through_the_scheduler() -> None:
    image = preflight.Image("i", resources={"limits": {"nvidia.com/gpu": 8}})
    made = preflight.manifest("p", "sys", see_node(node("n7")), PolicySpec(), image)
    spec = made["spec"]["template"]["spec"]
    assert "nodeName" not in spec
    required = spec["affinity"]["nodeAffinity"]["requiredDuringSchedulingIgnoredDuringExecution"]
    assert required["nodeSelectorTerms"][0]["matchFields"][0]["values"] == ["n7"]


def test_a_mark_is_one_taint_and_one_condition_and_leaves_the_rest() -> None:
    other = {"key": "other", "effect": "NoSchedule"}
    found = see_node(node(taints=[other]))
    test, change = marks.taint(found, "Crash; rm -rf")
    assert test == {"op": "test", "path": "/metadata/resourceVersion", "value": ""}
    assert change["value"] == [other, {"key": names.TAINT, "value": "Crashrmrf", "effect": "NoSchedule"}]
    assert marks.untaint(found) == []
    assert marks.clear(found) == []
    assert marks.suspect(found, "Crash", "m" * 5000, at(0))[1]["value"][0]["type"] == "Ready"


async def test_who_has_left_is_seen_and_a_return_too() -> None:
    scene = Scene(trustedNamespaces=[])
    pod = {"kind": "Pod", "metadata": {"name": "p", "namespace": "a"}, "spec": {"nodeName": "n0"}}
    scene.cluster.put(pod)
    scene.accuse("n0", evidence(left=False))
    reporter = Reporter(scene.cluster)

    async def entry() -> tuple[bool, int]:
        await reporter._look()
        (found,) = scene.object(names.NODE_ISOLATION, "n0")["spec"]["evidence"]
        return found["left"], found["departures"]

    assert await entry() == (False, 0)
    del scene.cluster.objects["Pod", "a", "p"]
    assert await entry() == (True, 1)
    scene.cluster.put(pod | {"status": {"phase": "Succeeded"}})
    assert await entry() == (True, 1), "a pod that is over loads no node"
    scene.cluster.put(pod)
    assert await entry() == (False, 1)
    del scene.cluster.objects["Pod", "a", "p"]
    assert await entry() == (True, 2)


ENV = {"POD_NAME": "p", "POD_NAMESPACE": "ns", "STORMJIB_RUNTIME_IMAGE": "i:1"}


def test_settings_come_from_the_environment() -> None:
    more = {
        "STORMJIB_ISOLATION_MODE": "Taint",
        "STORMJIB_PREFLIGHT_ARGS": '["--peer", "x:1"]',
        "STORMJIB_PREFLIGHT_RESOURCES": '{"limits": {"memory": "1Gi"}}',
    }
    read = isolator.settings_from(ENV | more)
    assert (read.mode, read.image.args) == (Mode.TAINT, ("--peer", "x:1"))
    assert isolator.settings_from(ENV).mode is Mode.REPORT_ONLY


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"STORMJIB_ISOLATION_MODE": "Cordon"}, "ReportOnly or Taint"),
        ({"STORMJIB_PREFLIGHT_ARGS": "{}"}, "STORMJIB_PREFLIGHT_ARGS"),
        ({"STORMJIB_PREFLIGHT_RESOURCES": "["}, "STORMJIB_PREFLIGHT_RESOURCES"),
    ],
)
def test_a_setting_that_makes_no_sense_is_named(change: dict[str, str], named: str) -> None:
    with pytest.raises(SettingsError, match=named):
        isolator.settings_from(ENV | change)
