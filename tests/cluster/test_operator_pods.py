"""The operator as a pod, and what it says when pods cannot be made or cannot run. Nothing here needs a rank."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pytest
from cluster.kube import Kubectl, eventually
from cluster.operator import (
    children,
    condition,
    install,
    job,
    pods,
    wait_for,
)

from bench.stage import SYSTEM

if TYPE_CHECKING:
    from stormjib_local.cluster import Cluster


@pytest.fixture(scope="module", autouse=True)
def operator(cluster: Cluster) -> Kubectl:
    """The chart; kubectl in its namespace."""
    install(cluster)
    return Kubectl(cluster, SYSTEM)


def acting(operator: Kubectl) -> dict[str, Any]:
    """The pod of the operator that holds the Lease."""

    def found() -> dict[str, Any] | None:
        holder = operator.get("lease", "stormjib-operator")["spec"]["holderIdentity"]
        live = operator.get("pods", "-l", "app.kubernetes.io/name=stormjib")["items"]
        return next((pod for pod in live if pod["metadata"]["name"] == holder), None)

    pod: dict[str, Any] = eventually("an operator that acts", 30, found)
    return pod


def template(**trainer: Any) -> dict[str, Any]:
    """A template whose trainer is changed like this."""
    spec: dict[str, Any] = job()["spec"]["template"]["spec"]
    spec["containers"][0] |= trainer
    return {"spec": spec}


def test_the_operator_runs_as_its_own_account_and_may_do_little(operator: Kubectl) -> None:
    pod = acting(operator)
    assert pod["spec"]["serviceAccountName"] == "stormjib"
    account = f"--as=system:serviceaccount:{SYSTEM}:stormjib"

    def may(*what: str) -> bool:
        return operator("auth", "can-i", *what, account, check=False).strip().endswith("yes")

    assert may("create", "pods", "-n", "default")
    assert may("get", "secrets/stormjib-key")
    for refused in (
        ("get", "secrets", "-n", "default"),
        ("list", "secrets"),
        ("get", "secrets/other"),
        ("delete", "trainingjobs.stormjib.io", "-n", "default"),
        ("update", "trainingjobs.stormjib.io", "-n", "default"),
        ("patch", "nodes"),
        ("create", "pods", "--subresource=exec", "-n", "default"),
        ("delete", "services", "-n", "default"),
    ):
        assert not may(*refused), refused


def test_the_operator_is_small_and_says_how_it_is(operator: Kubectl, cluster: Cluster) -> None:
    pod = acting(operator)
    name = pod["metadata"]["name"]
    answer = operator("get", "--raw", f"/api/v1/namespaces/{SYSTEM}/pods/{name}:8080/proxy/metrics")
    assert "stormjib_controller_is_leader 1.0" in answer
    assert operator("get", "--raw", f"/api/v1/namespaces/{SYSTEM}/pods/{name}:8080/proxy/healthz") == "ok"
    sizes = [_rss(pid) for pid in cluster.pids_of(pod["metadata"]["uid"])]
    assert 20 < max(sizes) <= 90


def _rss(pid: int) -> float:
    with open(f"/proc/{pid}/statm") as statm:
        return int(statm.read().split()[1]) * 4 / 1024


def test_a_jobs_pods_run_under_the_restricted_profile(kubectl: Kubectl) -> None:
    kubectl.apply(job(nodes={"replicas": 2, "spares": 1}))
    names = ["job-0-1", "job-1-2", "job-2-3", "job-coord-1"]
    eventually("four pods", 30, lambda: [p["metadata"]["name"] for p in pods(kubectl, "job")] == names)
    kubectl.wait("condition=Ready", "pod/job-coord-1")
    nodes = {p["metadata"]["name"]: p["spec"]["nodeName"] for p in pods(kubectl, "job")}
    assert len({nodes[name] for name in names[:3]}) == 3
    assert nodes["job-coord-1"] == nodes["job-2-3"], "the coordinator is beside the spare"


def test_a_deleted_job_leaves_nothing(kubectl: Kubectl) -> None:
    kubectl.apply(job())
    eventually("its children", 30, lambda: len(children(kubectl, "job")) >= 6)
    kubectl("delete", "trainingjob", "job")
    eventually("nothing of it", 50, lambda: children(kubectl, "job") == [])


def test_an_image_that_does_not_exist_is_said(kubectl: Kubectl) -> None:
    kubectl.apply(job(template=template(image="localhost/no-such-image:1")))
    found = eventually(
        "the kubelet's words",
        40,
        lambda: (c := condition(kubectl, "job", "Running")) and "no-such-image" in c["message"] and c,
    )
    assert found["status"] == "False"
    assert found["reason"] in ("ErrImagePull", "ImagePullBackOff")


def test_a_claim_that_does_not_exist_is_said(kubectl: Kubectl) -> None:
    storage = {"persistentVolumeClaim": {"claimName": "no-such-claim"}}
    kubectl.apply(job(checkpoint={"storage": storage}))
    found = wait_for(kubectl, "job", "Scheduled", "False", "Unschedulable")
    assert 'persistentvolumeclaim "no-such-claim" not found' in found["message"]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"securityContext": {"privileged": True}}, "privileged"),
        ({"volumes": [{"name": "h", "hostPath": {"path": "/etc"}}]}, "hostPath"),
        ({"hostPID": True}, "host namespaces"),
    ],
)
def test_what_the_namespaces_profile_forbids_is_said_in_the_servers_words(
    kubectl: Kubectl, change: dict[str, Any], words: str
) -> None:
    bad = template(**change) if "securityContext" in change else template()
    if "securityContext" not in change:
        bad["spec"] |= change
    kubectl.apply(job(template=bad))
    found = wait_for(kubectl, "job", "Scheduled", "False", "CreateRefused")
    assert "violates PodSecurity" in found["message"]
    assert words in found["message"]
    assert pods(kubectl, "job", "trainer") == []


def test_a_misspelt_field_of_the_template_is_said(kubectl: Kubectl) -> None:
    kubectl.apply(job(template=template(imagePullPolice="Never")))
    found = wait_for(kubectl, "job", "Scheduled", "False", "CreateRefused")
    assert 'unknown field "spec.containers[0].imagePullPolice"' in found["message"]


def test_a_quota_that_refuses_the_second_pod_is_said_and_lifted(kubectl: Kubectl) -> None:
    quota = {"apiVersion": "v1", "kind": "ResourceQuota", "metadata": {"name": "small"}}
    kubectl.apply(quota | {"spec": {"hard": {"pods": "2"}}})
    kubectl.apply(job())
    found = wait_for(kubectl, "job", "Scheduled", "False", "CreateRefused")
    assert "exceeded quota: small" in found["message"]

    def told() -> list[str]:  # the condition is written first
        events = kubectl.get("events")["items"]
        return [event["involvedObject"]["kind"] for event in events if event["reason"] == "CreateRefused"]

    assert eventually("the event", 20, told) == ["TrainingJob"]
    kubectl.apply(quota | {"spec": {"hard": {"pods": "9"}}})
    wait_for(kubectl, "job", "Scheduled", "True")


def test_what_the_template_overrules_is_an_event(kubectl: Kubectl) -> None:
    own = template(securityContext={"readOnlyRootFilesystem": False})
    kubectl.apply(job(template=own))

    def told() -> list[str]:
        events = kubectl.get("events")["items"]
        return [event["message"] for event in events if event["reason"] == "SecurityDefaultsOverruled"]

    (message,) = eventually("the event", 20, told)
    assert "containers[trainer].securityContext.readOnlyRootFilesystem: false" in message


def test_two_jobs_of_one_name_in_two_namespaces_do_not_meet(kubectl: Kubectl, cluster: Cluster) -> None:
    other = Kubectl(cluster, f"{kubectl.namespace}-b")
    other("create", "namespace", other.namespace)
    try:
        kubectl.apply(job())
        other.apply(job())
        for each in (kubectl, other):
            _three_pods(each)
        addresses = {k.get("service", "job-coord")["spec"]["clusterIP"] for k in (kubectl, other)}
        assert len(addresses) == 2
        tokens = {
            json.dumps(k.get("secrets", "-l", "stormjib.io/job=job")["items"][0]["data"])
            for k in (kubectl, other)
        }
        assert len(tokens) == 2
        kubectl("delete", "trainingjob", "job")
        eventually("nothing of the first", 50, lambda: children(kubectl, "job") == [])
        assert len(pods(other, "job")) == 3
    finally:
        other("delete", "namespace", other.namespace, "--wait=false")


def _three_pods(kubectl: Kubectl) -> None:
    eventually("three pods", 30, lambda: len(pods(kubectl, "job")) == 3)


def test_a_pod_that_is_deleted_gets_a_successor_that_does_not_wait_for_it(kubectl: Kubectl) -> None:
    kubectl.apply(job(nodes={"replicas": 1}))
    kubectl.wait("create", "pod/job-0-1")
    kubectl("delete", "pod", "job-0-1", "--wait=false")
    kubectl.wait("create", "pod/job-0-2", seconds=10)


def test_a_service_that_is_deleted_comes_back_under_the_same_address(kubectl: Kubectl) -> None:
    kubectl.apply(job())
    before = eventually("the Service", 20, lambda: kubectl.get("services")["items"])[0]
    eventually("its pods", 20, lambda: len(pods(kubectl, "job")) == 3)
    kubectl("delete", "service", "job-coord")
    after = eventually("it again", 20, lambda: kubectl.get("services")["items"])[0]
    assert before["metadata"]["uid"] != after["metadata"]["uid"]
    assert before["spec"]["clusterIP"] == after["spec"]["clusterIP"]


def test_a_job_that_is_made_suspended_makes_no_pod_until_it_may(kubectl: Kubectl) -> None:
    kubectl.apply(job(suspend=True))
    wait_for(kubectl, "job", "Suspended", "True")
    assert children(kubectl, "job") == []
    kubectl("patch", "tj", "job", "--type=merge", "-p", '{"spec":{"suspend":false}}')
    eventually("three pods", 20, lambda: len(pods(kubectl, "job")) == 3)
    wait_for(kubectl, "job", "Suspended", "False", "NotSuspended")
