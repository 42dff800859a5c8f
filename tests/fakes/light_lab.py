"""A laboratory without torch: the real namespaces, light ranks in a ring, processes that stand for agents. Quick to start."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from contextlib import contextmanager
from typing import TYPE_CHECKING

from bench.lab import cleaning
from bench.lab.network import COORDINATOR_ADDRESS, PREFIX, Network, namespaces
from fakes.agents import SCRIPTS
from stormjib_fault.rank import Control
from stormjib_fault.world import Laboratory, Place, Traffic, World

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from bench.lab.calls import Watcher
    from bench.lab.lab import Plan
    from stormjib_runtime.wire import JobState

SCRIPT = SCRIPTS / "light_rank.py"
NODES = 3
TALKS = [
    sys.executable,
    "-c",
    f"""
import socket, time
line = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
while True:
    try:
        line.sendto(b"report", ("{COORDINATOR_ADDRESS}", 7070))
    except OSError:
        pass  # cut, or nobody listens
    time.sleep(0.05)
""",
]
"""Stands for an agent: it says something to the coordinator."""


def until(holds: Callable[[], object], limit_s: float = 10.0) -> None:
    deadline = time.monotonic() + limit_s
    while not holds():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.01)


class Ring:
    """Ranks of one life; agents and coordinator are processes that only exist."""

    def __init__(self, network: Network, folder: Path) -> None:
        self.network, self.folder = network, folder
        self.revived: list[tuple[str, int]] = []
        self.agents = {slot: self._start(network.node(slot), TALKS) for slot in range(NODES)}
        self.coordinator = self._start(network.coordinator, TALKS)
        self.ranks: list[subprocess.Popen[bytes]] = []

    def start_ranks(self) -> None:
        for rank in range(NODES):
            own, following = Network.address(rank), Network.address((rank + 1) % NODES)
            argv = [sys.executable, str(SCRIPT), str(self.folder), own, following]
            self.ranks.append(self._start(self.network.node(rank), argv, RANK=str(rank)))
        self.wait_steps(3)

    def _start(self, netns: str, argv: list[str], **env: str) -> subprocess.Popen[bytes]:
        with open(self.folder / "log", "ab") as log:
            command = ["nsenter", f"--net=/run/netns/{netns}", *argv]
            return subprocess.Popen(command, env={**os.environ, **env}, stdout=log, stderr=log)

    def steps(self) -> int:
        """Of the slowest rank."""
        paths = [self.folder / f"step-{rank}" for rank in range(NODES)]
        return min((int(path.read_text() or 0) if path.exists() else 0) for path in paths)

    def wait_steps(self, more: int) -> None:
        wanted = self.steps() + more
        until(lambda: self.steps() >= wanted)

    def world(self, step_s: float = 0.02) -> World:
        places = tuple(
            Place(rank, one.pid, rank, self.network.node(rank), Network.address(rank), Network.port(rank))
            for rank, one in enumerate(self.ranks)
        )
        agents = {slot: agent.pid for slot, agent in self.agents.items()}
        lab = Laboratory(
            self.network.name,
            self.network.switch,
            agents,
            self.coordinator.pid,
            COORDINATOR_ADDRESS,
            lambda what, slot: self.revived.append((what, slot)),
        )
        return World(places, self.folder, Traffic(step_s, 32 << 10, 1), lab)

    def close(self) -> None:
        for one in (*self.ranks, *self.agents.values(), self.coordinator):
            one.kill()
            one.wait()


class LightLab(Ring):
    """A ring as a laboratory of trials: each has a fresh life of the ranks. What a coordinator says is somebody else's."""

    def __init__(self, network: Network, folder: Path, watcher: Watcher) -> None:
        super().__init__(network, folder)
        self.watcher = watcher
        self.control = Control(folder)

    def give_plan(self, plan: Plan) -> None:
        """Light ranks have one plan only."""

    def fresh(self, before: Callable[[], None] = lambda: None) -> JobState:
        for one in self.ranks:
            one.kill()
            one.wait()
        self.ranks.clear()
        self.control.clear()
        for path in self.folder.glob("step-*"):
            path.unlink()
        before()
        self.start_ranks()
        return self.watcher.until(lambda state: True, 10)


@contextmanager
def light_network() -> Iterator[Network]:
    """Nodes, a coordinator's namespace and a switch, held like a laboratory's."""
    one = Network(f"{PREFIX}t{os.getpid()}", NODES)
    folder = cleaning.root() / one.name
    folder.mkdir()
    held = cleaning.lock(folder)
    assert held is not None
    one.create()
    yield one
    cleaning.remove(one.name)
    os.close(held)
    assert namespaces(one.name) == []


@contextmanager
def ring_in(network: Network, folder: Path) -> Iterator[Ring]:
    ring = Ring(network, folder)
    try:
        yield ring
    finally:
        ring.close()
        print((folder / "log").read_text()[-1000:])
