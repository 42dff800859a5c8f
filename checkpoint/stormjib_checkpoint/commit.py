"""Committing a step: rank files in, `atoms.json`, ledger and `MANIFEST.json` out. No collective, no barrier.

Whoever commits needs nothing but the storage: the first member's checkpoint child, rank 0 of a plain script, the next
generation that finishes what its parent left, or a person. All write the same bytes, so any of them may repeat it.
"""

from __future__ import annotations

import time
from dataclasses import replace
from typing import TYPE_CHECKING

from stormjib_checkpoint import layout
from stormjib_checkpoint.errors import (
    FormatError,
    Incomplete,
    Inconsistent,
    MediumFailed,
    MissingCheckpoint,
    NotThere,
    StepPassed,
)
from stormjib_checkpoint.format import (
    MAX_SMALL_FILE,
    GenerationFile,
    Manifest,
    RankFile,
    ResumePoint,
    TrainFile,
)
from stormjib_checkpoint.hints import write_hint
from stormjib_checkpoint.history import committed_by, read_generation, saves
from stormjib_checkpoint.indexing import Indexing
from stormjib_checkpoint.layout import GenerationId
from stormjib_checkpoint.ledger import Samples, segment
from stormjib_checkpoint.left import create_same
from stormjib_checkpoint.records import decode, encode, sha256
from stormjib_checkpoint.step import CommittedStep

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    from stormjib_checkpoint.format import AtomsFile
    from stormjib_checkpoint.storage import Storage

WAIT_S = 60.0
"""How long a committer waits for the slowest rank before it gives the step up; training goes on meanwhile."""
POLL_S = 0.02


def commit_step(storage: Storage, generation: str, world: int, step: int) -> ResumePoint:
    """Commit a step that all ranks have left. Repeating it is harmless. Raises Incomplete, Inconsistent, StepPassed."""
    own = GenerationId.parse(generation)
    record = read_generation(storage, own)
    done = committed_by(storage, own)
    if step in done:
        point = secured(storage, ResumePoint(step, generation, sha256(_manifest(storage, step, own))))
        write_hint(storage, own, done)  # whoever has committed it may have died before
        return point
    before = _step_before(record, done, step)
    ranks, index, raw = _read_ranks(storage, step, own, world)
    files = raw | _write_index(storage, ranks, index, layout.folder(step, own))
    ledger = segment(_samples(storage, own, ranks, before), before, step)
    if ledger is not None:
        create_same(storage, layout.ledger_file(own, ledger[0].first, ledger[0].last), ledger[1])
    data = {layout.rank_data(r.rank): r.data.bytes for r in ranks}
    manifest = encode(
        Manifest(step, own, record.job_uid, world, files, data, ledger[0] if ledger is not None else None),
        storage.key,
    )
    create_same(storage, layout.manifest(step, own), manifest)
    write_hint(storage, own, {*done, step})
    return ResumePoint(step, generation, sha256(manifest))


def commit_when_complete(
    storage: Storage, generation: str, world: int, step: int, wait_s: float = WAIT_S
) -> ResumePoint:
    """As `commit_step`, for rank 0 of a script without an agent: waits for the other ranks' files."""
    pending = Pending(storage, step, generation, world)
    deadline = time.monotonic() + wait_s
    while not pending.ready():
        if time.monotonic() > deadline:
            raise pending.incomplete()
        time.sleep(POLL_S)  # a file on shared storage announces itself to nobody
    return commit_step(storage, generation, world, step)


def secured(storage: Storage, point: ResumePoint) -> ResumePoint:
    """Prove a committed step's small files and make it durable: whoever committed it may have died before its sync.

    Raises MissingCheckpoint, DamagedCheckpoint.
    """
    CommittedStep(storage, point).check()
    owner = GenerationId.parse(point.generation)
    try:
        create_same(storage, layout.manifest(point.step, owner), _manifest(storage, point.step, owner))
    except NotThere as error:
        raise MissingCheckpoint(f"step {point.step} of {owner} was deleted meanwhile") from error
    return point


def _manifest(storage: Storage, step: int, generation: GenerationId) -> bytes:
    return storage.read(layout.manifest(step, generation), MAX_SMALL_FILE)


class Pending:
    """A step whose rank files are still coming. Asking again costs one look per rank that is still missing."""

    def __init__(self, storage: Storage, step: int, generation: str, world: int) -> None:
        self.step = step
        self.generation = GenerationId.parse(generation)
        self.world = world
        self._storage = storage
        self._place = layout.folder(step, self.generation)
        self._missing = [layout.rank_json(rank) for rank in range(world)]

    def ready(self) -> bool:
        """Whether every rank has left its part. Looked up by name, because a listing may lag."""
        self._missing = [name for name in self._missing if not self._is_there(name)]
        return not self._missing

    def incomplete(self) -> Incomplete:
        """The error that names whom we are waiting for."""
        return Incomplete(self._place, self._missing)

    def _is_there(self, name: str) -> bool:
        try:
            with self._storage.open(f"{self._place}/{name}"):
                return True
        except NotThere:
            return False


def finish(
    storage: Storage, generation: GenerationId, along: Callable[[list[int]], Iterable[int]] = iter
) -> list[str]:
    """Commit the steps that a generation left complete but uncommitted, oldest first. Returns why some could not be. `along` gets the
    steps and gives them back one by one: for a progress bar."""
    record = read_generation(storage, generation)
    done = committed_by(storage, generation)
    above = max([record.resume.step if record.resume is not None else -1, *done])
    given_up: list[str] = []
    for step in along([s for s, g in saves(storage) if g == generation and s > above]):
        try:
            commit_step(storage, str(generation), _world(storage, step, generation), step)
        except (Incomplete, Inconsistent, StepPassed, MediumFailed) as error:
            given_up.append(str(error))
    return given_up


