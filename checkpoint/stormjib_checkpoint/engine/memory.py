"""Bytes of this process by their addresses: copied and compared by the C library, without the GIL and without threads of torch."""

from __future__ import annotations

import ctypes
import mmap

PAGE = mmap.PAGESIZE
_POPULATE_WRITE = 23
"""madvise(2), Linux 5.14: touch every page as by a write. Python has no name for it."""

_libc = ctypes.CDLL(None, use_errno=True)
_libc.memcmp.argtypes = (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t)
_libc.madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)


def copy(target: int, source: int, size: int) -> None:
    """Copy `size` bytes from one address to another."""
    ctypes.memmove(target, source, size)


def differ(one: int, other: int, size: int) -> bool:
    """Whether `size` bytes at two addresses differ."""
    return bool(_libc.memcmp(one, other, size))


def touch(address: int, size: int) -> bool:
    """Have the kernel give all pages of a mapping now; False where it cannot be asked to."""
    return bool(_libc.madvise(address, size, _POPULATE_WRITE) == 0)
