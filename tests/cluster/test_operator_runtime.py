"""Operator, coordinator and agents together on real kubelets. Ranks only sleep or end: what is shown is who decides what."""

from __future__ import annotations

import os
import time
from contextlib import suppress
from typing import TYPE_CHECKING, Any

import pytest
from cluster.kube import Kubectl, eventually, told
from cluster.operator import children, install, job, pods, wait_for, wait_running

from bench.stage import SYSTEM

if TYPE_CHECKING:
    from collections.abc import Iterator

    from stormjib_local.cluster import Cluster


@pytest.fixture(scope="module", autouse=True)
def operator(cluster: Cluster) -> Kubectl:
    """The chart; kubectl in its namespace."""
    install(cluster)
    return Kubectl(cluster, SYSTEM)


@pytest.fixture
def healed(cluster: Cluster) -> Iterator[Cluster]:
    """The cluster; whatever a test cuts is plugged in again."""
    yield cluster
    for node in cluster.nodes:
        cluster.heal(node)


def status(kubectl: Kubectl) -> dict[str, Any]:
    """The job's status."""
    found: dict[str, Any] = kubectl.get("trainingjob", "job")["status"]
    return found


def ranks(cluster: Cluster, kubectl: Kubectl) -> set[int]:
    """Processes of the job's ranks, as this machine numbers them."""
    found = set()
    for pod in pods(kubectl, "job", "trainer"):
        for pid in cluster.pids_of(pod["metadata"]["uid"]):
            with (
                suppress(FileNotFoundError, ProcessLookupError),
                open(f"/proc/{pid}/cmdline", "rb") as cmdline,
            ):
                if cmdline.read().startswith(b"sleep\0"):  # one that has ended since it was listed is no rank
                    found.add(pid)
    return found


def coordinator(kubectl: Kubectl) -> dict[str, Any] | None:
    """The coordinator's pod that nobody is deleting."""
    return next(iter(pods(kubectl, "job", "coordinator")), None)


def ready(pod: dict[str, Any] | None) -> bool:
    """Whether the API calls it Ready."""
    conditions = pod["status"].get("conditions", []) if pod else []
    return any(each["type"] == "Ready" and each["status"] == "True" for each in conditions)


def successor(kubectl: Kubectl, old: str) -> dict[str, Any] | None:
    """A Ready coordinator of another name."""
    pod = coordinator(kubectl)
    return pod if pod and pod["metadata"]["name"] != old and ready(pod) else None


@pytest.mark.timeout(120)
def test_ranks_that_end_well_make_the_job_complete(kubectl: Kubectl) -> None:
    kubectl.apply(job(launcher={"command": ["--no-python", "true"]}, nodes={"replicas": 2, "spares": 1}))
    wait_for(kubectl, "job", "Complete", "True", seconds=90)
    eventually("coordinator and spare are gone", 30, lambda: len(kubectl.get("pods")["items"]) == 2)
    eventually(
        "members succeeded",
        30,
        lambda: {pod["status"]["phase"] for pod in pods(kubectl, "job")} == {"Succeeded"},
    )
    assert "completionTime" in status(kubectl)


@pytest.mark.timeout(120)
def test_a_command_that_fails_at_once_is_restarted_so_often_and_then_failed_with_its_last_lines(
    kubectl: Kubectl,
) -> None:
    command = ["--no-python", "sh", "-c", "echo the disk is on fire >&2; exit 7"]
    recovery = {"maxRestarts": 2, "backoff": {"initialSeconds": 1, "maxSeconds": 1}}
    kubectl.apply(job(launcher={"command": command}, recovery=recovery, nodes={"replicas": 1}))
    failed = wait_for(kubectl, "job", "Failed", "True", "RestartBudgetSpent", seconds=90)
    assert "2 of 2 restarts are spent" in failed["message"]
    assert "the disk is on fire" in failed["message"]
    seen = status(kubectl)
    assert seen["restarts"] == {"total": 2, "counted": 2}
    assert [fault["cause"] for fault in seen["faults"]] == ["RankExit", "RankExit"]
    eventually("the coordinator is gone", 30, lambda: coordinator(kubectl) is None)
    time.sleep(1)
    assert status(kubectl)["restarts"]["total"] == 2


