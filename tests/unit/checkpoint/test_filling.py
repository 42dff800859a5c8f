"""Filling memory from a data file: by several threads, each piece proved before anything of it is copied."""

from __future__ import annotations

import threading
import time
from typing import TYPE_CHECKING

import pytest
import torch

from stormjib_checkpoint.errors import DamagedCheckpoint
from stormjib_checkpoint.filling import FREE_BYTES, Copy, Filling
from stormjib_checkpoint.format import DataFile
from stormjib_checkpoint.pieces import piece_digest
from stormjib_checkpoint.tensors import memory

if TYPE_CHECKING:
    from collections.abc import Callable

PIECE = 4 * FREE_BYTES
PIECES = 9


class File:
    """Bytes that are read, and who read them; one thread waits for the others at the first piece, so that all take part."""

    def __init__(self, data: bytes, readers: int = 1) -> None:
        self.data, self.size = data, len(data)
        self.read: list[int] = []
        self._together = threading.Barrier(readers)

    def read_into(self, offset: int, buffer: memoryview) -> int:
        self.read.append(offset // PIECE)
        if not self._together.broken and len(self.read) <= self._together.parties:
            self._together.wait(10)
        part = self.data[offset : offset + len(buffer)]
        buffer[: len(part)] = part
        return len(part)


def content() -> tuple[bytes, DataFile]:
    data = bytes(torch.randint(0, 256, (PIECES * PIECE - 777,), dtype=torch.uint8).tolist())
    pieces = tuple(piece_digest(data[at : at + PIECE]) for at in range(0, len(data), PIECE))
    return data, DataFile(len(data), PIECE, pieces)


def damaged(start: int, end: int) -> DamagedCheckpoint:
    return DamagedCheckpoint(f"bytes {start} to {end}")


def copies_of(target: torch.Tensor, size: int) -> list[Copy]:
    """Long and short ones in turns, backwards, and all of the file."""
    found, at = [], 0
    for length in (FREE_BYTES + 5, 3, 2 * PIECE, 1) * 100:
        length = min(length, size - at)
        if length:
            found.append(Copy(0, at, length, size - at - length, memory(target), target.data_ptr()))
        at += length
    return found


@pytest.mark.parametrize("threads", [1, 3])
def test_every_byte_comes_to_its_place_whoever_reads_it(threads: int) -> None:
    data, described = content()
    target = torch.zeros(len(data), dtype=torch.uint8)
    copies = copies_of(target, len(data))
    file = File(data, threads)
    Filling(file, described, 0, copies, damaged).run(threads)
    for copy in copies:
        wanted = data[copy.start : copy.start + copy.length]
        assert bytes(target[copy.into : copy.into + copy.length].tolist()) == wanted
    assert sorted(file.read) == list(range(PIECES)), "each piece once"


def test_a_damaged_piece_is_named_nothing_of_it_is_copied_and_no_further_one_is_begun() -> None:
    data, described = content()
    spoiled = bytearray(data)
    spoiled[2 * PIECE + 5] ^= 1
    target = torch.zeros(len(data), dtype=torch.uint8)
    every = [Copy(0, 0, len(data), 0, memory(target), target.data_ptr())]
    file = File(bytes(spoiled))
    with pytest.raises(DamagedCheckpoint, match=f"bytes {2 * PIECE} to {3 * PIECE}"):
        Filling(file, described, 0, every, damaged).run(1)
    assert file.read == [0, 1, 2]
    assert bytes(target[: 2 * PIECE].tolist()) == data[: 2 * PIECE]
    assert not target[2 * PIECE :].any()


def test_other_threads_stop_where_one_has_found_damage() -> None:
    data, described = content()
    target = torch.zeros(len(data), dtype=torch.uint8)
    every = [Copy(0, 0, len(data), 0, memory(target), target.data_ptr())]

    class Held(File):
        def read_into(self, offset: int, buffer: memoryview) -> int:
            if offset:  # the other thread, which goes on when the damage is known
                stopped.append(wait_for(lambda: not filling._left, 5))
            return super().read_into(offset, buffer)

    stopped: list[bool] = []
    file = Held(b"?" + data[1:], 1)
    filling = Filling(file, described, 0, every, damaged)
    with pytest.raises(DamagedCheckpoint):
        filling.run(2)
    assert stopped in ([True], []), "whoever had begun a piece ends it, and begins no other"


def wait_for(holds: Callable[[], bool], seconds: float) -> bool:
    end = time.monotonic() + seconds
    while not holds() and time.monotonic() < end:
        time.sleep(0.001)
    return holds()


def test_what_nobody_wants_of_the_head_is_proved_too() -> None:
    data, described = content()
    target = torch.zeros(8, dtype=torch.uint8)
    wanted = [Copy(0, 3 * PIECE, 8, 0, memory(target), target.data_ptr())]
    file = File(data)
    Filling(file, described, 2 * PIECE, wanted, damaged).run(2)
    assert sorted(file.read) == [0, 1, 3]
