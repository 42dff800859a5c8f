"""The laboratory's network: a namespace for each node, one for the coordinator, one for the switch between them.

Nothing is on the machine's own addresses: the only way in is `connect`, which makes a socket inside a namespace.
"""

from __future__ import annotations

import ctypes
import os
import socket
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from stormjib_fault import shell

if TYPE_CHECKING:
    from collections.abc import Iterator

PREFIX = "sjlab-"
NETNS = Path("/run/netns")
COORDINATOR_ADDRESS = "10.77.0.2"
_CLONE_NEWNET = 0x40000000


@dataclass(frozen=True)
class Network:
    """Names and addresses of one laboratory; `name` begins with PREFIX."""

    name: str
    nodes: int

    @property
    def switch(self) -> str:
        """Namespace of the switch."""
        return f"{self.name}-sw"

    @property
    def coordinator(self) -> str:
        """Namespace of the coordinator."""
        return f"{self.name}-co"

    def node(self, slot: int) -> str:
        """Namespace of a node."""
        return f"{self.name}-n{slot}"

    @staticmethod
    def address(slot: int) -> str:
        """Of a node's eth0."""
        return f"10.77.0.{10 + slot}"

    @staticmethod
    def port(slot: int) -> str:
        """The switch's interface that a node hangs on."""
        return f"node{slot}"

    def create(self) -> None:
        """Make it all."""
        shell.run("ip", "netns", "add", self.switch)
        shell.run("ip", "-n", self.switch, "link", "add", "bridge", "type", "bridge")
        shell.run("ip", "-n", self.switch, "link", "set", "bridge", "up")
        self._plug(self.coordinator, "coordinator", COORDINATOR_ADDRESS)
        for slot in range(self.nodes):
            self._plug(self.node(slot), self.port(slot), self.address(slot))

    def _plug(self, netns: str, port: str, address: str) -> None:
        peer = f"type veth peer name {port} netns {self.switch}".split()
        shell.run("ip", "netns", "add", netns)
        shell.run("ip", "link", "add", "eth0", "netns", netns, *peer)
        shell.run("ip", "-n", self.switch, "link", "set", port, "master", "bridge", "up")
        shell.run("ip", "-n", netns, "link", "set", "lo", "up")
        shell.run("ip", "-n", netns, "address", "add", f"{address}/24", "dev", "eth0")
        shell.run("ip", "-n", netns, "link", "set", "eth0", "up")


def namespaces(name: str) -> list[str]:
    """Network namespaces whose names begin with `name`."""
    return sorted(path.name for path in NETNS.glob(f"{name}*")) if NETNS.exists() else []


@contextmanager
def entered(netns: str) -> Iterator[None]:
    """This thread is in a namespace for a while. Sockets stay where they were made, so a moment is enough."""
    own = os.open("/proc/thread-self/ns/net", os.O_RDONLY | os.O_CLOEXEC)
    there = os.open(NETNS / netns, os.O_RDONLY | os.O_CLOEXEC)
    try:
        _setns(there)
        try:
            yield
        finally:
            _setns(own)
    finally:
        os.close(own)
        os.close(there)


def _setns(descriptor: int) -> None:
    """os.setns came with Python 3.12."""
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.setns(descriptor, _CLONE_NEWNET):
        number = ctypes.get_errno()
        raise OSError(number, f"setns: {os.strerror(number)}")


def connect(netns: str, address: str, port: int, timeout_s: float) -> socket.socket:
    """A connection made inside a namespace. Raises OSError."""
    with entered(netns):
        return socket.create_connection((address, port), timeout_s)
