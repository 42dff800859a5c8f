"""What a generation says against its own newest steps, so that the next one resumes before them (FORMAT.md §3.7)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from stormjib_checkpoint import layout
from stormjib_checkpoint.errors import AlreadyThere, NotThere
from stormjib_checkpoint.format import MAX_SMALL_FILE, DoubtFile
from stormjib_checkpoint.history import generations
from stormjib_checkpoint.records import decode, encode

if TYPE_CHECKING:
    from collections.abc import Iterable

    from stormjib_checkpoint.format import ResumePoint
    from stormjib_checkpoint.layout import GenerationId
    from stormjib_checkpoint.storage import Storage


def write_doubt(storage: Storage, doubt: DoubtFile) -> None:
    """Leave it for good; a generation has one, since it ends with it. Raises StorageError."""
    try:
        storage.create(layout.doubt_file(doubt.generation), [encode(doubt, storage.key)])
    except AlreadyThere:
        return  # the first word of a generation stands


def doubt_of(storage: Storage, generation: GenerationId) -> DoubtFile | None:
    """What `generation` has said against itself; None is nothing. Raises FormatError, StorageError."""
    path = layout.doubt_file(generation)
    try:
        return decode(DoubtFile, storage.read(path, MAX_SMALL_FILE), path, storage.key)
    except NotThere:
        return None


def doubt_above(storage: Storage, step: int) -> DoubtFile | None:
    """The newest doubt about a step after `step`, which whoever resumes from `step` does again; None where there is
    none. Raises FormatError, StorageError."""
    if not storage.names(layout.DOUBTS):
        return None
    found = (doubt_of(storage, generation) for generation in reversed(generations(storage)))
    return next((doubt for doubt in found if doubt is not None and doubt.step > step), None)


def trusted(points: Iterable[ResumePoint], doubt: DoubtFile | None) -> list[ResumePoint]:
    """The points to resume from, best first: those that are not in doubt, newest first; and behind them the others,
    oldest first, because a step in doubt is better than none."""
    ordered = sorted(points, reverse=True)
    if doubt is None:
        return ordered
    good = [point for point in ordered if point.step <= doubt.trusted]
    return good + [point for point in reversed(ordered) if point.step > doubt.trusted]
