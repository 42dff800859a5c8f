"""Opening a generation: finish what the parent left, choose the step to resume from, write it down for good."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from stormjib_checkpoint import layout
from stormjib_checkpoint.commit import finish, secured
from stormjib_checkpoint.doubts import doubt_of, trusted
from stormjib_checkpoint.errors import (
    DamagedCheckpoint,
    FormatError,
    MediumFailed,
    MissingCheckpoint,
    NoUsableCheckpoint,
)
from stormjib_checkpoint.format import GenerationFile, ResumePoint
from stormjib_checkpoint.history import (
    committed,
    generations,
    read_generation,
    refuse_superseded,
    steps,
    usable,
    write_generation,
)
from stormjib_checkpoint.layout import GenerationId

if TYPE_CHECKING:
    from collections.abc import Collection

    from stormjib_checkpoint.format import DoubtFile
    from stormjib_checkpoint.storage import Storage


class Opening(NamedTuple):
    """How a generation began. `notes` say what was passed over, and why."""

    generation: str
    resume: ResumePoint | None
    notes: tuple[str, ...]


def open_generation(
    storage: Storage, generation: str, job_uid: str, refused: Collection[str] = ()
) -> Opening:
    """Open `generation` on the storage and say where it resumes; None is a fresh start.

    Its parent is the highest generation found: only steps in that one's history exist, whoever wrote it (a job that
    was deleted and applied again goes on from its predecessor). `refused` are digests of manifests that ranks could
    not load. Raises GenerationExists, Superseded, NoUsableCheckpoint.
    """
    own = GenerationId.parse(generation)
    refuse_superseded(storage, own)
    known = [g for g in generations(storage) if g < own]
    parent = known[-1] if known else None
    resume, notes = _choose(storage, parent, refused) if parent is not None else (None, [])
    write_generation(storage, GenerationFile(own, parent, job_uid, resume))
    return Opening(generation, resume, tuple(notes))


def open_next(storage: Storage, job_uid: str = "", refused: Collection[str] = ()) -> Opening:
    """Open the generation after the highest one: for a script without a coordinator, in its rank 0 only."""
    known = generations(storage)
    number = known[-1].next() if known else GenerationId(0, 1)
    return open_generation(storage, str(number), job_uid, refused)


def _choose(
    storage: Storage, parent: GenerationId, refused: Collection[str]
) -> tuple[ResumePoint | None, list[str]]:
    notes = finish(storage, parent)
    inherited = read_generation(storage, parent).resume
    points = _with(inherited, committed(storage, parent))
    doubt = _doubt(storage, parent, notes)
    for point in usable(trusted(points, doubt), refused):
        try:
            return secured(storage, point), notes
        except (DamagedCheckpoint, MissingCheckpoint) as error:
            notes.append(f"step {point.step} of {point.generation} passed over: {error}")
    if points:
        raise NoUsableCheckpoint(
            f"{len(points)} committed steps, none of which can be loaded ({'; '.join(notes) or 'all refused'}). "
            "Restore one, or name an empty checkpoint folder to start anew."
        )
    for step in steps(storage):
        storage.names(
            layout.step_folder(step)
        )  # raises: what `saves` has passed over is no reason to start anew
    return None, notes


def _with(inherited: ResumePoint | None, points: list[ResumePoint]) -> list[ResumePoint]:
    """The parent's own resume point is known by name and digest, whatever a listing shows and its manifest says by now."""
    if inherited is None:
        return points
    return [inherited, *(point for point in points if point[:2] != inherited[:2])]


def _doubt(storage: Storage, parent: GenerationId, notes: list[str]) -> DoubtFile | None:
    """What the parent has said against itself. One that cannot be read doubts nothing, and is told."""
    try:
        doubt = doubt_of(storage, parent)
    except (FormatError, MediumFailed) as error:
        notes.append(f"passed over: {error}")
        return None
    if doubt is not None:
        notes.append(f"generation {parent} doubts what came after step {doubt.trusted}")
    return doubt
