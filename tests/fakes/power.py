"""What a power cut may leave of the calls that a `Disk` has written down."""

from __future__ import annotations

import random
from itertools import combinations
from typing import TYPE_CHECKING

from fakes.disk import SECTOR, Change, Disk, Entry, Synced, Tree, Wrote

if TYPE_CHECKING:
    from collections.abc import Collection, Iterator, Sequence

TORN = 2
"""Random patterns of sectors that reached the disk, beside all and none."""


class Cutting:
    """A log, entry after entry: what lasts of it, and the changes that no sync has covered yet."""

    def __init__(self, tree: Tree | None = None) -> None:
        self._lasting = tree.copy() if tree is not None else Tree()
        self._pending: list[Change] = []

    def go(self, entry: Entry) -> None:
        """One call more has ended."""
        if not isinstance(entry, Synced):
            self._pending.append(entry)
            return
        for change in self._pending:
            if change.node == entry.node:
                self._lasting.apply(change)
        self._pending = [change for change in self._pending if change.node != entry.node]

    def least(self) -> Tree:
        """What is left where nothing reached the disk before its sync."""
        return self._left(self._pending)

    def states(self) -> Iterator[Tree]:
        """All that a cut at this moment may leave: of the changes that no sync covers, none is lost, each one, each two, all; of
        the bytes among the others every sector reached the disk, or some did."""
        for lost in _losses(len(self._pending)):
            dropped = [self._pending[index] for index in lost]
            yield self._left(dropped)
            if any(isinstance(change, Wrote) for change in self._pending):
                for seed in range(TORN):
                    yield self._left(dropped, random.Random(seed))

    def _left(self, dropped: Collection[Change], chance: random.Random | None = None) -> Tree:
        tree = self._lasting.copy()
        for change in self._pending:
            if any(change is one for one in dropped):
                continue
            for part in _torn(change, chance):
                tree.apply(part)
        return tree


def _losses(count: int) -> list[Sequence[int]]:
    few: list[Sequence[int]] = [lost for size in (0, 1, 2) for lost in combinations(range(count), size)]
    return few if count <= 2 else [*few, range(count)]


def _torn(change: Change, chance: random.Random | None) -> Iterator[Change]:
    if chance is None or not isinstance(change, Wrote):
        yield change
        return
    first = change.offset // SECTOR
    last = (change.offset + len(change.data)) // SECTOR
    for sector in range(first, last + 1):
        start = max(0, sector * SECTOR - change.offset)
        end = (sector + 1) * SECTOR - change.offset
        if change.data[start:end] and chance.random() < 0.5:
            yield Wrote(change.node, change.offset + start, change.data[start:end])


def live(log: Sequence[Entry]) -> Disk:
    """The disk as a process finds it after these calls, before any power cut; it goes on with the same log."""
    tree = Tree()
    for entry in log:
        if not isinstance(entry, Synced):
            tree.apply(entry)
    return Disk(tree, list(log))
