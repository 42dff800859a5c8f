"""A rank's data file before it exists: which tensor lies where in it, on the storage and in the memory that it is staged in."""

from __future__ import annotations

from dataclasses import dataclass, replace
from math import prod
from typing import TYPE_CHECKING

from stormjib_checkpoint.format import Atom, StoredBox, box_key
from stormjib_checkpoint.shardfile import Entry, header, in_file_order

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from stormjib_checkpoint.tensors import Held


@dataclass(frozen=True)
class Image:
    """The header of the file, then the bytes of each part in `parts`, one after the other, from `starts` on."""

    head: bytes
    parts: tuple[Held, ...]
    """By their keys in the file: the atom's name, and one of its own for each further box of the atom."""
    starts: tuple[int, ...]
    size: int
    """Bytes of the whole file."""
    atoms: dict[str, Atom]
    """All of which the rank holds anything, and what has no elements at all; boxes only of what is in the file."""
    ties: dict[str, str]
    """Other names of atoms, and the names of those."""


def image_of(held: Sequence[Held], rank: int, ties: Mapping[str, str]) -> Image:
    """The file of what `rank` holds: its primary copies, widest elements first. Pure. Raises UnsupportedState."""
    mine = _by_key(part for part in held if part.primary and part.box.volume)
    entries = in_file_order([Entry(key, part.dtype, part.box) for key, part in mine.items()])
    head, starts = header(entries)
    boxes = {
        entry.name: StoredBox(rank, entry.box.offset, entry.box.shape, start, start + entry.nbytes)
        for entry, start in zip(entries, starts, strict=True)
    }
    forms = {part.name: (part.dtype, part.shape) for part in held if part.box.volume or not prod(part.shape)}
    stored: dict[str, list[StoredBox]] = {name: [] for name in forms}
    for key, part in mine.items():  # in the order of their offsets
        stored[part.name].append(boxes[key])
    atoms = {name: Atom(*form, tuple(stored[name])) for name, form in forms.items()}
    size = starts[-1] + entries[-1].nbytes if entries else len(head)
    parts = tuple(replace(mine[entry.name], name=entry.name) for entry in entries)
    return Image(head, parts, tuple(starts), size, atoms, dict(ties))


def _by_key(parts: Iterable[Held]) -> dict[str, Held]:
    """Parts by their keys in the file; of one atom in the order of their offsets."""
    found: dict[str, Held] = {}
    count: dict[str, int] = {}
    for part in sorted(parts, key=lambda part: part.box):
        number = count.get(part.name, 0)
        found[box_key(part.name, number)] = part
        count[part.name] = number + 1
    return found
