"""Which saves to delete (pure), and deleting them so that a crash never leaves half a committed step.

Never deleted: the step that the current generation resumed from, the last `keep_last` (at least two) committed steps
of its history, what may still become a commit, and the ledger. Nothing at all once a higher generation exists.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from stormjib_checkpoint import layout
from stormjib_checkpoint.errors import Superseded
from stormjib_checkpoint.history import (
    committed_of,
    read_generation,
    refuse_superseded,
    saves,
)
from stormjib_checkpoint.layout import GenerationId

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from stormjib_checkpoint.format import GenerationFile
    from stormjib_checkpoint.storage import Storage

KEEP_AT_LEAST = 2
"""One good step is no fall-back."""


@dataclass(frozen=True)
class Save:
    """One generation's folder of one step."""

    step: int
    generation: GenerationId


def plan(every: Iterable[Save], good: Iterable[Save], record: GenerationFile, keep_last: int) -> list[Save]:
    """The saves to delete, oldest first. `good`: committed in the history of `record`'s generation. Pure."""
    newest_first = sorted(good, key=lambda save: save.step, reverse=True)
    own = [save.step for save in newest_first if save.generation == record.generation]
    if not own:
        return []  # until it has committed a step itself, a new generation judges nobody's files
    keep = set(newest_first[: max(keep_last, KEEP_AT_LEAST)])
    if record.resume is not None:
        keep.add(Save(record.resume.step, GenerationId.parse(record.resume.generation)))
    return [
        save
        for save in sorted(every, key=lambda save: (save.step, save.generation))
        if save not in keep
        and save.generation <= record.generation
        and not (save.generation == record.generation and save.step > own[0])
    ]


def retain(
    storage: Storage,
    generation: str,
    keep_last: int,
    along: Callable[[list[Save]], Iterable[Save]] = iter,
) -> list[str]:
    """Delete what `plan` says, one save after the other; the folders deleted. Deletes nothing where superseded. `along` gets the saves and
    gives them back one by one: for a progress bar."""
    own = GenerationId.parse(generation)
    deleted: list[str] = []
    for save in along(_planned(storage, own, keep_last)):
        try:
            refuse_superseded(storage, own)
        except Superseded:
            break
        delete(storage, save)
        deleted.append(layout.folder(save.step, save.generation))
    return deleted


def doomed(storage: Storage, generation: str, keep_last: int) -> list[str]:
    """The folders that `retain` would delete."""
    found = _planned(storage, GenerationId.parse(generation), keep_last)
    return [layout.folder(save.step, save.generation) for save in found]


def _planned(storage: Storage, own: GenerationId, keep_last: int) -> list[Save]:
    every = [Save(*save) for save in saves(storage)]
    points = committed_of(storage, own, ((save.step, save.generation) for save in every))
    good = [Save(point.step, GenerationId.parse(point.generation)) for point in points]
    return plan(every, good, read_generation(storage, own), keep_last)


def delete(storage: Storage, save: Save) -> None:
    """Delete one save: its manifest first and durably, so that it is never a committed step with parts missing. Whatever a listing
    says, which may not show it."""
    folder = layout.folder(save.step, save.generation)
    storage.remove(folder, [layout.MANIFEST])
    storage.remove(folder, storage.names(folder))
    storage.remove_folder(folder)
    storage.remove_folder(layout.step_folder(save.step))