@pytest.mark.timeout(150)
def test_a_deleted_coordinator_is_replaced_and_no_rank_notices(kubectl: Kubectl, cluster: Cluster) -> None:
    kubectl.apply(job())
    wait_running(kubectl, "job", 90)
    before = eventually("two ranks", 30, lambda: (r := ranks(cluster, kubectl)) and len(r) == 2 and r)
    kubectl("delete", "pod", "job-coord-1", "--wait=false")
    begun = time.monotonic()
    eventually("its successor", 30, lambda: successor(kubectl, "job-coord-1"))
    assert time.monotonic() - begun <= 18
    eventually(
        "it has adopted the generation",
        40,
        lambda: "adopted" in kubectl("logs", "job-coord-2", check=False),
    )
    assert ranks(cluster, kubectl) == before
    assert status(kubectl)["generation"] == "1.1"
    assert status(kubectl)["incarnation"] == 2


@pytest.mark.timeout(150)
def test_a_coordinator_on_a_cut_node_is_replaced_elsewhere_before_the_api_notices(
    kubectl: Kubectl, healed: Cluster
) -> None:
    kubectl.apply(job(nodes={"replicas": 2, "spares": 1}))
    wait_running(kubectl, "job", 90)
    before = eventually("two ranks", 30, lambda: (r := ranks(healed, kubectl)) and len(r) == 2 and r)
    old = coordinator(kubectl)
    assert old is not None
    node = old["spec"]["nodeName"]
    assert node == pods(kubectl, "job", "trainer")[2]["spec"]["nodeName"], "beside the spare"
    healed.cut(node)
    begun = time.monotonic()
    new = eventually("its successor", 30, lambda: successor(kubectl, old["metadata"]["name"]))
    took = time.monotonic() - begun
    assert new["spec"]["nodeName"] != node
    assert took <= 18, f"{took:.1f} s"
    assert ranks(healed, kubectl) == before
    assert status(kubectl)["generation"] == "1.1"


@pytest.mark.timeout(150)
def test_a_killed_operator_costs_no_generation_and_a_rank_is_recovered_without_it(
    kubectl: Kubectl, operator: Kubectl, cluster: Cluster
) -> None:
    kubectl.apply(job())
    wait_running(kubectl, "job", 90)
    before = eventually("two ranks", 30, lambda: (r := ranks(cluster, kubectl)) and len(r) == 2 and r)
    operator("scale", "deployment/stormjib", "--replicas=0")
    operator("wait", "--for=delete", "pod", "-l", "app.kubernetes.io/name=stormjib", "--timeout=30s")
    try:
        os.kill(min(before), 9)
        fresh = eventually(
            "two new ranks",
            40,
            lambda: (r := ranks(cluster, kubectl)) and len(r) == 2 and not r & before and r,
        )
        assert status(kubectl)["generation"] == "1.1"  # nobody has written it down yet
    finally:
        operator("scale", "deployment/stormjib", "--replicas=1")
    eventually("it is counted", 40, lambda: status(kubectl)["restarts"]["counted"] == 1)
    assert status(kubectl)["generation"] == "1.2"
    assert ranks(cluster, kubectl) == fresh
    assert [pod["metadata"]["name"] for pod in pods(kubectl, "job")] == ["job-0-1", "job-1-2", "job-coord-1"]


@pytest.mark.timeout(150)
def test_an_upgrade_of_the_operator_touches_no_pod_and_no_generation(
    kubectl: Kubectl, operator: Kubectl, cluster: Cluster
) -> None:
    kubectl.apply(job())
    wait_running(kubectl, "job", 90)
    before = eventually("two ranks", 30, lambda: (r := ranks(cluster, kubectl)) and len(r) == 2 and r)
    uids = {pod["metadata"]["uid"] for pod in pods(kubectl, "job")}
    holder = operator.get("lease", "stormjib-operator")["spec"]["holderIdentity"]
    install(cluster, "podAnnotations.stormjib\\.io/test=upgrade")
    lease = eventually(
        "another operator acts",
        30,
        lambda: (
            (s := operator.get("lease", "stormjib-operator")["spec"])["holderIdentity"] not in ("", holder)
            and s
        ),
    )
    assert lease["leaseTransitions"] >= 2
    kubectl("patch", "tj", "job", "--type=merge", "-p", '{"spec":{"recovery":{"maxRestarts":7}}}')
    eventually("it has seen the change", 20, lambda: status(kubectl)["observedGeneration"] == 2)
    assert {pod["metadata"]["uid"] for pod in pods(kubectl, "job")} == uids
    assert ranks(cluster, kubectl) == before
    assert status(kubectl)["generation"] == "1.1"


