"""What a rank leaves beside its data file: its record, and rank 0's `train.json`. With the record its part of the step is whole."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from stormjib_checkpoint import layout
from stormjib_checkpoint.errors import AlreadyThere, Inconsistent
from stormjib_checkpoint.format import MAX_SMALL_FILE

if TYPE_CHECKING:
    from stormjib_checkpoint.layout import GenerationId
    from stormjib_checkpoint.storage import Storage


class Records(NamedTuple):
    """The bytes of `rank-k.json` and, from rank 0, of `train.json`."""

    rank: bytes
    train: bytes | None


def leave(storage: Storage, step: int, generation: GenerationId, rank: int, records: Records) -> None:
    """Say what lies in a data file that is durable. Raises AlreadyThere, StorageError; nothing that was there is changed."""
    place = layout.folder(step, generation)
    if records.train is not None:
        storage.create(f"{place}/{layout.TRAIN}", [records.train])
    storage.create(f"{place}/{layout.rank_json(rank)}", [records.rank])


def create_same(storage: Storage, path: str, data: bytes) -> None:
    """Create, or find the same bytes there: somebody else's, or our own from before a crash. Raises Inconsistent, StorageError."""
    if len(data) > MAX_SMALL_FILE:
        raise Inconsistent(
            f"{path} would have {len(data)} bytes, and {MAX_SMALL_FILE} are read; save from fewer ranks"
        )
    try:
        storage.create(path, [data])
    except AlreadyThere as error:
        if storage.read(path, MAX_SMALL_FILE) != data:
            raise Inconsistent(f"{path} is there with other content; it is left as it is") from error
