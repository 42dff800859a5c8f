"""Bytes of this process by their addresses: copied and compared by the C library, without the GIL and without threads of torch."""

from __future__ import annotations

import ctypes
import mmap
from pathlib import Path

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


def room() -> int:
    """Bytes that this process can take before the machine or its cgroup (v1 or v2) ends something."""
    return min(_available(), _cgroup_room())


def _available() -> int:
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    return 1 << 62


def _cgroup_room() -> int:
    """As far as the limits can be seen from inside; in a pod its own cgroup is the root of what it sees."""
    pairs = (
        ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory.current"),
        ("/sys/fs/cgroup/memory/memory.limit_in_bytes", "/sys/fs/cgroup/memory/memory.usage_in_bytes"),
    )
    for limit, usage in pairs:
        try:
            most, used = Path(limit).read_text().strip(), Path(usage).read_text().strip()
        except OSError:
            continue
        return 1 << 62 if most == "max" else max(0, int(most) - int(used))
    return 1 << 62
