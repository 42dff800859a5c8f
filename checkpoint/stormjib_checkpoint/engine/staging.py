"""Copying a step into the arena, block by block, each hashed while the processor still has it in its cache."""

from __future__ import annotations

import threading
from contextlib import nullcontext
from typing import TYPE_CHECKING

import torch

from stormjib_checkpoint.engine import memory
from stormjib_checkpoint.engine.workers import is_interrupt, spoiled_by
from stormjib_checkpoint.hashing import Hashing, Memory
from stormjib_checkpoint.tensors import is_direct, on_host

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from stormjib_checkpoint.engine.arena import Arena
    from stormjib_checkpoint.image import Image
    from stormjib_checkpoint.writer import Staged


class Copying:
    """A file on its way into the arena, by as many threads as come to `work`.

    Tensors that are not plain memory of the host have to be brought there first: they are copied one after the other, so that no
    more than one of them is there twice.
    """

    def __init__(
        self, file: Image, locals_: Sequence[torch.Tensor], arena: Arena, staged: Callable[[int], None]
    ) -> None:
        """The file's parts are `locals_` now. `staged` is told the number of each piece as soon as it is whole, by any thread; the
        piece is then held by whoever was told."""
        self._arena, self._staged, self._hashing = arena, staged, Hashing(file, arena.piece_bytes)
        self._sources = [torch.frombuffer(bytearray(file.head), dtype=torch.uint8), *locals_]
        self._starts = [0, *file.starts]
        self._turn = nullcontext() if all(map(is_direct, locals_)) else threading.Lock()
        self._on_host: tuple[int, torch.Tensor] | None = None
        self._changed = threading.Condition()
        self._begun = self._ended = 0
        self._failed: BaseException | None = None

    def work(self) -> None:
        """Fill pieces until none is left that nobody has begun. What goes wrong is raised by `finish`."""
        while True:
            with self._turn:
                piece = self._next()
                if piece is None:
                    return
                try:
                    self._put(piece)
                except BaseException as error:  # whoever finishes raises it
                    self._failed = spoiled_by(error)
                    if is_interrupt(error):
                        raise
                finally:
                    with self._changed:
                        self._ended += 1
                        self._changed.notify_all()

    def finish(self) -> Staged:
        """Work, and wait for whoever else does: the file is whole. Raises what has gone wrong in any thread."""
        self.work()
        with self._changed:
            self._changed.wait_for(lambda: self._ended == self._begun)
        if self._failed is not None:
            raise self._failed
        return self._hashing.staged()

    def _next(self) -> int | None:
        with self._changed:
            if self._failed is not None or self._begun == self._hashing.pieces:
                return None
            self._begun += 1
            return self._begun - 1

    def _put(self, piece: int) -> None:
        """Fill a piece and tell. One that is not filled to its end is let go, or the next save would wait for it."""
        self._arena.take(piece)
        try:
            with torch.no_grad():
                self._fill(piece)
        except BaseException:
            self._arena.free(piece)
            raise
        self._staged(piece)

    def _fill(self, piece: int) -> None:
        for number, at, upto in self._hashing.blocks(piece, Memory(self._arena.view, self._arena.address)):
            source = self._host(number).data_ptr() + at - self._starts[number]
            memory.copy(self._arena.address + at, source, upto - at)

    def _host(self, number: int) -> torch.Tensor:
        tensor = self._sources[number]
        if is_direct(tensor):
            return tensor
        if self._on_host is None or self._on_host[0] != number:
            self._on_host = (number, on_host(tensor))
        return self._on_host[1]
