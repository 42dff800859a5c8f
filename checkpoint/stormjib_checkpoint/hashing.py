"""What is said of a file while it is staged: a checksum of each piece of it, and the partial digest of each part."""

from __future__ import annotations

import threading
from bisect import bisect_right
from typing import TYPE_CHECKING, NamedTuple

import xxhash

from stormjib_checkpoint import digest
from stormjib_checkpoint.format import ITEM_BYTES, DataFile
from stormjib_checkpoint.writer import Staged

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from stormjib_checkpoint.image import Image

BLOCK_BYTES = 1024 * 1024
"""Copied and then hashed at once: small enough for a processor's own cache, large enough that taking the GIL again costs nothing."""


class Block(NamedTuple):
    """Bytes of a file that all come from one part. Whole elements: parts begin where their element is aligned, pieces and blocks too."""

    number: int
    """Of the part; 0 is the header."""
    at: int
    upto: int


class Memory(NamedTuple):
    """Where bytes of the file lie, from byte `begins` on."""

    view: memoryview
    address: int
    begins: int = 0


class Hashing:
    """Of a file that is made in memory, piece by piece, in any order and by several threads."""

    def __init__(self, file: Image, piece_bytes: int) -> None:
        self._size, self._piece_bytes = file.size, piece_bytes
        self._starts = [0, *file.starts, file.size]
        self._dtypes = [part.dtype for part in file.parts]
        self._boxes = [digest.geometry(part.shape, part.box) for part in file.parts]
        self._checksums = [""] * -(-file.size // piece_bytes)
        self._digests = [0] * len(file.parts)
        self._adding = threading.Lock()

    @property
    def pieces(self) -> int:
        """How many the file has."""
        return len(self._checksums)

    def spans(self, piece: int) -> Iterator[Block]:
        """A piece, cut where the parts begin."""
        start = piece * self._piece_bytes
        return _spans(self._starts, start, min(start + self._piece_bytes, self._size))

    def blocks(self, piece: int, memory: Memory) -> Iterator[Block]:
        """The blocks of a piece in `memory`: each is hashed, while the processor has it in its cache, when the next one is asked for."""
        checksum, digests = xxhash.xxh3_64(), []
        for span in self.spans(piece):
            for at in range(span.at, span.upto, BLOCK_BYTES):
                block = Block(span.number, at, min(at + BLOCK_BYTES, span.upto))
                yield block
                checksum.update(memory.view[block.at - memory.begins : block.upto - memory.begins])
                if block.number:
                    digests.append((block.number - 1, self._digest(block, memory)))
        self._checksums[piece] = checksum.hexdigest()
        with self._adding:
            for part, partial in digests:
                self._digests[part] += partial

    def staged(self) -> Staged:
        """After all blocks of all pieces."""
        data = DataFile(self._size, self._piece_bytes, tuple(self._checksums))
        return Staged(data, tuple(digest.text(digest.add([found])) for found in self._digests))

    def _digest(self, block: Block, memory: Memory) -> int:
        part = block.number - 1
        dtype, size = self._dtypes[part], ITEM_BYTES[self._dtypes[part]]
        first, count = (block.at - self._starts[block.number]) // size, (block.upto - block.at) // size
        return digest.partial(
            memory.address + block.at - memory.begins, dtype, self._boxes[part], first, count
        )


def _spans(starts: Sequence[int], at: int, end: int) -> Iterator[Block]:
    number = bisect_right(starts, at) - 1
    while at < end:
        upto = min(end, starts[number + 1])
        yield Block(number, at, upto)
        at, number = upto, number + 1
