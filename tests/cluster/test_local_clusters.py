"""Clusters side by side do not meet, and one that is taken down leaves nothing, whatever was done to it before."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from functools import partial
from typing import TYPE_CHECKING

import pytest
from cluster.kube import Kubectl, eventually, footprint

from stormjib_local import processes
from stormjib_local.addresses import Addresses
from stormjib_local.cluster import Cluster
from stormjib_local.errors import BadRequest
from stormjib_local.hosts import Host
from stormjib_local.machine import clusters

if TYPE_CHECKING:
    from collections.abc import Iterator

POD = {
    "apiVersion": "v1",
    "kind": "Pod",
    "metadata": {"name": "sleeper"},
    "spec": {
        "containers": [{"name": "main", "image": "localhost/host:dev", "command": ["sleep", "1000"]}],
    },
}


@pytest.fixture
def other(cluster: Cluster) -> Iterator[Cluster]:
    """A second cluster, beside the session's."""
    second = Cluster(f"{cluster.name}b")
    second.down()
    try:
        second.up(nodes=1)
        yield second
    finally:
        second.down()


def _connects(cluster: Cluster, host: str, address: str) -> bool:
    """Can a process on this host of the cluster open a connection to port 6443 there?"""
    init = Host(cluster.layout, host).init
    code = f"import socket; socket.create_connection(('{address}', 6443), 2)"
    command = ["nsenter", "--target", str(init), "--net", "python3", "-c", code]
    return subprocess.run(command, capture_output=True, check=False, timeout=20).returncode == 0


def _gone(cluster: Cluster, host: str, component: str) -> bool:
    return Host(cluster.layout, host).running(component) is None


@pytest.mark.timeout(120)
def test_two_clusters_do_not_meet_and_one_leaves_without_the_other(cluster: Cluster, other: Cluster) -> None:
    assert {cluster.name, other.name} <= set(clusters())
    assert cluster.record
    assert other.record
    mine, theirs = Addresses(cluster.record.index), Addresses(other.record.index)
    assert _connects(other, "node-1", str(theirs.control))
    for host in ("node-1", "control"):
        assert not _connects(other, host, str(mine.control))
        assert not _connects(cluster, host, str(theirs.control))
    assert len(Kubectl(other, "default").get("nodes")["items"]) == 1
    assert len(Kubectl(cluster, "default").get("nodes")["items"]) == len(cluster.nodes)
    other.up(nodes=2)
    assert [node.ready for node in other.status()] == [True, True], "a cluster that is up takes more nodes"
    before = {process.pid for process in processes.marked(cluster.name)}

    other.down()

    assert footprint(other.name) == []
    assert {process.pid for process in processes.marked(cluster.name)} == before
    assert all(node.ready for node in cluster.status())


@pytest.mark.timeout(120)
def test_down_leaves_nothing_after_kill_9_of_anything(other: Cluster) -> None:
    kubectl = Kubectl(other, "default")
    kubectl.apply(POD)
    kubectl.wait("condition=Ready", "pod/sleeper")
    pod = other.pids_of(kubectl.get("pod", "sleeper")["metadata"]["uid"])
    assert len(pod) == 2
    assert footprint(other.name), "else the comparison below shows nothing"

    for host, component in [("node-1", "kubelet"), ("node-1", "containerd"), ("control", "kube-apiserver")]:
        process = Host(other.layout, host).running(component)
        assert process
        os.kill(process.pid, signal.SIGKILL)
        eventually(f"{component} is gone", 5, partial(_gone, other, host, component))
    assert all(other.node_of_pid(pid) for pid in pod), "containers outlive kubelet and containerd"

    begin = time.monotonic()
    other.down()

    assert time.monotonic() - begin < 15
    assert footprint(other.name) == []
    assert not any(other.node_of_pid(pid) for pid in pod)
    other.down()  # and again, with nothing there


@pytest.mark.timeout(120)
def test_down_leaves_nothing_after_the_power_itself_was_killed(other: Cluster) -> None:
    """The first process of a host, and the one that holds it, die; its record is damaged too."""
    for process in list(processes.marked(other.name)):
        if process.component == "init":
            os.kill(process.pid, signal.SIGKILL)
    other.layout.record.write_text("{}")
    other.down()
    assert footprint(other.name) == []


def test_an_up_that_is_refused_leaves_nothing(cluster: Cluster) -> None:
    refused = Cluster(f"{cluster.name}c")
    with pytest.raises(BadRequest):
        refused.up(nodes=0)
    with pytest.raises(BadRequest):
        refused.up(mounts=["/no/such"])
    assert footprint(refused.name) == []
