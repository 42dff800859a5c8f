"""Which rank holds a connection: whoever has its inode among the descriptors of its process tree."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING

from stormjib_health.sampler.proc import below, children, open_sockets

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from stormjib_health.sampler.sockets import Socket

MAX_LOOKS = 2
"""A connection that no rank holds after so many looks is somebody else's. The first is at the ranks' own processes, where
groups live; the second at their whole trees too, which takes a walk through all of /proc."""


class Owners:
    """Remembers what it has found: looking costs a walk through /proc, so only inodes not seen before are looked up."""

    def __init__(self) -> None:
        self._ranks: dict[int, int] = {}
        self._looks: Counter[int] = Counter()

    def assign(self, sockets: Iterable[Socket], pids: Mapping[int, int]) -> list[tuple[int, Socket]]:
        """(rank, connection) of every connection that a rank holds. `sockets` are all that there are, `pids` the rank's
        processes by rank."""
        there = {one.inode: one for one in sockets}
        self._ranks = {inode: rank for inode, rank in self._ranks.items() if inode in there}
        self._looks = Counter({inode: looks for inode, looks in self._looks.items() if inode in there})
        new = {inode for inode in there if inode not in self._ranks and self._looks[inode] < MAX_LOOKS}
        if new:
            self._look_up(new, {rank: [pid] for rank, pid in pids.items()})
        again = {inode for inode in new if self._looks[inode] == MAX_LOOKS}
        if again:
            family = children()
            self._look_up(
                again, {rank: [one.pid for one in below(pid, family)] for rank, pid in pids.items()}
            )
        return [(self._ranks[inode], one) for inode, one in there.items() if inode in self._ranks]

    def _look_up(self, new: set[int], pids: Mapping[int, Iterable[int]]) -> None:
        """Look for these in the processes of each rank; those that are found leave the set."""
        for rank, processes in pids.items():
            for pid in processes:
                held = new & open_sockets(pid)
                self._ranks.update((inode, rank) for inode in held)
                new -= held
        self._looks.update(new)
