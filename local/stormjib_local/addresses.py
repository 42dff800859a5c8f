"""Which addresses a cluster uses. Pure: the shell asks the machine for what is taken and passes it in.

Cluster number k has the switch network 10.80.k.0/24 and the pods' 10.(100+k).0.0/16, of which node i owns the /24
numbered i. The service range is the same for all: it never leaves a cluster's own namespaces.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv4Network
from typing import TYPE_CHECKING

from stormjib_local.errors import BadRequest

if TYPE_CHECKING:
    from collections.abc import Iterable

MAX_NODES = 32
MAX_CLUSTERS = 32
SERVICES = IPv4Network("10.96.0.0/16")
_NAME = re.compile(r"[a-z][a-z0-9]{0,19}")


@dataclass(frozen=True)
class Addresses:
    """Every address of cluster number `index`."""

    index: int

    @property
    def switch(self) -> IPv4Network:
        """The network that control plane, nodes and this machine share."""
        return IPv4Network(f"10.80.{self.index}.0/24")

    @property
    def pods(self) -> IPv4Network:
        """All pods of the cluster."""
        return IPv4Network(f"10.{100 + self.index}.0.0/16")

    @property
    def control(self) -> IPv4Address:
        """The control plane; also every node's default gateway."""
        return self.switch[254]

    @property
    def machine(self) -> IPv4Address:
        """This machine's own leg in the switch network, so that kubectl works from here."""
        return self.switch[250]

    @property
    def link(self) -> str:
        """The one network interface of the cluster that lies in the machine's own namespace."""
        return f"sj{self.index}"

    @property
    def server(self) -> str:
        """The API server's address."""
        return f"https://{self.control}:6443"

    def node(self, number: int) -> IPv4Address:
        """Node `number`, from 1."""
        return self.switch[number]

    def pods_of(self, number: int) -> IPv4Network:
        """The pods of node `number`."""
        return IPv4Network(f"10.{100 + self.index}.{number}.0/24")


def pick(taken: Iterable[int], routes: Iterable[IPv4Network]) -> Addresses:
    """The first cluster number that no other cluster has and whose ranges no route of the machine touches."""
    used, known = set(taken), list(routes)
    for index in range(MAX_CLUSTERS):
        ours = Addresses(index)
        if index in used or any(route.overlaps(net) for route in known for net in (ours.switch, ours.pods)):
            continue
        return ours
    raise BadRequest(
        f"no free address range: all of 10.80.0-{MAX_CLUSTERS - 1}.0/24 and 10.100-{99 + MAX_CLUSTERS}.0.0/16 "
        "are routed or used by other local clusters; take one down with `stormjib local down --name NAME`"
    )


def check_name(name: str) -> str:
    """A cluster's name; no hyphen, so that no cluster's names begin with another's."""
    if not _NAME.fullmatch(name):
        raise BadRequest(
            f"{name!r} is no cluster name: a letter, then up to 19 letters or digits, all lower case"
        )
    return name


def check_nodes(nodes: int) -> int:
    """How many nodes a cluster may have."""
    if not 1 <= nodes <= MAX_NODES:
        raise BadRequest(f"{nodes} nodes: from 1 to {MAX_NODES} work")
    return nodes


def node_number(name: str) -> int:
    """3 for `node-3`."""
    found = re.fullmatch(r"node-([1-9][0-9]?)", name)
    if not found or int(found[1]) > MAX_NODES:
        raise BadRequest(f"{name!r} is no node: they are called node-1, node-2, …")
    return int(found[1])
