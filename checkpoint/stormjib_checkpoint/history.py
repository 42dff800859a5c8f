"""Which generations were, which of their steps exist, and how a new generation is opened.

The rule (FORMAT.md §3): a generation's history is its own committed steps, then those of the generation that it
resumed from up to the resume point, and so on. Only steps in the history of the highest generation exist; what a
zombie of an older generation goes on committing is in nobody's history.
"""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, NamedTuple, TypeVar

from stormjib_checkpoint import layout
from stormjib_checkpoint.errors import (
    AlreadyThere,
    DamagedCheckpoint,
    FormatError,
    GenerationExists,
    MediumFailed,
    MissingCheckpoint,
    NotThere,
    Superseded,
    UnknownGeneration,
)
from stormjib_checkpoint.format import MAX_SMALL_FILE, GenerationFile, ResumePoint
from stormjib_checkpoint.hints import hinted
from stormjib_checkpoint.layout import GenerationId
from stormjib_checkpoint.records import decode, encode, sha256

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence

    from stormjib_checkpoint.storage import Storage

T = TypeVar("T")


class Span(NamedTuple):
    """The steps that one generation gives to a history: above `above`, up to `upto` (None: no end)."""

    generation: GenerationId
    above: int
    upto: int | None

    def holds(self, step: int) -> bool:
        return step > self.above and (self.upto is None or step <= self.upto)


def spans(records: Mapping[GenerationId, GenerationFile], head: GenerationId) -> list[Span]:
    """The history of `head`, newest part first. Pure. Raises DamagedCheckpoint where a record is missing."""
    found: list[Span] = []
    generation, upto = head, None
    while True:
        record = records.get(generation)
        if record is None:
            path = layout.generation_file(generation)
            raise DamagedCheckpoint(
                f"{path} is missing, and {head} descends from it. Restore it from a backup."
            )
        above = record.resume.step if record.resume is not None else -1
        found.append(Span(generation, above, upto))
        if record.resume is None:
            return found
        generation, upto = GenerationId.parse(record.resume.generation), record.resume.step


def generations(storage: Storage) -> list[GenerationId]:
    """All generations that were opened on this storage, lowest first. A listing may lag, so those after the highest are asked for by
    name, as far as their numbers follow each other."""
    names = storage.names(layout.GENERATIONS)
    ids = (layout.parse_generation(name) for name in names if name.endswith(".json"))
    found = sorted(generation for generation in ids if generation is not None)
    highest = found[-1] if found else GenerationId(0, 0)
    while (after := _opened_after(storage, highest)) is not None:
        found.append(after)
        highest = after
    return found


def _opened_after(storage: Storage, generation: GenerationId) -> GenerationId | None:
    for candidate in (GenerationId(generation.incarnation + 1, 1), generation.next()):
        with contextlib.suppress(NotThere), storage.open(layout.generation_file(candidate)):
            return candidate
    return None


def highest(storage: Storage) -> GenerationFile | None:
    """The record of the highest generation; None on a fresh storage."""
    known = generations(storage)
    return read_generation(storage, known[-1]) if known else None


def read_generation(storage: Storage, generation: GenerationId) -> GenerationFile:
    """One generation's record. Raises UnknownGeneration, DamagedCheckpoint."""
    path = layout.generation_file(generation)
    try:
        record = decode(GenerationFile, storage.read(path, MAX_SMALL_FILE), path, storage.key)
    except NotThere as error:
        raise UnknownGeneration(f"generation {generation} was never opened: {path} is not there") from error
    except FormatError as error:
        raise DamagedCheckpoint(f"{error}. Restore {path} from a backup.") from error
    if record.generation != generation:
        raise DamagedCheckpoint(f"{path} is the record of {record.generation}. Restore it from a backup.")
    return record


def history(storage: Storage, head: GenerationId) -> list[Span]:
    """The spans of `head`'s history, newest first, reading only the records that it descends from."""
    records: dict[GenerationId, GenerationFile] = {}
    generation: GenerationId | None = head
    while generation is not None and generation not in records:
        try:
            records[generation] = read_generation(storage, generation)
        except UnknownGeneration:
            break
        resume = records[generation].resume
        generation = GenerationId.parse(resume.generation) if resume is not None else None
    return spans(records, head)


