"""From a rank's data file into memory: a few threads take turns through what is wanted of it, and read, prove and copy each part.

While one waits for the disk the others digest, so on a cold disk the proof costs next to nothing.
"""

from __future__ import annotations

import ctypes
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from itertools import groupby
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from numpy.lib.stride_tricks import as_strided

from stormjib_checkpoint import digest
from stormjib_checkpoint.format import ITEM_BYTES
from stormjib_checkpoint.pieces import piece_digest
from stormjib_checkpoint.plan import Cut, Read, Strip, divided

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Sequence

    from stormjib_checkpoint.boxes import Box
    from stormjib_checkpoint.errors import DamagedCheckpoint
    from stormjib_checkpoint.format import DataFile
    from stormjib_checkpoint.plan import FilePlan
    from stormjib_checkpoint.storage import Opened

FREE_BYTES = 64 * 1024
"""From this length on a copy lets the other threads go on; below, that would cost more than the copy."""
BLOCK_BYTES = 1024 * 1024
"""Read and then digested at once: small enough for a processor's own cache."""


class Memory(NamedTuple):
    """Where a target goes: its bytes, the address of the first, and what an element is."""

    view: memoryview
    address: int
    dtype: str
    shape: tuple[int, ...]
    """Of the whole atom."""


class Partial(NamedTuple):
    """The digest of some elements that were read for a target."""

    target: int
    elements: int
    digest: int


class Piece(NamedTuple):
    """A whole piece of a file with its checksum, and what is cut out of it."""

    read: Read
    digest: str


Work = Read | Piece | Strip


