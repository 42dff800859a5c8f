"""The pods of a job, as they go to the API server."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from fakes.job import IP, RENDER, TOKENS, job
from stormjib_operator import children, pods
from stormjib_operator.observed import Observed

GOLDEN = Path(__file__).parent / "golden"


def slot(**spec: Any) -> dict[str, Any]:
    """The pod of slot 1, attempt 2."""
    made = job(**spec)
    return pods.slot_pod(made, pods.render(made, RENDER)[0], 1, 2, IP)


def trainer(pod: dict[str, Any]) -> dict[str, Any]:
    """Its container that trains."""
    found: dict[str, Any] = next(c for c in pod["spec"]["containers"] if c["name"] == "trainer")
    return found


def template(**spec: Any) -> dict[str, Any]:
    """A template with these fields of a pod's spec."""
    return {"spec": {"containers": [{"name": "trainer", "image": "my/image:1"}], **spec}}


def coordinator() -> dict[str, Any]:
    """The coordinator's pod of incarnation 3."""
    made = job()
    return pods.coordinator_pod(made, pods.render(made, RENDER)[0], 3, "bad-node", {2})


@pytest.mark.parametrize(
    ("name", "manifest"),
    [
        ("slot-pod", slot()),
        ("coordinator-pod", coordinator()),
        ("service", children.service(job(), 3, IP)),
        ("network-policy", children.network_policy(job(), RENDER)),
    ],
)
def test_a_manifest_is_the_one_that_was_agreed(name: str, manifest: dict[str, Any]) -> None:
    """After a wanted change: write the new text into golden/ and read the difference."""
    path = GOLDEN / f"{name}.json"
    text = json.dumps(manifest, indent=1, sort_keys=True) + "\n"
    assert text == path.read_text(), f"{path.name} differs; wanted:\n{text}"


def test_a_kept_template_makes_the_same_pods_after_a_trip_through_the_api() -> None:
    made = job()
    rendered = pods.render(made, RENDER)[0]
    kept = json.loads(json.dumps(children.revision(made, rendered)))["data"]
    again = type(rendered)(**kept)
    assert pods.slot_pod(made, again, 1, 2, IP) == pods.slot_pod(made, rendered, 1, 2, IP)
    assert pods.coordinator_pod(made, again, 1, "", ()) == pods.coordinator_pod(made, rendered, 1, "", ())


def test_filling_in_changes_nothing_that_was_kept() -> None:
    made = job()
    rendered = pods.render(made, RENDER)[0]
    before = json.dumps(rendered.data(), sort_keys=True)
    pods.slot_pod(made, rendered, 1, 2, IP)
    pods.coordinator_pod(made, rendered, 1, "x", ())
    assert json.dumps(rendered.data(), sort_keys=True) == before


def test_the_template_overrules_security_field_by_field_and_it_is_said() -> None:
    own = template(securityContext={"runAsNonRoot": False, "runAsUser": 0, "fsGroup": 5})
    made = job(template=own)
    rendered, overruled = pods.render(made, RENDER)
    security = rendered.slot["spec"]["securityContext"]
    assert security == {"runAsNonRoot": False, "runAsUser": 0, "fsGroup": 5} | {
        "seccompProfile": {"type": "RuntimeDefault"}
    }
    assert overruled == ("securityContext.runAsNonRoot: false",)
    assert pods.render(job(), RENDER)[1] == ()


def test_a_privileged_trainer_is_valid_and_said() -> None:
    container = {"name": "trainer", "image": "i", "securityContext": {"privileged": True}}
    rendered, overruled = pods.render(job(template={"spec": {"containers": [container]}}), RENDER)
    assert trainer(rendered.slot)["securityContext"]["allowPrivilegeEscalation"] is True
    assert overruled == ("containers[trainer].securityContext.privileged: true",)


def test_a_volume_that_the_template_mounts_is_left_alone() -> None:
    container = {
        "name": "trainer",
        "image": "i",
        "volumeMounts": [{"name": "big", "mountPath": "/dev/shm/"}, {"name": "scratch", "mountPath": "/tmp"}],
    }
    pod = slot(template={"spec": {"containers": [container]}})
    paths = [mount["mountPath"] for mount in trainer(pod)["volumeMounts"]]
    assert paths.count("/tmp") == 1
    assert "/dev/shm" not in paths
    assert {volume["name"] for volume in pod["spec"]["volumes"]} == {
        "stormjib-runtime",
        "stormjib-run",
        "stormjib-home",
        "stormjib-storage",
    }


def test_the_templates_environment_stays_except_what_is_ours() -> None:
    given = [
        {"name": "HOME", "value": "/data"},
        {"name": "PYTHONPATH", "value": "/my/code"},
        {"name": "STORMJIB_SLOT", "value": "99"},
        {"name": "MINE", "valueFrom": {"configMapKeyRef": {"name": "c", "key": "k"}}},
    ]
    container = {"name": "trainer", "image": "i", "env": given}
    env = {e["name"]: e for e in trainer(slot(template={"spec": {"containers": [container]}}))["env"]}
    assert env["HOME"]["value"] == "/data"
    assert env["HF_HOME"]["value"] == "/data/.cache/huggingface"
    assert env["PYTHONPATH"]["value"] == "/opt/stormjib/runtime:/my/code"
    assert env["STORMJIB_SLOT"]["value"] == "1"
    assert env["MINE"] == given[3]


