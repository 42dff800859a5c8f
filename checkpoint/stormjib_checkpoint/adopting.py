"""Finishing what ranks that have died had staged: from their node's memory to the storage, as they would have done.

Who dies cannot: the agent's child does it, after the last rank of the generation has ended and before the next one is opened. Where the
whole node has died, the child of the agent that keeps copies of its steps does.
"""

from __future__ import annotations

import mmap
import time
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, NamedTuple

from stormjib_checkpoint import layout
from stormjib_checkpoint.errors import (
    AlreadyThere,
    DamagedCheckpoint,
    Inconsistent,
    NotThere,
    UnknownGeneration,
)
from stormjib_checkpoint.history import committed_by, generations, read_generation
from stormjib_checkpoint.left import create_same
from stormjib_checkpoint.node_memory import staged
from stormjib_checkpoint.peers.lock import giver_lives
from stormjib_checkpoint.pieces import piece_digest
from stormjib_checkpoint.verify import flaw

if TYPE_CHECKING:
    from collections.abc import Iterable
    from pathlib import Path

    from stormjib_checkpoint.format import DataFile, RankFile
    from stormjib_checkpoint.layout import GenerationId
    from stormjib_checkpoint.node_memory import Staged
    from stormjib_checkpoint.storage import NewFile, Storage

_PAGE = 4096
GIVER_S = 5.0
"""How long a giver that lives is waited for: what it has staged it finishes itself."""
_LOOK_S = 0.05


class Adopted(NamedTuple):
    """(step, rank) of each part that is on the storage now and was not before; `notes` say what could not be used, and why."""

    parts: tuple[tuple[int, int], ...]
    notes: tuple[str, ...]


def adopt(storage: Storage, memory: Path) -> Adopted:
    """Leave on the storage what the slots below `memory` hold of the highest generation and the storage does not.

    No rank of the node may be alive. Raises StorageError.
    """
    return _finish(storage, staged(memory, storage.key))


def adopt_copies(storage: Storage, copies: Path) -> Adopted:
    """As `adopt`, of what is kept below `copies` for other nodes that do not do it themselves: dead, or GIVER_S late.

    Writing what its giver writes at the same moment would be of no harm, but of no use either. Raises StorageError.
    """
    parts: list[tuple[int, int]] = []
    notes: list[str] = []
    until = time.monotonic() + GIVER_S
    for giver in sorted(copies.glob("[0-9]*")):
        done = _finish(storage, _left_over(storage, giver, until))
        parts += done.parts
        notes += done.notes
    return Adopted(tuple(parts), tuple(notes))


def _left_over(storage: Storage, giver: Path, until: float) -> list[Staged]:
    """What is wanted of a giver's steps, once it is dead or nothing is, and at the latest `until`."""
    while True:
        lives = giver_lives(giver)
        wanted = [one for one in staged(giver, storage.key) if _is_wanted(storage, one.record)]
        if not (lives and wanted) or time.monotonic() >= until:
            return wanted
        time.sleep(_LOOK_S)


def _finish(storage: Storage, found: Iterable[Staged]) -> Adopted:
    parts: list[tuple[int, int]] = []
    notes: list[str] = []
    for one in sorted(found, key=lambda one: one.record.step):
        what = f"rank {one.record.rank} of step {one.record.step}"
        try:
            if not _is_wanted(storage, one.record):
                continue
            _leave(storage, one)
        except (DamagedCheckpoint, Inconsistent) as error:
            notes.append(f"{what} is lost with its rank: {error}")
        else:
            parts.append((one.record.step, one.record.rank))
    return Adopted(tuple(parts), tuple(notes))


def _is_wanted(storage: Storage, record: RankFile) -> bool:
    """Of the generation that lives, newer than all it has committed, and not there yet."""
    if generations(storage)[-1:] != [record.generation]:
        return False
    if record.step <= _reached(storage, record.generation):
        return False
    path = f"{layout.folder(record.step, record.generation)}/{layout.rank_json(record.rank)}"
    try:
        with storage.open(path):
            return False
    except NotThere:
        return True


def _reached(storage: Storage, generation: GenerationId) -> int:
    """The newest step that needs no finishing."""
    try:
        resume = read_generation(storage, generation).resume
    except UnknownGeneration:
        resume = None
    return max([-1 if resume is None else resume.step, *committed_by(storage, generation)])


def _leave(storage: Storage, one: Staged) -> None:
    record = one.record
    place = layout.folder(record.step, record.generation)
    path = f"{place}/{layout.rank_data(record.rank)}"
    try:
        _write(storage, path, one)
    except AlreadyThere as error:  # the rank has died between its data and its record
        problem = flaw(storage, path, record.data)
        if problem is not None:
            raise Inconsistent(f"{path} is there, and is another: {problem}") from error
    if one.records.train is not None:
        create_same(storage, f"{place}/{layout.TRAIN}", one.records.train)
    create_same(storage, f"{place}/{layout.rank_json(record.rank)}", one.records.rank)


def _write(storage: Storage, path: str, one: Staged) -> None:
    """As the ranks would have: by as many threads as keep the storage busy, which take turns through the pieces."""
    data = one.record.data
    with (
        open(one.slot.data, "rb") as file,
        mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ) as held,
        memoryview(held) as view,
        storage.new(path, data.bytes) as new,
        ThreadPoolExecutor(storage.writers, "stormjib-adopt") as pool,
    ):
        numbers = deque(range(len(data.pieces)))
        for done in [pool.submit(_write_some, new, view, numbers, data) for _ in range(storage.writers)]:
            done.result()


def _write_some(new: NewFile, view: memoryview, numbers: deque[int], data: DataFile) -> None:
    """Pieces until none is left; none that another thread's failure makes useless."""
    while True:
        try:
            number = numbers.popleft()
        except IndexError:
            return
        start = number * data.piece_bytes
        try:
            with _proved(view, start, number, data) as piece:
                new.write(start, piece)
        except BaseException:
            numbers.clear()
            raise


def _proved(view: memoryview, start: int, number: int, data: DataFile) -> memoryview:
    """A piece of the file, filled up to the alignment of the disk. Raises DamagedCheckpoint where it is not what was staged."""
    end = min(start + data.piece_bytes, data.bytes)
    with view[start:end] as piece:
        if len(piece) != end - start or piece_digest(piece) != data.pieces[number]:
            raise DamagedCheckpoint(f"bytes {start} to {end} in memory are not those that were staged")
    return view[start : -(-end // _PAGE) * _PAGE]
