"""Filling memory from a data file: by several threads, each piece proved before anything of it is copied."""

from __future__ import annotations

import threading
import time
from itertools import pairwise
from typing import TYPE_CHECKING

import pytest
import torch

from fakes.indices import index_of
from stormjib_checkpoint import digest
from stormjib_checkpoint.boxes import Box
from stormjib_checkpoint.errors import DamagedCheckpoint
from stormjib_checkpoint.filling import FREE_BYTES, Filling, Memory, Sink, pieces
from stormjib_checkpoint.format import AtomRow, DataFile, StoredBox
from stormjib_checkpoint.pieces import piece_digest
from stormjib_checkpoint.plan import Cut, FilePlan, Read, Target, plan
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


def target_of(data: bytes) -> tuple[torch.Tensor, Sink, StoredBox]:
    """Memory for all of a file's bytes, as one atom."""
    target = torch.zeros(len(data), dtype=torch.uint8)
    shape = (len(data),)
    box = StoredBox(0, (0,), shape, 0, len(data))
    return target, Sink([Memory(memory(target), target.data_ptr(), "U8", shape)]), box


def cut(box: StoredBox, start: int, length: int) -> Cut:
    return Cut(0, box, start, start, start, length)


def every(box: StoredBox, length: int) -> FilePlan:
    return FilePlan(0, [Read(0, length, [cut(box, 0, length)])], [])


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("careful", [False, True])
def test_every_byte_comes_to_its_place_whoever_reads_it(threads: int, careful: bool) -> None:
    """Long and short ones in turns: whole pieces, requests of several cuts with gaps, and some straight to their place."""
    data, described = content()
    target, sink, box = target_of(data)
    bounds = sorted(
        {*range(0, len(data), PIECE), len(data), 5, 6, 40, FREE_BYTES + 5, 3 * PIECE + 7, 5 * PIECE - 1}
    )
    cuts = [cut(box, at, end - at) for at, end in pairwise(bounds)]
    reads = [
        Read(group[0].start, group[-1].end - group[0].start, group)
        for group in (cuts[:4], *([c] for c in cuts[4:]))
    ]
    plan = FilePlan(0, reads, [])
    file = File(data, threads)
    Filling(file, pieces(plan, described, 0) if careful else plan.reads, sink, damaged).run(threads)
    assert bytes(memory(target)) == data
    if careful:
        assert sorted(file.read) == list(range(PIECES)), "each piece once"
    whole_digest = digest.partial(target.data_ptr(), "U8", digest.geometry(box.shape, box.box), 0, len(data))
    assert sum(one.digest for one in sink.digests) % 2**64 == whole_digest
    assert sum(one.elements for one in sink.digests) == len(data)


@pytest.mark.parametrize("request_bytes", [4, 1000])
@pytest.mark.parametrize("columns", [slice(0, 3), slice(4, 9)])
def test_short_runs_come_to_their_place_and_add_up(columns: slice, request_bytes: int) -> None:
    """Part of each row of what was stored: run by run, and whole rows."""
    stored = torch.arange(40 * 9, dtype=torch.float32).reshape(40, 9)
    source = StoredBox(0, (0, 0), (40, 9), 0, 40 * 9 * 4)
    box = Box((0, columns.start), (40, columns.stop - columns.start))
    (planned,) = plan(
        [Target("w", box, 1)], index_of({"w": AtomRow("F32", (40, 9), (source,))}).atoms, request_bytes
    )
    assert len(planned.strips) == 1
    target = torch.zeros(box.shape)
    sink = Sink([Memory(memory(target), target.data_ptr(), "F32", (40, 9))])
    Filling(File(bytes(memory(stored))), planned.strips, sink, damaged).run(2)
    assert torch.equal(target, stored[:, columns])
    expected = digest.partial(target.data_ptr(), "F32", digest.geometry((40, 9), box), 0, target.numel())
    assert sum(one.digest for one in sink.digests) % 2**64 == expected


def test_a_damaged_piece_is_named_nothing_of_it_is_copied_and_no_further_one_is_begun() -> None:
    data, described = content()
    spoiled = bytearray(data)
    spoiled[2 * PIECE + 5] ^= 1
    target, sink, box = target_of(data)
    file = File(bytes(spoiled))
    work = pieces(every(box, len(data)), described, 0)
    with pytest.raises(DamagedCheckpoint, match=f"bytes {2 * PIECE} to {3 * PIECE}"):
        Filling(file, work, sink, damaged).run(1)
    assert file.read == [0, 1, 2]
    assert bytes(memory(target)[: 2 * PIECE]) == data[: 2 * PIECE]
    assert not target[2 * PIECE :].any()


def test_a_file_that_ends_early_is_damaged() -> None:
    data, _ = content()
    _, sink, box = target_of(data)
    with pytest.raises(DamagedCheckpoint):
        Filling(File(data[:-1]), every(box, len(data)).reads, sink, damaged).run(1)


def test_other_threads_stop_where_one_has_found_damage() -> None:
    data, described = content()
    _, sink, box = target_of(data)

    class Held(File):
        def read_into(self, offset: int, buffer: memoryview) -> int:
            if offset:  # the other thread, which goes on when the damage is known
                stopped.append(wait_for(lambda: not filling._left, 5))
            return super().read_into(offset, buffer)

    stopped: list[bool] = []
    file = Held(bytes([data[0] ^ 1]) + data[1:], 1)
    filling = Filling(file, pieces(every(box, len(data)), described, 0), sink, damaged)
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
    _, sink, box = target_of(data)
    wanted = FilePlan(0, [Read(3 * PIECE, 8, [cut(box, 3 * PIECE, 8)])], [])
    file = File(data)
    Filling(file, pieces(wanted, described, 2 * PIECE), sink, damaged).run(2)
    assert sorted(file.read) == [0, 1, 3]