@pytest.mark.timeout(150)
def test_a_drained_node_is_a_planned_leave_that_costs_no_budget(kubectl: Kubectl, cluster: Cluster) -> None:
    kubectl.apply(job(nodes={"replicas": 1, "spares": 1}))
    wait_running(kubectl, "job", 90)
    eventually("a rank", 30, lambda: ranks(cluster, kubectl))
    node = pods(kubectl, "job", "trainer")[0]["spec"]["nodeName"]
    try:
        kubectl("drain", node, "--ignore-daemonsets", "--delete-emptydir-data", "--force", "--timeout=40s")
        eventually("a second generation", 40, lambda: status(kubectl)["generation"] != "1.1")
        seen = status(kubectl)
        assert seen["restarts"] == {"total": 0, "counted": 0}
        assert seen["faults"] == []
        told(kubectl, "Leave", "SlotReplaced")
    finally:
        kubectl("uncordon", node)


@pytest.mark.timeout(180)
def test_a_job_is_suspended_and_resumed(kubectl: Kubectl, cluster: Cluster) -> None:
    kubectl.apply(job(nodes={"replicas": 1}))
    wait_running(kubectl, "job", 90)
    eventually("a rank", 30, lambda: ranks(cluster, kubectl))
    kubectl("patch", "tj", "job", "--type=merge", "-p", '{"spec":{"suspend":true}}')
    wait_for(kubectl, "job", "Suspended", "True", seconds=60)
    eventually("no pod", 30, lambda: kubectl.get("pods")["items"] == [])
    kubectl("patch", "tj", "job", "--type=merge", "-p", '{"spec":{"suspend":false}}')
    eventually("a rank again", 60, lambda: ranks(cluster, kubectl))
    seen = eventually("a newer generation", 20, lambda: (s := status(kubectl))["generation"] != "1.1" and s)
    assert seen["restarts"] == {"total": 0, "counted": 0}


@pytest.mark.timeout(180)
def test_a_job_that_is_applied_again_on_the_same_claim_goes_on_above_its_predecessor(
    kubectl: Kubectl,
) -> None:
    claim = {
        "accessModes": ["ReadWriteMany"],
        "storageClassName": "shared",
        "resources": {"requests": {"storage": "1Gi"}},
    }
    kubectl.apply(
        {"apiVersion": "v1", "kind": "PersistentVolumeClaim", "metadata": {"name": "c"}, "spec": claim}
    )
    checkpoint = {"storage": {"persistentVolumeClaim": {"claimName": "c"}}}
    again = job(nodes={"replicas": 1}, checkpoint=checkpoint)
    kubectl.apply(again)
    wait_running(kubectl, "job", 90)
    first = status(kubectl)["generation"]
    kubectl("delete", "trainingjob", "job")
    eventually("nothing of it but its checkpoints", 50, lambda: children(kubectl, "job") == [])
    kubectl.apply(again)
    wait_running(kubectl, "job", 90)
    assert (first, status(kubectl)["generation"]) == ("1.1", "2.1")
    told(kubectl, "StorageFound")


@pytest.mark.timeout(150)
def test_a_job_that_is_deleted_in_the_middle_of_a_recovery_leaves_nothing(
    kubectl: Kubectl, cluster: Cluster
) -> None:
    kubectl.apply(job(recovery={"backoff": {"initialSeconds": 60}}))
    wait_running(kubectl, "job", 90)
    before = eventually("two ranks", 30, lambda: (r := ranks(cluster, kubectl)) and len(r) == 2 and r)
    uids = [pod["metadata"]["uid"] for pod in pods(kubectl, "job")]
    os.kill(min(before), 9)
    eventually("the fault has fired", 20, lambda: not ranks(cluster, kubectl) & before)
    kubectl("delete", "trainingjob", "job")
    eventually("nothing of it", 50, lambda: children(kubectl, "job") == [])
    assert [pid for uid in uids for pid in cluster.pids_of(uid)] == []
