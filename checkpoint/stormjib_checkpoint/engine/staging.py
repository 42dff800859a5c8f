"""Copying a step into the arena, block by block, each hashed while the processor still has it in its cache."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import xxhash

from stormjib_checkpoint.engine import memory
from stormjib_checkpoint.tensors import on_host

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from stormjib_checkpoint.engine.arena import Arena
    from stormjib_checkpoint.image import Image

BLOCK_BYTES = 1024 * 1024
"""Copied and then hashed at once: small enough for a processor's own cache, large enough that taking the GIL again costs nothing."""


def stage(
    file: Image, locals_: Sequence[torch.Tensor], arena: Arena, staged: Callable[[int, str], None]
) -> None:
    """Fill the arena with the file whose parts are `locals_` now. `staged` is told the number and xxh3_64 of each piece as soon as it
    is whole; the piece is then held by whoever was told."""
    filling = _Filling(file.size, arena, staged)
    try:
        filling.put(torch.frombuffer(bytearray(file.head), dtype=torch.uint8))
        with torch.no_grad():
            for local in locals_:
                filling.put(on_host(local))
    finally:
        filling.let_go()


class _Filling:
    """The file from front to back."""

    def __init__(self, size: int, arena: Arena, staged: Callable[[int, str], None]) -> None:
        self._size, self._arena, self._staged = size, arena, staged
        self._piece_bytes = arena.piece_bytes
        self._at = 0
        self._piece: int | None = None
        """The one that is being filled."""
        self._hash = xxhash.xxh3_64()

    def put(self, tensor: torch.Tensor) -> None:
        """The next bytes, from a contiguous tensor of the CPU."""
        source, left = tensor.data_ptr(), tensor.numel() * tensor.element_size()
        while left:
            if self._at % self._piece_bytes == 0:
                self._take(self._at // self._piece_bytes)
            count = min(left, BLOCK_BYTES, self._piece_bytes - self._at % self._piece_bytes)
            memory.copy(self._arena.address + self._at, source, count)
            self._hash.update(self._arena.view[self._at : self._at + count])
            source, left, self._at = source + count, left - count, self._at + count
            if self._at % self._piece_bytes == 0 or self._at == self._size:
                self._close()

    def let_go(self) -> None:
        """Of a piece that will not be filled to its end: the next save would wait for it."""
        if self._piece is not None:
            self._arena.free(self._piece)

    def _take(self, piece: int) -> None:
        self._arena.take(piece)
        self._piece = piece

    def _close(self) -> None:
        assert self._piece is not None
        piece, self._piece = self._piece, None
        self._staged(piece, self._hash.hexdigest())
        self._hash.reset()
