"""The memory that steps are staged in: taken once, touched before the first save, reused by all.

Cut into pieces, each free or held by the save that fills it. A newer save takes a piece as soon as the older one has written it, so one
arena of the size of the rank's file is enough, and two saves may overlap.
"""

from __future__ import annotations

import ctypes
import mmap
import threading

from stormjib_checkpoint.engine import memory
from stormjib_checkpoint.errors import ArenaTooLarge
from stormjib_checkpoint.format import PIECE_BYTES

ALIGNMENT = 4096
"""Of address and length of what goes to the disk past the page cache."""


class Arena:
    """Anonymous memory of this process: what is staged in it and not yet on the storage dies with the process."""

    def __init__(self, size: int) -> None:
        """Raises ArenaTooLarge before anything is taken."""
        self.size = max(-(-size // ALIGNMENT) * ALIGNMENT, ALIGNMENT)
        room = memory.room()
        if self.size > room:
            raise ArenaTooLarge(
                f"staging this rank's {size} bytes needs as much host memory again, and {room} are free within the limits; "
                "raise the memory limit, or train on more ranks"
            )
        self._map = mmap.mmap(-1, self.size)
        self._map.madvise(mmap.MADV_HUGEPAGE)
        self.view = memoryview(self._map)
        self.address = ctypes.addressof(ctypes.c_char.from_buffer(self._map))
        self.piece_bytes = PIECE_BYTES
        self._held = [False] * -(-self.size // PIECE_BYTES)
        self._changed = threading.Condition()

    def touch(self) -> None:
        """Have every page now: the first save shall not be slower than the others."""
        if not memory.touch(self.address, self.size):
            for start in range(0, self.size, memory.PAGE):
                self.view[start] = 0

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
        end = min(start + self.piece_bytes, -(-size // ALIGNMENT) * ALIGNMENT)
        return self.view[start:end]
