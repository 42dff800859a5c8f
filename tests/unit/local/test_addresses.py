"""Clusters side by side get addresses that do not meet, and no name of one begins another's."""

from __future__ import annotations

from ipaddress import IPv4Network

import pytest

from stormjib_local.addresses import (
    MAX_CLUSTERS,
    MAX_NODES,
    SERVICES,
    Addresses,
    check_name,
    check_nodes,
    node_number,
    pick,
)
from stormjib_local.errors import BadRequest
from stormjib_local.layout import Layout


def test_no_two_clusters_share_an_address() -> None:
    networks = [
        net for index in range(MAX_CLUSTERS) for net in (Addresses(index).switch, Addresses(index).pods)
    ]
    for position, network in enumerate(networks):
        assert not network.overlaps(SERVICES)
        assert not any(network.overlaps(other) for other in networks[position + 1 :])


def test_in_one_cluster_every_host_has_its_own_address() -> None:
    ours = Addresses(3)
    hosts = [ours.node(number) for number in range(1, MAX_NODES + 1)] + [ours.control, ours.machine]
    assert len(set(hosts)) == len(hosts)
    assert all(host in ours.switch for host in hosts)
    assert all(ours.pods_of(number).subnet_of(ours.pods) for number in range(1, MAX_NODES + 1))


@pytest.mark.parametrize(
    ("taken", "routes", "index"),
    [
        ([], [], 0),
        ([0, 1], [], 2),
        ([], ["10.80.0.0/16"], None),
        ([], ["10.100.0.0/15"], 2),
        ([1], ["10.80.0.0/24", "10.102.7.0/24"], 3),
        ([], ["192.168.0.0/16", "172.17.0.0/16"], 0),
        (range(MAX_CLUSTERS), [], None),
    ],
)
def test_the_first_free_range_is_picked(taken: list[int], routes: list[str], index: int | None) -> None:
    networks = [IPv4Network(route) for route in routes]
    if index is None:
        with pytest.raises(BadRequest, match="no free address range"):
            pick(taken, networks)
    else:
        assert pick(taken, networks).index == index


@pytest.mark.parametrize("name", ["", "Dev", "a-b", "1a", "a" * 21, "a/b", "a b", "../x", "a\n"])
def test_a_bad_name_is_refused(name: str) -> None:
    with pytest.raises(BadRequest, match="no cluster name"):
        check_name(name)


@pytest.mark.parametrize("nodes", [0, -1, MAX_NODES + 1])
def test_a_bad_number_of_nodes_is_refused(nodes: int) -> None:
    with pytest.raises(BadRequest, match="from 1 to"):
        check_nodes(nodes)


@pytest.mark.parametrize(
    "name", ["node-0", "node-", "node-99", "control", "Node-1", "node-1x", "node-01", "2"]
)
def test_what_is_no_node_is_refused(name: str) -> None:
    with pytest.raises(BadRequest, match="no node"):
        node_number(name)


def test_no_cluster_owns_what_another_one_does() -> None:
    """`down` finds namespaces and cgroups by prefix: `a` must never match those of `ab` or of a host called `a`."""
    mine, others = Layout("a"), (Layout("ab"), Layout("aa"), Layout("b"))
    for other in others:
        assert not other.netns("node-1").startswith(mine.netns_prefix)
        assert not other.cgroup("node-1").startswith(mine.cgroup(""))


def test_interface_names_fit_the_kernel() -> None:
    names = [Addresses(MAX_CLUSTERS - 1).link, f"node-{MAX_NODES}", "control", "machine", "bridge"]
    assert all(len(name) <= 15 for name in names)
