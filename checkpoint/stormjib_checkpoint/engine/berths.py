"""Where steps are staged: one arena of this process, or two files of the node's memory, which outlive it."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, NamedTuple

from stormjib_checkpoint.engine.arena import Arena
from stormjib_checkpoint.errors import ArenaTooLarge
from stormjib_checkpoint.node_memory import slots_of
from stormjib_checkpoint.room import aligned

if TYPE_CHECKING:
    from pathlib import Path

    from stormjib_checkpoint.engine.saving import Save
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
        self._last: list[Save | None] = []
        """Of each berth the save that has taken it last."""

    @property
    def size(self) -> int:
        """Bytes of the largest file that can be staged."""
        return self._berths[0].arena.size if self._berths else 0

    @property
    def outlasts(self) -> bool:
        """Whether what is staged outlives this process."""
        return bool(self._slots)

    @property
    def has_room(self) -> bool:
        """Whether a save can be staged beside those that are on their way to the storage."""
        return not all(map(_is_under_way, self._last))

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
        self._last = [None] * len(self._berths)

    def touch(self) -> None:
        """Have every page now: the first save shall not be slower than the others."""
        for berth in self._berths:
            berth.arena.touch()

    def pin(self) -> None:
        """Have devices copy to it beside the processor."""
        for berth in self._berths:
            berth.arena.pin()

    def next(self, save: Save) -> Berth:
        """The berth of the next save: of those whose save is not on its way any more, the one that has not been used longest."""
        order = sorted(range(len(self._berths)), key=lambda number: _began(self._last[number]))
        free = (number for number in order if not _is_under_way(self._last[number]))
        number = next(free, order[0])
        self._last[number] = save
        return self._berths[number]

    def _drop_slots(self) -> None:
        for slot in self._slots:
            slot.clear()
            slot.data.unlink(missing_ok=True)
        self._slots = []


def _is_under_way(save: Save | None) -> bool:
    return save is not None and not save.upload_completion.done()


def _began(save: Save | None) -> float:
    return save.began if save is not None else 0.0


def _in(slot: Slot, size: int) -> Arena:
    """The arena of a slot. What is staged there stays whole where the size is the same."""
    if not (slot.data.exists() and slot.data.stat().st_size == aligned(size)):
        slot.clear()
    return Arena(size, slot.data)