def pieces(plan: FilePlan, data: DataFile, head_bytes: int) -> Iterator[Piece]:
    """The plan in whole pieces, to be proved by their checksums. The first `head_bytes` are proved although nothing is wanted of them:
    nobody else proves them."""
    size = data.piece_bytes

    def piece(number: int, cuts: list[Cut]) -> Piece:
        start = number * size
        return Piece(Read(start, min(size, data.bytes - start), cuts), data.pieces[number])

    cuts = [cut for read in plan.reads for cut in read.cuts]
    cuts += [cut for strip in plan.strips for cut in strip.cuts()]
    ordered = sorted(divided(cuts, size), key=lambda cut: cut.start)
    wanted = {number: list(some) for number, some in groupby(ordered, key=lambda cut: cut.start // size)}
    heads = range(head_bytes // size)
    for number in sorted({*heads, *wanted}):
        yield piece(number, wanted.get(number, []))


class Sink:
    """The memory of all targets, and what has come into it."""

    def __init__(self, memories: Sequence[Memory]) -> None:
        """By number of the target."""
        self._memories = memories
        self.digests: list[Partial] = []
        """From any thread, in any order."""

    def put(self, read: Read, view: memoryview, address: int) -> None:
        """Take what was read, from its memory, to its places."""
        for cut in read.cuts:
            memory, skipped = self._memories[cut.target], cut.start - read.start
            size = ITEM_BYTES[memory.dtype]
            into = cut.into * size
            self._note(cut.target, cut.source.box, address + skipped, cut.first, cut.length // size)
            if cut.length >= FREE_BYTES:
                ctypes.memmove(memory.address + into, address + skipped, cut.length)
            else:
                memory.view[into : into + cut.length] = view[skipped : skipped + cut.length]

    def take(self, read: Read, data: memoryview) -> None:
        """As `put`, of bytes in a memory that may be written."""
        self.put(read, data, ctypes.addressof(ctypes.c_char.from_buffer(data)))

    def straight(self, cut: Cut, get: Callable[[int, memoryview], None]) -> None:
        """Have it read to its place, block by block."""
        memory = self._memories[cut.target]
        size = ITEM_BYTES[memory.dtype]
        into = cut.into * size
        for at in range(0, cut.length, BLOCK_BYTES):
            block = memory.view[into + at : into + min(at + BLOCK_BYTES, cut.length)]
            get(cut.start + at, block)
            address, first = memory.address + into + at, cut.first + at // size
            self._note(cut.target, cut.source.box, address, first, len(block) // size)

    def runs(self, strip: Strip, get: Callable[[int, memoryview], None], buffer: _Buffer) -> None:
        """Have the runs of a strip read one by one."""
        view, address = self._place(strip) or buffer.of(strip.rows * strip.run)
        for row in range(strip.rows):
            start = strip.start + row * strip.row_bytes + strip.skip
            get(start, view[row * strip.run : (row + 1) * strip.run])
        self._put_runs(strip, view, address)

    def rows(self, strip: Strip, view: memoryview) -> None:
        """Take the runs of a strip out of its rows."""
        self.gathered(strip, runs_of(view, strip.rows, strip.skip, strip.run))

    def gathered(self, strip: Strip, runs: memoryview) -> None:
        """Take the runs of a strip, which lie one after the other."""
        self._put_runs(strip, runs, ctypes.addressof(ctypes.c_char.from_buffer(runs)))

    def _place(self, strip: Strip) -> tuple[memoryview, int] | None:
        """The place of the runs in the target, where they lie there one after the other."""
        memory = self._memories[strip.target]
        size = ITEM_BYTES[memory.dtype]
        if strip.into_step * size != strip.run:
            return None
        at = strip.into * size
        return memory.view[at : at + strip.rows * strip.run], memory.address + at

    def _put_runs(self, strip: Strip, view: memoryview, address: int) -> None:
        memory = self._memories[strip.target]
        size = ITEM_BYTES[memory.dtype]
        self._note(strip.target, strip.shared, address, strip.first, strip.rows * strip.run // size)
        place = self._place(strip)
        if place is not None and place[1] == address:
            return
        target = np.frombuffer(memory.view, dtype=np.uint8)[strip.into * size :]
        spread = as_strided(target, (strip.rows, strip.run), (strip.into_step * size, 1))
        spread[:] = np.frombuffer(view, dtype=np.uint8).reshape(strip.rows, strip.run)

    def _note(self, target: int, box: Box, address: int, first: int, count: int) -> None:
        memory = self._memories[target]
        found = digest.partial(address, memory.dtype, digest.geometry(memory.shape, box), first, count)
        self.digests.append(Partial(target, count, found))


class Filling:
    """One data file and what is wanted of it."""

    def __init__(
        self, file: Opened, work: Iterable[Work], sink: Sink, damage: Callable[[int, int], DamagedCheckpoint]
    ) -> None:
        """`damage` makes the error for bytes that are not those that were written."""
        self._file, self._sink, self._damage = file, sink, damage
        self._left = deque(work)

    def run(self, threads: int) -> None:
        """Fill all targets. Raises DamagedCheckpoint, StorageError; the other threads begin nothing further then."""
        threads = max(1, min(threads, len(self._left)))
        with ThreadPoolExecutor(threads, "stormjib-fill") as pool:
            for done in [pool.submit(self._work) for _ in range(threads)]:
                done.result()

    def _work(self) -> None:
        buffer = _Buffer()
        try:
            while self._left:
                self._do(self._left.popleft(), buffer)
        except IndexError:
            return  # another thread took the last one meanwhile
        except BaseException:
            self._left.clear()
            raise

    def _do(self, work: Work, buffer: _Buffer) -> None:
        if isinstance(work, Strip):
            return self._do_strip(work, buffer)
        read, proof = (work.read, work.digest) if isinstance(work, Piece) else (work, None)
        if proof is None and len(read.cuts) == 1 and read.length == read.cuts[0].length:
            return self._sink.straight(read.cuts[0], self._get)
        view, address = buffer.of(read.length)
        self._get(read.start, view)
        if proof is not None and piece_digest(view) != proof:
            raise self._damage(read.start, read.start + read.length)
        self._sink.put(read, view, address)

    def _do_strip(self, strip: Strip, buffer: _Buffer) -> None:
        if not strip.whole:
            return self._sink.runs(strip, self._get, buffer)
        view, _ = buffer.of(strip.length)
        self._get(strip.start, view)
        self._sink.rows(strip, view)

    def _get(self, start: int, view: memoryview) -> None:
        if self._file.read_into(start, view) != len(view):
            raise self._damage(start, start + len(view))


def runs_of(view: memoryview, rows: int, skip: int, run: int) -> memoryview:
    """The same part of each row, one after the other."""
    runs = np.frombuffer(view, dtype=np.uint8).reshape(rows, -1)[:, skip : skip + run]
    return runs.flatten().data


class _Buffer:
    """Memory of one thread, as long as what it has read at once."""

    def __init__(self) -> None:
        self._held = bytearray()

    def of(self, length: int) -> tuple[memoryview, int]:
        """So many bytes of it, and their address."""
        if len(self._held) < length:
            self._held = bytearray(length)
        address = ctypes.addressof(ctypes.c_char.from_buffer(self._held)) if length else 0
        return memoryview(self._held)[:length], address