def _step_before(record: GenerationFile, done: Iterable[int], step: int) -> int:
    """The step that the ledger of `step` begins after. Steps are committed in order, so that segments never overlap."""
    newest = max([record.resume.step if record.resume is not None else -1, *done])
    if step <= newest:
        raise StepPassed(
            f"step {step} of {record.generation} is given up: step {newest} is committed already"
        )
    return newest


def _read_ranks(
    storage: Storage, step: int, generation: GenerationId, world: int
) -> tuple[list[RankFile], AtomsFile, dict[str, str]]:
    """All rank records without their tensors, the index that is made of those, and the records' digests. Read by name because a listing may
    lag."""
    place = layout.folder(step, generation)
    indexing = Indexing(place)
    ranks: list[RankFile] = []
    digests: dict[str, str] = {}
    missing: list[str] = []
    for rank in range(world):
        name = layout.rank_json(rank)
        try:
            data = storage.read(f"{place}/{name}", MAX_SMALL_FILE)
        except NotThere:
            missing.append(name)
            continue
        record = _rank_record(storage, data, f"{place}/{name}", (step, generation, rank, world))
        if not missing:
            indexing.add(record)
        ranks.append(replace(record, atoms={}, ties={}, absent=(), scalars={}))
        digests[name] = sha256(data)
    if missing:
        raise Incomplete(place, missing)
    return ranks, indexing.index(), digests


def _rank_record(
    storage: Storage, data: bytes, path: str, expected: tuple[int, GenerationId, int, int]
) -> RankFile:
    try:
        record = decode(RankFile, data, path, storage.key)
    except FormatError as error:
        raise Inconsistent(str(error)) from error
    if (record.step, record.generation, record.rank, record.world) != expected:
        raise Inconsistent(
            f"{path} is of step {record.step}, generation {record.generation}, rank {record.rank} of {record.world}"
        )
    return record


def _write_index(storage: Storage, ranks: Sequence[RankFile], index: AtomsFile, place: str) -> dict[str, str]:
    """Check data files, write `atoms.json`; digests of it and of `train.json`."""
    for record in ranks:
        _check_data(storage, f"{place}/{layout.rank_data(record.rank)}", record.data.bytes)
    train = _train(storage, index, place)
    atoms = encode(index, storage.key)
    create_same(storage, f"{place}/{layout.ATOMS}", atoms)
    return {layout.ATOMS: sha256(atoms), layout.TRAIN: sha256(train)}


def _train(storage: Storage, index: AtomsFile, place: str) -> bytes:
    """`train.json`, which must be one that this step can be loaded with."""
    path = f"{place}/{layout.TRAIN}"
    try:
        data = storage.read(path, MAX_SMALL_FILE)
        record = decode(TrainFile, data, path, storage.key)
    except NotThere as error:
        raise Incomplete(place, [layout.TRAIN]) from error
    except FormatError as error:
        raise Inconsistent(str(error)) from error
    if (record.step, record.generation) != (index.step, index.generation):
        raise Inconsistent(f"{path} is of step {record.step} of {record.generation}")
    return data


def _check_data(storage: Storage, path: str, size: int) -> None:
    try:
        with storage.open(path) as file:
            found = file.size
    except NotThere as error:
        raise Inconsistent(f"{path} is missing although its record is there") from error
    if found != size:
        raise Inconsistent(f"{path} has {found} bytes; its record says {size}")


def _samples(
    storage: Storage, generation: GenerationId, ranks: Sequence[RankFile], before: int
) -> list[Samples]:
    """What each rank fed since the last committed step, also what it told in steps that never got committed."""
    merged: list[dict[int, Sequence[int]]] = [{} for _ in ranks]
    for step in [s for s, g in saves(storage) if g == generation and before < s < ranks[0].step]:
        for samples, told in zip(merged, _told_in(storage, step, ranks), strict=True):
            samples |= told
    return [samples | record.samples for samples, record in zip(merged, ranks, strict=True)]


def _told_in(storage: Storage, given_up: int, ranks: Sequence[RankFile]) -> list[Samples]:
    """By rank; nothing of any rank where one record is unreadable: an audit finds steps without a line, but not a line that lacks a
    rank, and for the sake of either no later step shall stay uncommitted."""
    try:
        return [_told_by(storage, given_up, record) for record in ranks]
    except (MediumFailed, Inconsistent):
        return [{} for _ in ranks]


def _told_by(storage: Storage, given_up: int, record: RankFile) -> Samples:
    path = f"{layout.folder(given_up, record.generation)}/{layout.rank_json(record.rank)}"
    try:
        data = storage.read(path, MAX_SMALL_FILE)
    except NotThere:
        return {}
    told = _rank_record(storage, data, path, (given_up, record.generation, record.rank, record.world))
    # What ranks fed before they were restarted, they have fed again.
    return told.samples if told.attempt == record.attempt else {}


def _world(storage: Storage, step: int, generation: GenerationId) -> int:
    """The world size of an uncommitted step, by any rank's word for it."""
    place = layout.folder(step, generation)
    for name in storage.names(place):
        if layout.parse_rank(name) is not None:
            try:
                data = storage.read(f"{place}/{name}", MAX_SMALL_FILE)
                return decode(RankFile, data, name, storage.key).world
            except FormatError as error:
                raise Inconsistent(f"{place}/{error}") from error
    raise Incomplete(place, [layout.rank_json(0)])
