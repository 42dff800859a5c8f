"""The parts of a multipart upload: how large they are, and putting them together from pieces that come in any order."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING, NamedTuple

from stormjib_checkpoint.format import PIECE_BYTES

if TYPE_CHECKING:
    from collections.abc import Iterator

MAX_PARTS = 9_000
"""Stores allow 10,000."""


def part_bytes(size: int) -> int:
    """Whole pieces, and no more than `MAX_PARTS` of them in a file of `size` bytes."""
    pieces = max(1, -(-size // PIECE_BYTES))
    return -(-pieces // MAX_PARTS) * PIECE_BYTES


class Part(NamedTuple):
    """A part that is whole: `source[start:end]`, which is the caller's memory where it is `borrowed`."""

    number: int
    source: memoryview
    start: int
    end: int
    borrowed: bool


class Parts:
    """A file of `size` bytes, each of which is written once. Any number of threads may write."""

    def __init__(self, size: int, length: int) -> None:
        self.count = -(-size // length)
        self._size, self._length = size, length
        self._begun: dict[int, bytearray] = {}
        self._there: dict[int, int] = {}
        self._left = size
        self._lock = threading.Lock()

    @property
    def whole(self) -> bool:
        """Whether every byte has come."""
        return self._left == 0

    def put(self, offset: int, data: memoryview) -> Iterator[Part]:
        """Take bytes; the parts that are whole with them. Only what does not fill a part by itself is copied."""
        data = data.cast("B")[: max(0, self._size - offset)]
        end = offset + len(data)
        for number in range(offset // self._length, -(-end // self._length)):
            first = number * self._length
            last = min(first + self._length, self._size)
            start, stop = max(first, offset), min(last, end)
            if (start, stop) == (first, last):
                self._count(stop - start)
                yield Part(number, data, start - offset, stop - offset, borrowed=True)
            elif self._fill(number, data[start - offset : stop - offset], start - first, last - first):
                yield Part(number, memoryview(self._begun.pop(number)), 0, last - first, borrowed=False)

    def _fill(self, number: int, data: memoryview, at: int, length: int) -> bool:
        """Copy into a part of `length` bytes; whether that makes it whole."""
        with self._lock:
            if number not in self._begun:
                self._begun[number] = bytearray(length)
            buffer = self._begun[number]
        buffer[at : at + len(data)] = data
        self._count(len(data))
        with self._lock:
            self._there[number] = self._there.get(number, 0) + len(data)
            return self._there[number] == length

    def _count(self, done: int) -> None:
        with self._lock:
            self._left -= done
