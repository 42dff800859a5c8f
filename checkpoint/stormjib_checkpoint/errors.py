"""Every error of the checkpoint library. Each says what is wrong, where, and what to do.

CheckpointError
├── StorageError            the file system (or store) refused
│   ├── StorageFull         no space, no quota
│   ├── StorageReadOnly     mounted read-only
│   ├── StorageDenied       permissions
│   ├── MediumFailed        the device or the file system failed itself: what lies there may be lost
│   ├── NotThere            the file does not exist
│   └── AlreadyThere        create-only: the name is taken
├── FormatError             a file is not what FORMAT.md says
├── SpecError               a pattern spec is wrong, or does not fit the tensors or the mesh it is put on
├── BadKey                  the key that files are signed with cannot be used
├── SaveError
│   ├── UnsupportedState    a tensor or value that cannot be stored, by name
│   ├── ArenaTooLarge       no memory to stage a step in
│   ├── TornCopy            the state was changed while it was copied
│   └── AlreadySaved        this rank has already left this step in this generation
├── CommitError
│   ├── Incomplete          rank files are not all there (yet)
│   ├── Inconsistent        rank files contradict each other, or do not tile every atom
│   └── StepPassed          a newer step of the same history is committed already
├── HistoryError
│   ├── GenerationExists    somebody opened this generation before
│   ├── Superseded          a higher generation exists: stop
│   ├── UnknownGeneration   nobody opened this generation on this storage
│   └── NoUsableCheckpoint  steps are committed, but none can be loaded
├── InteropError
│   ├── ForeignRefused      a foreign file holds what is not read, or says what is not allowed
│   ├── ForeignDamaged      a foreign file does not hold what it says
│   ├── ImportRefused       an import would not be what was asked for
│   └── ExportRefused       the checkpoint cannot be said in that format
└── LoadError
    ├── MissingCheckpoint   no manifest of that step and generation
    ├── DamagedCheckpoint   the bytes are not those that were written
    └── StateMismatch       the checkpoint and the state to fill differ
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence


class CheckpointError(Exception):
    """Root of all errors of this library."""


class StorageError(CheckpointError):
    """A file operation failed. `path` says where, `fix` what to do."""

    def __init__(self, path: str, problem: str, fix: str) -> None:
        super().__init__(f"{path}: {problem}. {fix}")
        self.path = path
        self.problem = problem
        self.fix = fix


class StorageFull(StorageError):
    """No space left, quota spent, or a file size limit reached."""


class StorageReadOnly(StorageError):
    """The file system is mounted read-only."""


class StorageDenied(StorageError):
    """The process may not do this there."""


class MediumFailed(StorageError):
    """The device, or the file system on it, failed itself: what lies there may be lost."""


class NotThere(StorageError):
    """The file does not exist."""


class AlreadyThere(StorageError):
    """Create-only: another writer has taken the name."""


class FormatError(CheckpointError):
    """A file of a checkpoint does not follow FORMAT.md, or needs a newer reader."""


class SpecError(CheckpointError):
    """A pattern spec cannot be read, or does not fit the atoms or the mesh that it is put on. Names rule and atom, and says what to do."""


class BadKey(CheckpointError):
    """The key that files are signed with is missing or too short; told before anything is read or written."""


class SaveError(CheckpointError):
    """A rank could not leave its part of a step."""


class UnsupportedState(SaveError):
    """A tensor or value that the format cannot hold; names the key."""


class ArenaTooLarge(SaveError):
    """The host has no memory to stage a step in; told before anything is taken."""


class TornCopy(SaveError):
    """A tensor was changed while it was copied: this step is not saved. Names the tensor and the fix."""


class AlreadySaved(SaveError):
    """This rank has left this step in this generation before; it is never overwritten."""


class CommitError(CheckpointError):
    """A step could not be committed; training may go on to the next one."""


class Incomplete(CommitError):
    """Rank files are missing. `missing` names them."""

    def __init__(self, place: str, missing: Sequence[str]) -> None:
        shown = ", ".join(missing[:5]) + (f" and {len(missing) - 5} more" if len(missing) > 5 else "")
        super().__init__(
            f"{place}: {shown} not written yet; the step stays uncommitted until every rank has saved"
        )
        self.missing = tuple(missing)


class Inconsistent(CommitError):
    """Rank files contradict each other, or leave a hole or an overlap in an atom."""


class StepPassed(CommitError):
    """A newer step is committed in this history: this one is given up."""


class HistoryError(CheckpointError):
    """The record of generations does not allow what was asked."""


class GenerationExists(HistoryError):
    """The generation was opened before: take the next number."""


class Superseded(HistoryError):
    """A higher generation exists on the storage: this one must stop and delete nothing."""


class UnknownGeneration(HistoryError):
    """Nobody opened this generation on this storage."""


class NoUsableCheckpoint(HistoryError):
    """Steps are committed, yet none of them can be loaded. Starting from nothing would throw them away silently."""


class InteropError(CheckpointError):
    """An export or import could not be made."""


class ForeignRefused(InteropError):
    """A foreign file says what is not allowed, or holds what this library does not read. Names the file and what it was."""


class ForeignDamaged(InteropError):
    """A foreign file does not hold what it, or its index, says."""


class ImportRefused(InteropError):
    """The place or the names do not allow the import. Nothing was written."""


class ExportRefused(InteropError):
    """The checkpoint has what the other format cannot say, or lacks what it needs. Names it."""


class LoadError(CheckpointError):
    """A step could not be loaded."""


class MissingCheckpoint(LoadError):
    """There is no manifest of that step and generation."""


class DamagedCheckpoint(LoadError):
    """A file is missing, truncated, altered, or belongs to another step. Names file and, where known, atoms."""


class StateMismatch(LoadError):
    """Names, shapes or types of the checkpoint and of the state to fill differ. Nothing was filled."""
