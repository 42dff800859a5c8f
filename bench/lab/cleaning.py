"""Removes what a laboratory leaves: processes, namespaces, cgroups, shared memory, its folder. Also after kill -9.

A living laboratory holds a lock on its folder's file `lock`, which the kernel lets go when its process dies, however it dies.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import signal
import tempfile
import time
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from bench.lab.network import NETNS, PREFIX, namespaces
from stormjib_fault import proc, shell

if TYPE_CHECKING:
    from collections.abc import Callable

LIMIT_S = 15.0
CGROUPS = Path("/sys/fs/cgroup")


def root() -> Path:
    """Where laboratories have their folders."""
    return Path(tempfile.gettempdir())


def lock(folder: Path) -> int | None:
    """Hold a laboratory; None where somebody else does. Closing the descriptor lets it go."""
    descriptor = os.open(folder / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        return None
    return descriptor


def stale() -> list[str]:
    """Names of laboratories that nobody holds."""
    names = {path.name for path in root().glob(f"{PREFIX}*") if path.is_dir()}
    names |= {name.rpartition("-")[0] for name in namespaces(PREFIX)}
    return sorted(name for name in names if not _held(name))


def _held(name: str) -> bool:
    folder = root() / name
    if not folder.exists():
        return False
    descriptor = lock(folder)
    if descriptor is None:
        return True
    os.close(descriptor)
    return False


def remove(name: str) -> None:
    """Remove one laboratory with all that is in it. Waits until its processes are dead."""
    groups = _cgroups(name)
    for group in groups:
        _thaw(group)
    _kill_all(name)
    for group in groups:
        _until(partial(_removed, group))
    for netns in namespaces(name):
        shell.run("ip", "netns", "delete", netns)
    for folder in Path("/dev/shm").glob(f"stormjib-{job_uid(name)[:8]}-*"):
        shutil.rmtree(folder, ignore_errors=True)
    shutil.rmtree(root() / name, ignore_errors=True)


def job_uid(name: str) -> str:
    """Of a laboratory's job. Its first eight letters name the job's shared memory, so they must be its own."""
    return f"sj{name.removeprefix(PREFIX):0>6}"[:8]


def processes(name: str) -> list[int]:
    """Everything that runs in a laboratory's namespaces."""
    inodes = {os.stat(NETNS / netns).st_ino for netns in namespaces(name)}
    found = []
    for pid in proc.pids():
        with suppress(FileNotFoundError, ProcessLookupError, PermissionError):
            if os.stat(f"/proc/{pid}/ns/net").st_ino in inodes and proc.alive(pid):
                found.append(pid)
    return found


def _kill_all(name: str) -> None:
    def gone() -> bool:
        left = processes(name)
        for pid in left:
            proc.send(pid, signal.SIGKILL)
        return not left

    _until(gone)


def _cgroups(name: str) -> list[Path]:
    return [path for parent in (CGROUPS, *CGROUPS.iterdir()) for path in parent.glob(f"{name}-*")]


def _thaw(group: Path) -> None:
    for file, word in (("freezer.state", "THAWED"), ("cgroup.freeze", "0")):
        if (group / file).exists():
            (group / file).write_text(word)


def _removed(group: Path) -> bool:
    with suppress(OSError):  # a dying process keeps it busy
        group.rmdir()
    return not group.exists()


def _until(done: Callable[[], bool]) -> None:
    """Wait for the kernel to be done with the dead. Raises TimeoutError."""
    deadline = time.monotonic() + LIMIT_S
    while not done():
        if time.monotonic() > deadline:
            raise TimeoutError("processes of a laboratory do not die")
        time.sleep(0.02)
