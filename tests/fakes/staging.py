"""Steps in a node's memory, made by hand: no rank, no torch."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from stormjib_checkpoint.format import DataFile, RankFile, TrainFile
from stormjib_checkpoint.layout import GenerationId
from stormjib_checkpoint.left import Records
from stormjib_checkpoint.node_memory import Slot, staged
from stormjib_checkpoint.pieces import piece_digest
from stormjib_checkpoint.records import encode
from stormjib_checkpoint.room import aligned

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

PIECE, PIECES = 8192, 3
SIZE = (PIECES - 1) * PIECE + 100
SOON_S = 10.0


def stage(
    memory: Path,
    step: int,
    rank: int = 0,
    *,
    number: int = 0,
    local_rank: int = 0,
    generation: str = "1.1",
    key: bytes | None = None,
) -> Slot:
    """One rank's part of a step, whole."""
    slot = Slot(memory / str(local_rank) / str(number))
    slot.folder.mkdir(parents=True, exist_ok=True)
    slot.clear()
    data = content(step, rank)
    slot.data.write_bytes(data.ljust(aligned(len(data)), b"\0"))
    slot.tell(records(step, rank, generation, key))
    return slot


def content(step: int, rank: int = 0) -> bytes:
    """What its data file holds."""
    return bytes((step * 31 + rank * 7 + i) % 251 for i in range(SIZE))


def records(step: int, rank: int = 0, generation: str = "1.1", key: bytes | None = None) -> Records:
    """What is said of it, by a rank of a world of two."""
    data = content(step, rank)
    pieces = tuple(piece_digest(data[at : at + PIECE]) for at in range(0, SIZE, PIECE))
    whose = GenerationId.parse(generation)
    record = RankFile(
        step=step, generation=whose, rank=rank, world=2, attempt="a", data=DataFile(SIZE, PIECE, pieces),
        atoms={}, ties={}, absent=(), scalars={}, samples={},
    )  # fmt: skip
    train = encode(TrainFile(step, whose, {}), key) if rank == 0 else None
    return Records(encode(record, key), train)


def held(memory: Path, key: bytes | None = None) -> list[tuple[int, int]]:
    """(step, rank) of all that is whole there, by its own word and by its bytes."""
    found = [(one.record.step, one.record.rank, one) for one in staged(memory, key)]
    assert all(one.slot.data.read_bytes()[:SIZE] == content(step, rank) for step, rank, one in found)
    return sorted((step, rank) for step, rank, _ in found)


def until(what: Callable[[], object], limit_s: float = SOON_S) -> None:
    """Wait on a condition that another thread brings about."""
    deadline = time.monotonic() + limit_s
    while not what():
        assert time.monotonic() < deadline
        time.sleep(0.002)


def flip(path: Path, at: int) -> None:
    """One bit of a file."""
    with open(path, "r+b") as file:
        file.seek(at)
        byte = file.read(1)[0]
        file.seek(at)
        file.write(bytes([byte ^ 1]))
