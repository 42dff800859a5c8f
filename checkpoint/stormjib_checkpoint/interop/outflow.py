"""Tensors of a committed step as a stream of bytes: proved, whole, row-major, and never more than a window of them in memory."""

from __future__ import annotations

from itertools import groupby
from operator import itemgetter
from typing import TYPE_CHECKING

from stormjib_checkpoint.boxes import slabs, whole
from stormjib_checkpoint.errors import ExportRefused
from stormjib_checkpoint.format import ITEM_BYTES
from stormjib_checkpoint.tensors import DTYPES, Held, empty, memory

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path

    from stormjib_checkpoint.boxes import Box
    from stormjib_checkpoint.index import IndexAtom
    from stormjib_checkpoint.reader import Checkpoint

WINDOW_BYTES = 64 * 1024 * 1024
"""Of tensors in memory at a time. A window proves whole pieces, so one that is smaller than a few of those reads them twice."""


def streams(
    checkpoint: Checkpoint, names: Sequence[str], window: int = WINDOW_BYTES
) -> Iterator[tuple[str, Iterator[memoryview]]]:
    """Each atom's bytes, in the order of `names`; take each stream to its end before the next. Raises DamagedCheckpoint, StorageError."""
    for name, parts in groupby(_parts(checkpoint, names, window), key=itemgetter(0)):
        yield name, (part for _, part in parts)


def _parts(checkpoint: Checkpoint, names: Sequence[str], window: int) -> Iterator[tuple[str, memoryview]]:
    batch: list[Held] = []
    size = 0
    for name in names:
        atom = checkpoint.atoms[name]
        for box in slabs(whole(atom.shape), max(1, window // ITEM_BYTES[atom.dtype])):
            more = box.volume * ITEM_BYTES[atom.dtype]
            if batch and size + more > window:
                yield from _filled(checkpoint, batch)
                batch, size = [], 0
            batch.append(_held(name, atom, box))
            size += more
    yield from _filled(checkpoint, batch)


def _filled(checkpoint: Checkpoint, batch: Sequence[Held]) -> Iterator[tuple[str, memoryview]]:
    checkpoint.fill_parts(batch)
    for held in batch:
        yield held.name, memory(held.local)


def _held(name: str, atom: IndexAtom, box: Box) -> Held:
    local = empty(box.shape, DTYPES[atom.dtype])
    return Held(name, atom.dtype, atom.shape, box, local, primary=True, copies=1)


def new_folder(folder: Path) -> None:
    """Make the folder to export into. Raises ExportRefused where something lies in it."""
    folder.mkdir(parents=True, exist_ok=True)
    if any(folder.iterdir()):
        raise ExportRefused(f"{folder} is not empty; name a new folder")