def test_no_name_of_the_environment_is_given_twice() -> None:
    names = [each["name"] for each in trainer(slot())["env"]]
    assert len(names) == len(set(names))


@pytest.mark.parametrize(
    "resources",
    [{"limits": {"nvidia.com/gpu": 8}}, {"requests": {"amd.com/gpu": 1}}, {"claims": [{"name": "g"}]}],
)
def test_slots_that_ask_for_devices_may_share_a_host(resources: dict[str, Any]) -> None:
    container = {"name": "trainer", "image": "i", "resources": resources}
    pod = slot(template={"spec": {"containers": [container]}})
    assert pod["spec"]["affinity"] == {"podAntiAffinity": {}}


def test_the_templates_own_affinity_stays_beside_ours() -> None:
    mine = {"topologyKey": "zone", "labelSelector": {}}
    own = template(
        affinity={
            "podAntiAffinity": {"requiredDuringSchedulingIgnoredDuringExecution": [mine]},
            "nodeAffinity": {},
        }
    )
    affinity = slot(template=own)["spec"]["affinity"]
    terms = affinity["podAntiAffinity"]["requiredDuringSchedulingIgnoredDuringExecution"]
    assert terms[0] == mine
    assert terms[1]["topologyKey"] == "kubernetes.io/hostname"
    assert "nodeAffinity" in affinity


def test_init_containers_and_sidecars_stay_and_ours_comes_first() -> None:
    own = template(initContainers=[{"name": "mine", "image": "i"}])
    own["spec"]["containers"].append({"name": "sidecar", "image": "s"})
    pod = slot(template=own)
    assert [each["name"] for each in pod["spec"]["initContainers"]] == ["stormjib-install", "mine"]
    assert pod["spec"]["containers"][1] == {"name": "sidecar", "image": "s"}


def test_without_a_checkpoint_there_is_no_claim_and_no_root() -> None:
    made = job()
    bare = type(made.spec).model_validate({**made.spec.model_dump(by_alias=True), "checkpoint": None})
    from dataclasses import replace

    without = replace(made, spec=bare)
    pod = pods.slot_pod(without, pods.render(without, RENDER)[0], 0, 1, IP)
    assert not [volume for volume in pod["spec"]["volumes"] if "persistentVolumeClaim" in volume]
    assert not [each for each in trainer(pod)["env"] if each["name"].startswith("STORMJIB_CHECKPOINT")]


def test_a_node_that_keeps_copies_has_room_for_them() -> None:
    """Under the container's limit there is no more to be had: what lies there counts as its memory."""
    checkpoint = {"storage": {"persistentVolumeClaim": {"claimName": "disk"}}, "peers": 1}
    pod = slot(template=template(), checkpoint=checkpoint)
    assert {"name": "STORMJIB_CHECKPOINT_PEERS", "value": "1"} in trainer(pod)["env"]
    assert shared_memory(pod) == "4Gi"
    assert shared_memory(slot(template=template())) == "2Gi"
    assert shared_memory(slot(checkpoint=checkpoint)) == "1Gi", "its limit"


def shared_memory(pod: dict[str, Any]) -> str:
    """How much its /dev/shm may hold."""
    volume = next(each for each in pod["spec"]["volumes"] if each["name"] == "stormjib-shm")
    return str(volume["emptyDir"]["sizeLimit"])


def test_an_address_of_ipv6_is_bracketed() -> None:
    assert pods.coordinator_url("fd00::7") == "http://[fd00::7]:7070"


def test_tokens_are_in_the_secret_only() -> None:
    secret = children.token_secret(Observed(job=job(), render=RENDER, tokens=TOKENS))
    assert secret["stringData"] == {"agent": TOKENS.agent, "operator": TOKENS.operator}
    assert TOKENS.agent not in json.dumps(slot())


def test_monitoring_reaches_the_metrics_only_where_it_is_named() -> None:
    from dataclasses import replace

    named = children.network_policy(job(), replace(RENDER, monitoring_labels={"team": "watch"}))
    assert len(children.network_policy(job(), RENDER)["spec"]["ingress"]) == 2
    assert named["spec"]["ingress"][2]["from"] == [{"namespaceSelector": {"matchLabels": {"team": "watch"}}}]


@pytest.mark.parametrize(("asked", "told"), [({}, "On"), ({"health": {"preflight": False}}, "Off")])
def test_an_agent_is_told_whether_to_check_its_node(asked: dict[str, Any], told: str) -> None:
    env = {each["name"]: each.get("value") for each in trainer(slot(**asked))["env"]}
    assert env["STORMJIB_PREFLIGHT"] == told
