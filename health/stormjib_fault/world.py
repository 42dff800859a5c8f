"""Where a fault is injected: the ranks, and as much of what surrounds them as may be touched."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from stormjib_fault import proc
from stormjib_fault.words import Refused

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping

CONTROL = "STORMJIB_FAULT_DIR"
"""Environment name: folder of the control files that a script obeys (`stormjib_fault.rank`)."""
_RANK = re.compile(r"rank(\d+)")


@dataclass(frozen=True)
class Place:
    """One rank and where it runs."""

    rank: int
    pid: int
    slot: int = 0
    netns: str = ""
    """Name of its node's network namespace, a laboratory's own; empty elsewhere."""
    address: str = ""
    port: str = ""
    """The switch's interface that its node hangs on."""


@dataclass(frozen=True)
class Traffic:
    """What a healthy step is like: from it a fault computes how hard it must press for a wanted slowdown."""

    step_s: float = 0.1
    bytes_per_step: int = 1 << 20
    """That one rank sends."""
    rounds: int = 8
    """Times in a step that data must cross one link before anybody can go on."""


@dataclass(frozen=True)
class Laboratory:
    """What a laboratory lets a fault do beyond processes: its own namespaces, and its own agents and coordinator."""

    prefix: str
    """Of everything that a fault makes: cgroups and files."""
    switch: str
    """Namespace of the switch."""
    agents: Mapping[int, int]
    """slot -> pid."""
    coordinator: int
    coordinator_address: str
    revive: Callable[[str, int], None]
    """(`agent` or `coordinator`, slot): start what a fault has killed."""


@dataclass(frozen=True)
class World:
    """Everything that a fault may know."""

    ranks: tuple[Place, ...]
    control: Path | None = None
    traffic: Traffic = field(default_factory=Traffic)
    laboratory: Laboratory | None = None

    def place(self, rank: int) -> Place:
        """Where a rank is. Raises Refused."""
        found = next((place for place in self.ranks if place.rank == rank), None)
        if found is None:
            here = ", ".join(str(place.rank) for place in self.ranks) or "none"
            raise Refused(f"rank {rank} does not run here; ranks here: {here}")
        return found

    def lab(self, fault: str) -> Laboratory:
        """The laboratory. Raises Refused where this is none."""
        if self.laboratory is None:
            raise Refused(
                f"{fault} touches network or agents, which exec in a pod may not; use the laboratory (bench/lab) for it"
            )
        return self.laboratory


def find_ranks(pids: Iterable[int]) -> dict[int, int]:
    """rank -> pid among these processes: by the name that our zygote gives, else by torchrun's environment."""
    found: dict[int, int] = {}
    for pid in sorted(pids):
        match = _RANK.fullmatch(proc.name(pid))
        number = match[1] if match else proc.environment(pid).get("RANK", "")
        if number.isdecimal() and proc.alive(pid):
            found.setdefault(int(number), pid)  # the lowest pid: data loaders inherit the environment
    return found


def here() -> World:
    """The world of one pod: every rank that this process can see. Raises Refused where there is none."""
    ranks = find_ranks(pid for pid in proc.pids() if pid != os.getpid())
    if not ranks:
        raise Refused("no rank runs here; run this by exec in the container `trainer` of a slot's pod")
    folder = os.environ.get(CONTROL, "")
    places = tuple(Place(rank, pid) for rank, pid in sorted(ranks.items()))
    return World(places, Path(folder) if folder else None)
