"""From a rank's data file into memory: a few threads take turns through its pieces, and read, prove and copy each.

While one waits for the disk the other hashes, so on a cold disk the proof costs next to nothing.
"""

from __future__ import annotations

import ctypes
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from itertools import groupby
from operator import itemgetter
from typing import TYPE_CHECKING, NamedTuple

from stormjib_checkpoint.pieces import piece_digest

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

    from stormjib_checkpoint.errors import DamagedCheckpoint
    from stormjib_checkpoint.format import DataFile
    from stormjib_checkpoint.storage import Opened

FREE_BYTES = 64 * 1024
"""From this length on a copy lets the other threads go on; below, that would cost more than the copy."""


class Copy(NamedTuple):
    """`length` bytes from `start` of a rank's file, to `into` of a target's memory."""

    rank: int
    start: int
    length: int
    into: int
    target: memoryview
    address: int
    """Of the target's first byte."""


class Piece(NamedTuple):
    """A piece of a file, and the copies that are cut out of it."""

    number: int
    copies: list[Copy]


class Filling:
    """One data file and what is wanted of it."""

    def __init__(
        self,
        file: Opened,
        data: DataFile,
        head_bytes: int,
        copies: Iterable[Copy],
        damage: Callable[[int, int], DamagedCheckpoint],
    ) -> None:
        """`damage` makes the error for bytes that are not those that were written. The first `head_bytes` are proved although nothing
        is wanted of them: nobody else proves them."""
        self._file, self._data, self._damage = file, data, damage
        heads = (Piece(number, []) for number in range(head_bytes // data.piece_bytes))
        self._left = deque([*heads, *_pieces(copies, data.piece_bytes)])

    def run(self, threads: int) -> None:
        """Fill all targets. Raises DamagedCheckpoint, StorageError; the other threads begin no further piece then."""
        threads = max(1, min(threads, len(self._left)))
        with ThreadPoolExecutor(threads, "stormjib-fill") as pool:
            for done in [pool.submit(self._work) for _ in range(threads)]:
                done.result()

    def _work(self) -> None:
        buffer = bytearray(min(self._data.piece_bytes, self._data.bytes))
        address = ctypes.addressof(ctypes.c_char.from_buffer(buffer)) if buffer else 0
        try:
            while self._left:
                self._fill(self._left.popleft(), memoryview(buffer), address)
        except IndexError:
            return  # another thread took the last one meanwhile
        except BaseException:
            self._left.clear()
            raise

    def _fill(self, piece: Piece, buffer: memoryview, address: int) -> None:
        start = piece.number * self._data.piece_bytes
        read = buffer[: min(self._data.piece_bytes, self._data.bytes - start)]
        if (
            self._file.read_into(start, read) != len(read)
            or piece_digest(read) != self._data.pieces[piece.number]
        ):
            raise self._damage(start, start + len(read))
        for copy in piece.copies:
            skipped = copy.start - start
            if copy.length >= FREE_BYTES:
                ctypes.memmove(copy.address + copy.into, address + skipped, copy.length)
            else:
                copy.target[copy.into : copy.into + copy.length] = read[skipped : skipped + copy.length]


def _pieces(copies: Iterable[Copy], piece_bytes: int) -> Iterator[Piece]:
    ordered = sorted(_cut(copies, piece_bytes), key=itemgetter(0))  # two may want the same bytes
    for number, cuts in groupby(ordered, key=itemgetter(0)):
        yield Piece(number, [copy for _, copy in cuts])


def _cut(copies: Iterable[Copy], piece_bytes: int) -> Iterator[tuple[int, Copy]]:
    """Each copy cut at the borders of pieces, with the number of the piece it lies in."""
    for copy in copies:
        at, end = copy.start, copy.start + copy.length
        while at < end:
            number = at // piece_bytes
            upto = min(end, (number + 1) * piece_bytes)
            yield number, copy._replace(start=at, length=upto - at, into=copy.into + at - copy.start)
            at = upto
