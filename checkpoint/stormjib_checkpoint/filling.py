"""From a rank's data file into memory: a few threads take turns through what is wanted of it, and read, prove and copy each part.

While one waits for the disk the others digest, so on a cold disk the proof costs next to nothing.
"""

from __future__ import annotations

import ctypes
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from itertools import groupby
from typing import TYPE_CHECKING, NamedTuple

from stormjib_checkpoint import digest
from stormjib_checkpoint.format import ITEM_BYTES
from stormjib_checkpoint.pieces import piece_digest
from stormjib_checkpoint.plan import Cut, Read, Rows, divided

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
ROWS_BYTES = 4 * 1024 * 1024
"""Of short runs that one thread reads before it digests them."""


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


class Part(NamedTuple):
    """Some of the rows of a box."""

    rows: Rows
    begin: int
    end: int


Work = Read | Piece | Part


def pieces(plan: FilePlan, data: DataFile, head_bytes: int) -> Iterator[Piece]:
    """The plan in whole pieces, to be proved by their checksums. The first `head_bytes` are proved although nothing is wanted of them:
    nobody else proves them."""
    size = data.piece_bytes

    def piece(number: int, cuts: list[Cut]) -> Piece:
        start = number * size
        return Piece(Read(start, min(size, data.bytes - start), cuts), data.pieces[number])

    cuts = [
        *(cut for read in plan.reads for cut in read.cuts),
        *(cut for rows in plan.rows for cut in rows.cuts()),
    ]
    ordered = sorted(divided(cuts, size), key=lambda cut: cut.start)
    wanted = {number: list(some) for number, some in groupby(ordered, key=lambda cut: cut.start // size)}
    heads = range(head_bytes // size)
    for number in sorted({*heads, *wanted}):
        yield piece(number, wanted.get(number, []))


def parts(plan: FilePlan) -> Iterator[Work]:
    """The plan as it is: nothing is read but what is wanted, and what lies between."""
    yield from plan.reads
    for rows in plan.rows:
        step = max(1, ROWS_BYTES // rows.row_bytes)
        for begin in range(0, len(rows.starts), step):
            yield Part(rows, begin, min(begin + step, len(rows.starts)))


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

    def rows(self, part: Part, get: Callable[[int, memoryview], None], buffer: _Buffer) -> None:
        """Have short runs read one after the other into one memory, in which they are what both boxes share, row by row."""
        rows, memory = part.rows, self._memories[part.rows.target]
        size, length = ITEM_BYTES[memory.dtype], rows.row_bytes
        starts, intos = rows.starts[part.begin : part.end].tolist(), rows.into[part.begin : part.end].tolist()
        count = len(starts)
        together = intos[-1] - intos[0] == (count - 1) * rows.length
        if together:
            at = intos[0] * size
            view, address = memory.view[at : at + count * length], memory.address + at
        else:
            view, address = buffer.of(count * length)
        for number, start in enumerate(starts):
            get(start, view[number * length : (number + 1) * length])
        self._note(rows.target, rows.shared, address, part.begin * rows.length, count * rows.length)
        for number, into in enumerate(intos) if not together else ():
            memory.view[into * size : into * size + length] = view[number * length : (number + 1) * length]

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
        if isinstance(work, Part):
            return self._sink.rows(work, self._get, buffer)
        read, proof = (work.read, work.digest) if isinstance(work, Piece) else (work, None)
        if proof is None and len(read.cuts) == 1 and read.length == read.cuts[0].length:
            return self._sink.straight(read.cuts[0], self._get)
        view, address = buffer.of(read.length)
        self._get(read.start, view)
        if proof is not None and piece_digest(view) != proof:
            raise self._damage(read.start, read.start + read.length)
        self._sink.put(read, view, address)

    def _get(self, start: int, view: memoryview) -> None:
        if self._file.read_into(start, view) != len(view):
            raise self._damage(start, start + len(view))


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