def saves(storage: Storage) -> Iterator[tuple[int, GenerationId]]:
    """Every (step, generation) that left a folder, committed or not, lowest first. Of a folder that the medium does not give back, none:
    one bad block shall not end a job that has other steps."""
    for step in steps(storage):
        with contextlib.suppress(MediumFailed):
            found = (layout.parse_generation(name) for name in storage.names(layout.step_folder(step)))
            known = sorted(generation for generation in found if generation is not None)
            yield from ((step, generation) for generation in known)


def steps(storage: Storage) -> list[int]:
    """Every step that has a folder, lowest first."""
    found = (layout.parse_step(name) for name in storage.names(""))
    return sorted(step for step in found if step is not None)


def committed(storage: Storage, head: GenerationId | None = None) -> list[ResumePoint]:
    """The committed steps in the history of `head` (default: the highest generation), newest first."""
    if head is None:
        known = generations(storage)
        if not known:
            return []
        head = known[-1]
    return committed_of(storage, head, saves(storage))


def committed_of(
    storage: Storage, head: GenerationId, among: Iterable[tuple[int, GenerationId]]
) -> list[ResumePoint]:
    """As `committed`, of these saves and of those that are known by name: for whoever must not list them twice, because two listings may
    contradict each other."""
    parts = history(storage, head)
    points = [
        manifest_point(storage, step, generation)
        for step, generation in {*among, *_by_name(storage, parts)}
        if any(part.generation == generation and part.holds(step) for part in parts)
    ]
    return sorted((point for point in points if point is not None), reverse=True)


def _by_name(storage: Storage, parts: Sequence[Span]) -> Iterator[tuple[int, GenerationId]]:
    """What needs no listing to be found: the steps in the hints of the newest two parts of a history, and what the newest resumed from."""
    for part in parts[:2]:
        yield from ((step, part.generation) for step in hinted(storage, part.generation))
        if part.upto is not None:
            yield part.upto, part.generation


def manifest_point(storage: Storage, step: int, generation: GenerationId) -> ResumePoint | None:
    """The resume point of one generation's save of one step; None where it is not committed. Where its manifest cannot be read it has
    no digest, and whoever tries to prove it finds the damage."""
    try:
        data = storage.read(layout.manifest(step, generation), MAX_SMALL_FILE)
    except NotThere:
        return None
    except MediumFailed:
        return ResumePoint(step, str(generation), "")
    return ResumePoint(step, str(generation), sha256(data))


def newest(storage: Storage) -> ResumePoint | None:
    """The newest committed step in the history of the highest generation."""
    found = committed(storage)
    return found[0] if found else None


def at_newest(storage: Storage, use: Callable[[ResumePoint], T]) -> T:
    """`use` the newest committed step; where retention takes it away meanwhile (`use` raises MissingCheckpoint), start over at the newest
    there is then. For readers outside the job, whose steps nobody keeps for them. Raises MissingCheckpoint where there is none."""
    seen: ResumePoint | None = None
    while (point := newest(storage)) is not None:
        try:
            return use(point)
        except MissingCheckpoint:
            if point == seen:
                raise
            seen = point
    raise MissingCheckpoint("no step is committed in this history")


def write_generation(storage: Storage, record: GenerationFile) -> None:
    """Open a generation for good. Raises GenerationExists, Superseded."""
    refuse_superseded(storage, record.generation)
    try:
        storage.create(layout.generation_file(record.generation), [encode(record, storage.key)])
    except AlreadyThere as error:
        raise GenerationExists(
            f"generation {record.generation} was opened before on this storage; take the next number"
        ) from error
    # Another opener may have come between the look and the write: the lower one of the two gives way.
    refuse_superseded(storage, record.generation)


def refuse_superseded(storage: Storage, generation: GenerationId) -> None:
    """Raise Superseded where a higher generation exists."""
    known = generations(storage)
    if known and known[-1] > generation:
        raise Superseded(
            f"generation {known[-1]} exists on this storage; {generation} must stop and delete nothing"
        )


def usable(points: Collection[ResumePoint], refused: Collection[str]) -> list[ResumePoint]:
    """The points that nobody has refused to load, order kept."""
    return [point for point in points if point.digest not in refused]


def committed_by(storage: Storage, generation: GenerationId) -> set[int]:
    """The steps that one generation has committed itself and that are not deleted."""
    listed = {step for step, owner in saves(storage) if owner == generation}
    own = listed | {*hinted(storage, generation)}
    return {step for step in own if manifest_point(storage, step, generation) is not None}
