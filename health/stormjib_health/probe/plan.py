"""Which calls of a step are looked at more closely. Pure; and a matter of counts alone, so that all ranks of a group choose alike."""

from __future__ import annotations

from typing import TYPE_CHECKING

from stormjib_health.wire import Kind

if TYPE_CHECKING:
    from collections.abc import Sequence

READ_EVERY = 32
"""Steps from one whose calls are all read to the next."""
MAX_READ = 1024
"""Positions of a step that are read: a script without steps has one that never ends."""
MAX_COUNTS = 64
TIMED = (Kind.ALL_REDUCE, Kind.ALL_GATHER)
"""Calls that have a future, and in which every rank waits for the last."""


class Plan:
    """Which positions of a group's step are read, and which are timed: the same on all its ranks."""

    def __init__(self) -> None:
        self._counts: set[int] = set()
        self._most = 0
        self._whole = True
        """The step in progress is read from its first call on."""
        self._found: list[int] = []
        self._suited: list[int] = []

    def saw(self, position: int, kind: int) -> None:
        """The call at a position that is read."""
        if self._whole and kind in TIMED:
            self._found.append(position)

    def next(self, calls: int, step: int) -> tuple[int, frozenset[int]]:
        """After a step of so many calls: from which position on the next one is read, and which are timed."""
        if self._whole and calls:
            self._suited, self._found = self._found, []
        new = calls > 0 and calls not in self._counts and len(self._counts) < MAX_COUNTS
        if new:
            self._counts.add(calls)
            self._most = max(self._most, calls)
        self._whole = new or step % READ_EVERY == 0
        return (0 if self._whole else self._most), timed(self._suited, step)


def timed(suited: Sequence[int], step: int) -> frozenset[int]:
    """Of the positions that have an end: the first and the last, and one after the other of those between."""
    if len(suited) <= 2:
        return frozenset(suited)
    between = suited[1:-1]
    return frozenset((suited[0], between[step % len(between)], suited[-1]))
