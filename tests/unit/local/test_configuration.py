"""What the components are told: the settings that other parts rely on."""

from __future__ import annotations

import json
import shutil
import sys
import tomllib
from functools import partial
from pathlib import Path

import pytest

from stormjib_local import node
from stormjib_local.addresses import Addresses
from stormjib_local.cluster import Cluster
from stormjib_local.control_plane import ControlPlane
from stormjib_local.errors import BadRequest, LocalError, NotRoot
from stormjib_local.layout import Layout
from stormjib_local.machine import need_programs
from stormjib_local.node import Node


@pytest.fixture
def layout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Layout:
    """A cluster's folder that is not in /var/lib, on a machine with CNI plugins."""
    monkeypatch.setattr(node, "plugins", lambda: Path("/usr/lib/cni"))
    return Layout("unit", tmp_path)


def test_nothing_of_a_node_lies_outside_the_clusters_folder(layout: Layout) -> None:
    one = Node(layout, Addresses(4), 2)
    toml = tomllib.loads(one.containerd_configuration())
    kubelet, proxy, cni = one.kubelet_configuration(), one.proxy_configuration(), one.cni_configuration()
    paths = [
        toml["root"],
        toml["state"],
        toml["temp"],
        toml["grpc"]["address"],
        toml["plugins"]["io.containerd.internal.v1.opt"]["path"],
        toml["plugins"]["io.containerd.grpc.v1.cri"]["cni"]["conf_dir"],
        kubelet["podLogsDir"],
        kubelet["volumePluginDir"],
        kubelet["tlsPrivateKeyFile"],
        kubelet["containerRuntimeEndpoint"].removeprefix("unix://"),
        proxy["clientConnection"]["kubeconfig"],
        cni["plugins"][0]["ipam"]["dataDir"],
    ]
    assert all(Path(path).is_relative_to(layout.state) for path in paths)
    assert cni["plugins"][0]["ipam"]["ranges"] == [[{"subnet": "10.104.2.0/24"}]]
    assert kubelet["address"] == proxy["bindAddress"] == "10.80.4.2"


def test_kubelets_restart_containers_at_once_and_run_on_any_cgroup_version(layout: Layout) -> None:
    kubelet = Node(layout, Addresses(4), 2).kubelet_configuration()
    assert kubelet["crashLoopBackOff"] == {"maxContainerRestartPeriod": "1s"}
    assert kubelet["failCgroupV1"] is False
    assert kubelet["cgroupRoot"] == "/sj-unit-node-2"
    assert kubelet["authentication"]["anonymous"] == {"enabled": False}


def test_a_socket_path_fits_the_kernel() -> None:
    longest = Node(Layout("a" * 20), Addresses(31), 32)
    address = tomllib.loads(longest.containerd_configuration())["grpc"]["address"]
    assert len(address) < 108


def test_the_control_plane_listens_in_its_own_namespace_only(layout: Layout) -> None:
    control = ControlPlane(layout, Addresses(4))
    flags = " ".join([*control.etcd_flags(), *control.apiserver_flags(), *control.controller_flags()])
    assert "--bind-address=10.80.4.254" in flags
    assert "0.0.0.0" not in flags
    for needed in ("--authorization-mode=Node,RBAC", "NodeRestriction", "--node-monitor-grace-period=8s"):
        assert needed in flags
    assert "ServiceAccount" not in flags, "its admission is on unless somebody turns it off"


@pytest.mark.parametrize("call", ["up", "down"])
def test_without_root_it_says_sudo(monkeypatch: pytest.MonkeyPatch, call: str) -> None:
    monkeypatch.setattr("os.geteuid", lambda: 1000)
    with pytest.raises(NotRoot, match="sudo"):
        getattr(Cluster("unit"), call)()


def test_what_is_missing_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    real = shutil.which
    monkeypatch.setattr(
        "shutil.which", lambda name, **how: None if name in ("nft", "ctr") else real(name, **how)
    )
    with pytest.raises(LocalError, match="please install: containerd nftables"):
        need_programs()


def test_a_cluster_that_is_not_up_says_how_to_bring_it_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.geteuid", lambda: 0)
    none = Cluster("notthere")
    for call in (partial(none.cut, "node-1"), none.status, partial(getattr, none, "nodes")):
        with pytest.raises(LocalError, match="stormjib local up --name notthere"):
            call()


@pytest.mark.parametrize(
    ("nodes", "mounts", "why"),
    [(1, None, "more than 1"), (0, None, "from 1 to"), (None, ["/usr/bin"], "another set of mounts")],
)
def test_a_running_cluster_is_not_turned_into_another(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, nodes: int | None, mounts: list[str] | None, why: str
) -> None:
    one = Cluster("unit")
    one.layout = Layout("unit", tmp_path)
    one.layout.state.mkdir()
    record = {"index": 1, "nodes": 2, "mounts": ["/opt"], "environment": sys.prefix, "inotify": 128}
    one.layout.record.write_text(json.dumps(record))
    with pytest.raises(BadRequest, match=why):
        one.decide(nodes, mounts)
    assert one.decide(4, ["/opt"]).nodes == 4
    assert one.decide(None, None).nodes == 4
    monkeypatch.setattr("sys.prefix", "/somewhere/else")
    with pytest.raises(BadRequest, match="another environment"):
        one.decide(None, None)


def test_a_record_of_another_version_is_named(tmp_path: Path) -> None:
    one = Cluster("unit")
    one.layout = Layout("unit", tmp_path)
    one.layout.state.mkdir()
    one.layout.record.write_text('{"index": 1}')
    with pytest.raises(LocalError, match="not of this version"):
        one.decide(None, None)
