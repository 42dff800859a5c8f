"""Room for staged steps: how much one takes, how much there is, and files of it on a memory-backed volume."""

from __future__ import annotations

import mmap
import os
from pathlib import Path

from stormjib_checkpoint.errors import ArenaTooLarge

ALIGNMENT = 4096
"""Of address and length of what goes to the disk past the page cache."""


def check(size: int, held: int = 0) -> None:
    """Raises ArenaTooLarge where `size` bytes, of which `held` are taken already, are more than there is."""
    left = free()
    if size - held > left:
        raise ArenaTooLarge(
            f"staging a rank's {size} bytes needs as much host memory again, and {left} are free within the limits; "
            "raise the memory limit, or train on more ranks"
        )


def free() -> int:
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


def aligned(size: int) -> int:
    """Bytes that an arena for a file of `size` bytes has."""
    return max(-(-size // ALIGNMENT) * ALIGNMENT, ALIGNMENT)


def allocated(file: Path) -> int:
    """Bytes of memory that a file has already."""
    try:
        return file.stat().st_blocks * 512
    except FileNotFoundError:
        return 0


def mapped(file: Path, size: int) -> mmap.mmap:
    """A file of exactly this size whose memory is taken now: later there would be SIGBUS where the volume is full."""
    descriptor = os.open(file, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        os.ftruncate(descriptor, size)
        os.posix_fallocate(descriptor, 0, size)
        return mmap.mmap(descriptor, size)
    except OSError as error:
        os.unlink(file)
        raise ArenaTooLarge(
            f"staging a rank's {size} bytes in {file}: {os.strerror(error.errno or 0)}; enlarge the memory-backed volume "
            "there (a pod's /dev/shm has the container's memory limit, or where it has none 1 GiB a rank, 2 with copies for a peer)"
        ) from error
    finally:
        os.close(descriptor)
