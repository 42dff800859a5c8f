"""From the arena to the storage: pieces are written as they are staged, by a few threads, past the page cache."""

from __future__ import annotations

import os
import queue
import threading
from typing import TYPE_CHECKING

from stormjib_checkpoint.engine.workers import together

if TYPE_CHECKING:
    from collections.abc import Iterator

    from stormjib_checkpoint.engine.arena import Arena
    from stormjib_checkpoint.storage import NewFile, Storage

NICE = 10
"""Writing waits for training, never the other way round."""


class Handover:
    """Numbers of pieces on their way from who stages to who writes; any number of threads may take them."""

    def __init__(self) -> None:
        self._queue: queue.SimpleQueue[int | None] = queue.SimpleQueue()
        self._failed: BaseException | None = None

    def put(self, piece: int) -> None:
        """One more is staged."""
        self._queue.put(piece)

    def end(self, failed: BaseException | None = None) -> None:
        """No more: all are there, or staging has failed."""
        self._failed = failed
        self._queue.put(None)

    def __iter__(self) -> Iterator[int]:
        while (piece := self._queue.get()) is not None:
            yield piece
        self._queue.put(None)  # for the next thread

    def check(self) -> None:
        """After the last piece: raises what has kept the step from being staged."""
        if self._failed is not None:
            raise self._failed


def flush(storage: Storage, path: str, size: int, arena: Arena, handover: Handover, writers: int = 0) -> None:
    """Write a data file from the pieces that are handed over; it is durable on return. Frees each piece, whatever happens.
    As many threads write as the storage wants, or `writers`.

    Raises StorageError, and what `handover` was ended with: then there is no file.
    """
    try:
        with storage.new(path, size) as file:
            together(writers or storage.writers, lambda: _write(file, size, arena, handover))
            handover.check()
    finally:
        for piece in handover:
            arena.free(piece)


def _write(file: NewFile, size: int, arena: Arena, handover: Handover) -> None:
    """What one thread does until there is nothing more to write, or until it fails."""
    os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), NICE)
    for piece in handover:
        try:
            file.write(piece * arena.piece_bytes, arena.bytes_of(piece, size))
        finally:
            arena.free(piece)
