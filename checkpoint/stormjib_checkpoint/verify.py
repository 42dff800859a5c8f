"""Proving a committed step whole: every small file by its digest, every piece of every data file by its checksum."""

from __future__ import annotations

from typing import TYPE_CHECKING

from stormjib_checkpoint.errors import MediumFailed, NotThere
from stormjib_checkpoint.pieces import piece_digest
from stormjib_checkpoint.step import CommittedStep

if TYPE_CHECKING:
    from collections.abc import Iterator

    from stormjib_checkpoint.format import DataFile
    from stormjib_checkpoint.storage import Storage


def verify(storage: Storage, resume: tuple[int, str, str]) -> Iterator[tuple[str, str | None]]:
    """Each data file of a step and what is wrong with it; None where it is whole.

    Raises MissingCheckpoint; DamagedCheckpoint where a small file is damaged or a data file has another length.
    """
    step = CommittedStep(storage, resume)
    step.check()
    for rank in range(step.manifest.world):
        yield step.data_path(rank), flaw(storage, step.data_path(rank), step.rank(rank).data)


def flaw(storage: Storage, path: str, data: DataFile) -> str | None:
    """What is wrong with one data file; None where every piece is as it was written."""
    buffer = memoryview(bytearray(min(data.piece_bytes, data.bytes)))
    try:
        with storage.open(path) as file:
            for number, digest in enumerate(data.pieces):
                start = number * data.piece_bytes
                piece = buffer[: min(data.piece_bytes, data.bytes - start)]
                if file.read_into(start, piece) != len(piece) or piece_digest(piece) != digest:
                    return f"bytes {start} to {start + len(piece)} are not those that were written"
    except (NotThere, MediumFailed) as error:
        return str(error)
    return None
