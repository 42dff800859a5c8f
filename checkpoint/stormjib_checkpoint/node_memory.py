"""The newest steps of a node's ranks in its memory: files on a memory-backed volume, which outlive ranks and their container.

    MEMORY/<local rank>/<slot>/data         the rank's data file as it will lie on the storage, filled up to whole pages
                               record.json  its record: there only while the data is whole
                               train.json   rank 0's

Two slots per rank. A step on its way to the storage keeps its slot until it is there. One that is only staged makes room for the next, if
all ranks have staged it. So of every rank the newest step that all have is here or there, whole, at any moment.
That a record is there proves nothing. Whoever uses a slot compares its pieces with the hashes in it.
"""

from __future__ import annotations

import contextlib
import os
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

from stormjib_checkpoint import layout
from stormjib_checkpoint.errors import FormatError
from stormjib_checkpoint.format import RankFile
from stormjib_checkpoint.left import Records
from stormjib_checkpoint.records import decode
from stormjib_checkpoint.storage import Local

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from stormjib_checkpoint.storage import Opened

SLOTS = 2
Stamp = tuple[int, int]
"""Changes whenever a slot is told."""
_DATA, _RECORD, _TRAIN = "data", "record.json", "train.json"


@dataclass(frozen=True)
class Slot:
    """Room for one step of one rank."""

    folder: Path

    @property
    def data(self) -> Path:
        """The file that the step lies in."""
        return self.folder / _DATA

    def clear(self) -> None:
        """What is in it is no step any longer: to be called before its data changes."""
        for name in (_RECORD, _TRAIN):
            (self.folder / name).unlink(missing_ok=True)

    def tell(self, records: Records) -> None:
        """Its data is whole, and this is what it is."""
        if records.train is not None:
            (self.folder / _TRAIN).write_bytes(records.train)
        fresh = self.folder / f".{_RECORD}"
        fresh.write_bytes(records.rank)
        os.replace(fresh, self.folder / _RECORD)


class Staged(NamedTuple):
    """One rank's part of a step, as its slot says."""

    slot: Slot
    record: RankFile
    records: Records


def slots_of(memory: Path, local_rank: int) -> list[Slot]:
    """The slots of one rank of the node, made where they are not there."""
    slots = [Slot(memory / str(local_rank) / str(number)) for number in range(SLOTS)]
    for slot in slots:
        slot.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    return slots


def holds(slot: Slot, record: bytes) -> bool:
    """Whether a slot says that it holds the very step of this record."""
    try:
        return (slot.folder / _RECORD).read_bytes() == record
    except FileNotFoundError:
        return False


def stamps(memory: Path) -> dict[Slot, Stamp]:
    """When each slot of a node was last told what it holds: cheap, to see what is new."""
    found = {}
    for record in memory.glob(f"[0-9]*/[0-9]*/{_RECORD}"):
        with contextlib.suppress(FileNotFoundError):
            stat = record.stat()
            found[Slot(record.parent)] = (stat.st_ino, stat.st_mtime_ns)
    return found


def in_slot(slot: Slot, key: bytes | None = None) -> Staged | None:
    """What one slot says it holds; None where it says nothing, or nothing we understand."""
    with contextlib.suppress(FormatError, OSError):
        return _staged(slot, key)
    return None


def staged(memory: Path, key: bytes | None = None) -> Iterator[Staged]:
    """What the slots of a node say they hold. One that says nothing we understand, or that is not signed with our key, holds nothing."""
    for record in sorted(memory.glob(f"*/*/{_RECORD}")):
        one = in_slot(Slot(record.parent), key)
        if one is not None:
            yield one


def _staged(slot: Slot, key: bytes | None) -> Staged:
    rank = (slot.folder / _RECORD).read_bytes()
    record = decode(RankFile, rank, str(slot.folder / _RECORD), key)
    train = (slot.folder / _TRAIN).read_bytes() if record.rank == 0 else None
    return Staged(slot, record, Records(rank, train))


class Near:
    """Data files of the storage that are in this node's memory too."""

    def __init__(self, memory: Path, key: bytes | None = None) -> None:
        self._files = Local(memory)
        self._there = {
            f"{layout.folder(one.record.step, one.record.generation)}/{layout.rank_data(one.record.rank)}": str(
                one.slot.data.relative_to(memory)
            )
            for one in staged(memory, key)
        }

    def has(self, path: str) -> bool:
        """Whether a data file of the storage is here too."""
        return path in self._there

    def open(self, path: str) -> contextlib.AbstractContextManager[Opened]:
        """As the storage's `open`, of one that is here; it may be longer, by less than a page."""
        return self._files.open(self._there[path])
