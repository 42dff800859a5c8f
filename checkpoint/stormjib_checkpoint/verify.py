"""Proving a committed step whole: every small file by its digest, every piece of every data file by its checksum.

Read past the page cache: what counts is what lies on the medium, not what this machine remembers of it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from stormjib_checkpoint.errors import DamagedCheckpoint, MediumFailed, NotThere
from stormjib_checkpoint.pieces import piece_digest
from stormjib_checkpoint.step import CommittedStep, unreadable_is_damaged

if TYPE_CHECKING:
    from collections.abc import Iterator

    from stormjib_checkpoint.format import DataFile
    from stormjib_checkpoint.storage import Storage


def verify(storage: Storage, resume: tuple[int, str, str]) -> Iterator[tuple[str, str | None]]:
    """Each data file of a step and what is wrong with it; None where it is whole.

    Raises MissingCheckpoint; DamagedCheckpoint where a small file is damaged or a data file has another length.
    """
    fresh = storage.past_cache()
    step = CommittedStep(fresh, resume)
    step.check()
    for rank in range(step.manifest.world):
        path = step.data_path(rank)
        problem = flaw(fresh, path, step.rank(rank).data)
        if problem is not None:
            step.still_there()
        yield path, problem


def proving(storage: Storage, resume: tuple[int, str, str]) -> Iterator[None]:
    """Read a step whole, one file or one piece of 16 MiB at each turn, so that other work can come between; it is whole when this ends.

    Raises MissingCheckpoint, DamagedCheckpoint, StorageError.
    """
    fresh = storage.past_cache()
    step = CommittedStep(fresh, resume)
    yield from step.checking()
    for rank in range(step.manifest.world):
        path = step.data_path(rank)
        try:
            with unreadable_is_damaged():
                for problem in _flaws(fresh, path, step.rank(rank).data):
                    if problem is not None:
                        raise DamagedCheckpoint(f"{path}: {problem}")
                    yield
        except NotThere as error:
            raise step.lost(path) from error


def flaw(storage: Storage, path: str, data: DataFile) -> str | None:
    """What is wrong with one data file; None where every piece is as it was written."""
    try:
        return next(filter(None, _flaws(storage, path, data)), None)
    except (NotThere, MediumFailed) as error:
        return str(error)


def _flaws(storage: Storage, path: str, data: DataFile) -> Iterator[str | None]:
    """What is wrong with each piece. Raises StorageError."""
    buffer = memoryview(bytearray(min(data.piece_bytes, data.bytes)))
    with storage.open(path) as file:
        for number, digest in enumerate(data.pieces):
            start = number * data.piece_bytes
            piece = buffer[: min(data.piece_bytes, data.bytes - start)]
            whole = file.read_into(start, piece) == len(piece) and piece_digest(piece) == digest
            yield None if whole else f"bytes {start} to {start + len(piece)} are not those that were written"
