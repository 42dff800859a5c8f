"""A rank's data file before it exists: which tensor lies where in it, on the storage and in the memory that it is staged in."""

from __future__ import annotations

from dataclasses import dataclass
from math import prod
from typing import TYPE_CHECKING

from stormjib_checkpoint.format import Atom, StoredBox
from stormjib_checkpoint.shardfile import Entry, header, in_file_order

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from stormjib_checkpoint.tensors import Held


@dataclass(frozen=True)
class Image:
    """The header of the file, then the bytes of each part in `parts`, one after the other, from `starts` on."""

    head: bytes
    parts: tuple[Held, ...]
    starts: tuple[int, ...]
    size: int
    """Bytes of the whole file."""
    atoms: dict[str, Atom]
    """All of which the rank holds anything, and what has no elements at all; boxes only of what is in the file."""
    ties: dict[str, str]
    """Other names of atoms, and the names of those."""


def image_of(held: Sequence[Held], rank: int, ties: Mapping[str, str]) -> Image:
    """The file of what `rank` holds: its primary copies, widest elements first. Pure. Raises UnsupportedState."""
    mine = {part.name: part for part in held if part.primary and part.box.volume}
    entries = in_file_order([Entry(part.name, part.dtype, part.box) for part in mine.values()])
    head, starts = header(entries)
    boxes = {
        entry.name: StoredBox(rank, entry.box.offset, entry.box.shape, start, start + entry.nbytes)
        for entry, start in zip(entries, starts, strict=True)
    }
    atoms = {
        part.name: Atom(part.dtype, part.shape, (boxes[part.name],) if part.name in boxes else ())
        for part in held
        if part.box.volume or not prod(part.shape)
    }
    size = starts[-1] + entries[-1].nbytes if entries else len(head)
    return Image(head, tuple(mine[entry.name] for entry in entries), tuple(starts), size, atoms, dict(ties))
