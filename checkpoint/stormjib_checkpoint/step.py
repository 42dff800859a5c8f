"""A committed step, its small files proved by digest: what can be known of it without reading tensors."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, TypeVar

from stormjib_checkpoint import layout
from stormjib_checkpoint.errors import (
    DamagedCheckpoint,
    FormatError,
    MediumFailed,
    MissingCheckpoint,
    NotThere,
)
from stormjib_checkpoint.format import MAX_SMALL_FILE, AtomsFile, Manifest, RankFile, TrainFile
from stormjib_checkpoint.index import Index
from stormjib_checkpoint.layout import GenerationId
from stormjib_checkpoint.records import decode, sha256

if TYPE_CHECKING:
    from collections.abc import Iterator

    from stormjib_checkpoint.storage import Storage

T = TypeVar("T", AtomsFile, RankFile, TrainFile)


@contextlib.contextmanager
def unreadable_is_damaged() -> Iterator[None]:
    """What the medium does not give back is damage of one step: there is another one to take."""
    try:
        yield
    except MediumFailed as error:
        raise DamagedCheckpoint(str(error)) from error


class CommittedStep:
    """The step of a resume point (step, generation, digest of its manifest), whose manifest is proved at once."""

    def __init__(self, storage: Storage, resume: tuple[int, str, str]) -> None:
        self._storage = storage
        self._resume = resume
        self.manifest = self._read_manifest()
        self.folder = layout.folder(self.manifest.step, self.manifest.generation)

    def atoms(self) -> Index:
        """What the step holds. Raises DamagedCheckpoint."""
        record = self._record(AtomsFile, layout.ATOMS)
        data, world = self.manifest.data, self.manifest.world
        names = [layout.rank_data(rank) for rank in range(len(data))]
        if len(data) != world or not data.keys() >= set(names):
            raise DamagedCheckpoint(
                f"{self.folder}: the manifest does not have one data file of each of {world} ranks"
            )
        return Index(record, [data[name] for name in names], self.folder)

    def train(self) -> TrainFile:
        """What the trainer needs besides tensors. Raises DamagedCheckpoint."""
        return self._record(TrainFile, layout.TRAIN)

    def rank(self, rank: int) -> RankFile:
        """What one rank left, with the checksums of its data file. Raises DamagedCheckpoint."""
        return self._record(RankFile, layout.rank_json(rank))

    def data_path(self, rank: int) -> str:
        """Path of a rank's data file."""
        return f"{self.folder}/{layout.rank_data(rank)}"

    def lost(self, path: str) -> DamagedCheckpoint | MissingCheckpoint:
        """Why a file is not there: the whole step was deleted (its manifest goes first), or this file is lost."""
        try:
            self.still_there()
        except MissingCheckpoint as error:
            return error
        return DamagedCheckpoint(f"{path} is missing although the step is committed")

    def still_there(self) -> None:
        """Look at the manifest again: what a step that is being deleted lacks is no damage. Raises MissingCheckpoint, DamagedCheckpoint."""
        self._read_manifest()

    def check(self) -> None:
        """Prove all that can be proved without reading tensors: digests of small files, sizes of data files."""
        for _ in self.checking():
            pass

    def checking(self) -> Iterator[None]:
        """As `check`, one file at each turn. Raises MissingCheckpoint, DamagedCheckpoint, StorageError."""
        for name in self.manifest.files:
            self._read(name)
            yield
        for name, size in self.manifest.data.items():
            self._check_size(f"{self.folder}/{name}", size)
            yield

    @unreadable_is_damaged()
    def _check_size(self, path: str, size: int) -> None:
        try:
            with self._storage.open(path) as file:
                found = file.size
        except NotThere as error:
            raise self.lost(path) from error
        if found != size:
            raise DamagedCheckpoint(f"{path} has {found} bytes; {size} were written")

    @unreadable_is_damaged()
    def _read_manifest(self) -> Manifest:
        step, generation, digest = self._resume[0], GenerationId.parse(self._resume[1]), self._resume[2]
        path = layout.manifest(step, generation)
        try:
            data = self._storage.read(path, MAX_SMALL_FILE)
        except NotThere as error:
            raise MissingCheckpoint(
                f"{path} is not there: step {step} of {generation} is not committed"
            ) from error
        if sha256(data) != digest:
            raise DamagedCheckpoint(
                f"{path} has SHA-256 {sha256(data)}, not {digest}: it was altered or replaced"
            )
        try:
            manifest = decode(Manifest, data, path, self._storage.key)
        except FormatError as error:
            raise DamagedCheckpoint(str(error)) from error
        if (manifest.step, manifest.generation) != (step, generation):
            raise DamagedCheckpoint(f"{path} is that of step {manifest.step} of {manifest.generation}")
        return manifest

    @unreadable_is_damaged()
    def _read(self, name: str) -> bytes:
        path = f"{self.folder}/{name}"
        try:
            data = self._storage.read(path, MAX_SMALL_FILE)
        except NotThere as error:
            raise self.lost(path) from error
        if sha256(data) != self.manifest.files.get(name):
            raise DamagedCheckpoint(
                f"{path} does not have the SHA-256 that the manifest says: altered or replaced"
            )
        return data

    def _record(self, kind: type[T], name: str) -> T:
        try:
            record = decode(kind, self._read(name), f"{self.folder}/{name}", self._storage.key)
        except FormatError as error:
            raise DamagedCheckpoint(str(error)) from error
        if (record.step, record.generation) != (self.manifest.step, self.manifest.generation):
            raise DamagedCheckpoint(f"{self.folder}/{name} is of step {record.step} of {record.generation}")
        return record
