"""Where steps are staged: one arena of this process, or in turn two files of the node's memory, which outlive it."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, NamedTuple

from stormjib_checkpoint.engine.arena import Arena
from stormjib_checkpoint.errors import ArenaTooLarge
from stormjib_checkpoint.node_memory import slots_of
from stormjib_checkpoint.room import aligned

if TYPE_CHECKING:
    from pathlib import Path

    from stormjib_checkpoint.node_memory import Slot

_log = logging.getLogger(__name__)


class Berth(NamedTuple):
    """Room for one staged step. Without a slot it dies with the process."""

    arena: Arena
    slot: Slot | None = None


class Berths:
    """All berths of a rank. Nothing is taken before `make`."""

    def __init__(self, memory: Path | None, local_rank: int) -> None:
        self._slots = slots_of(memory, local_rank) if memory is not None else []
        self._berths: list[Berth] = []
        self._turn = 0

    @property
    def size(self) -> int:
        """Bytes of the largest file that can be staged."""
        return self._berths[0].arena.size if self._berths else 0

    def make(self, size: int) -> None:
        """Have room for files of `size` bytes; nothing may be staged now. Raises ArenaTooLarge.

        Where the node's memory is too small, this process's own is taken, with a warning: training goes on, less protected.
        """
        self._berths = []  # before the larger ones: never both at a time
        try:
            self._berths = [Berth(_in(slot, size), slot) for slot in self._slots]
        except ArenaTooLarge as error:
            self._drop_slots()
            _log.warning("staged steps die with this process: %s", error)
        self._berths = self._berths or [Berth(Arena(size))]

    def touch(self) -> None:
        """Have every page now: the first save shall not be slower than the others."""
        for berth in self._berths:
            berth.arena.touch()

    def pin(self) -> None:
        """Have devices copy to it beside the processor."""
        for berth in self._berths:
            berth.arena.pin()

    def next(self) -> Berth:
        """The berth of the next save, which is the one that has not been used longest."""
        self._turn += 1
        return self._berths[self._turn % len(self._berths)]

    def _drop_slots(self) -> None:
        for slot in self._slots:
            slot.clear()
            slot.data.unlink(missing_ok=True)
        self._slots = []


def _in(slot: Slot, size: int) -> Arena:
    """The arena of a slot. What is staged there stays whole where the size is the same."""
    if not (slot.data.exists() and slot.data.stat().st_size == aligned(size)):
        slot.clear()
    return Arena(size, slot.data)
