"""The memory that steps are staged in: taken once, touched before the first save, reused by all.

Cut into pieces, each free or held by the save that fills it. A newer save takes a piece as soon as the older one has written it, so one
arena of the size of the rank's file is enough, and two saves may overlap.
"""

from __future__ import annotations

import ctypes
import logging
import mmap
import threading
import weakref
from typing import TYPE_CHECKING

from stormjib_checkpoint import room
from stormjib_checkpoint.engine import memory, pinning
from stormjib_checkpoint.format import PIECE_BYTES

if TYPE_CHECKING:
    from pathlib import Path


_log = logging.getLogger(__name__)


class Arena:
    """Memory of this process, which dies with it; or with `file`, which should be on a memory-backed volume, memory that outlives it."""

    def __init__(self, size: int, file: Path | None = None) -> None:
        """Raises ArenaTooLarge before anything is taken."""
        self.size = room.aligned(size)
        room.check(self.size, room.allocated(file) if file else 0)
        self._map = mmap.mmap(-1, self.size) if file is None else room.mapped(file, self.size)
        self._map.madvise(mmap.MADV_HUGEPAGE)
        self.view = memoryview(self._map)
        self.address = ctypes.addressof(ctypes.c_char.from_buffer(self._map))
        self.piece_bytes = PIECE_BYTES
        self._pinned = False
        self._held = [False] * -(-self.size // PIECE_BYTES)
        self._changed = threading.Condition()

    def touch(self) -> None:
        """Have every page now: the first save shall not be slower than the others."""
        if not memory.touch(self.address, self.size):
            for start in range(0, self.size, memory.PAGE):
                self.view[start] = 0

    def pin(self) -> None:
        """Have a device copy to it beside the processor; where that is forbidden copies are slower, and nothing else."""
        if self._pinned:
            return
        self._pinned = True
        if pinning.pin(self.address, self.size):
            weakref.finalize(self, pinning.unpin, self.address)
        else:
            _log.warning(
                "copies from the GPU are slower: %d bytes may not be locked; raise RLIMIT_MEMLOCK", self.size
            )

    def take(self, piece: int) -> None:
        """Hold a piece; waits until the save before has written it."""
        with self._changed:
            self._changed.wait_for(lambda: not self._held[piece])
            self._held[piece] = True

    def free(self, piece: int) -> None:
        """Give a piece back."""
        with self._changed:
            self._held[piece] = False
            self._changed.notify_all()

    def bytes_of(self, piece: int, size: int) -> memoryview:
        """A piece of a file of `size` bytes, filled up to the alignment of the disk."""
        start = piece * self.piece_bytes
        end = min(start + self.piece_bytes, room.aligned(size))
        return self.view[start:end]
