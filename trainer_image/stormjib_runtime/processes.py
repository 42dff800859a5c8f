"""How a tree of processes ends, and what it leaves on /dev/shm. Linux only, standard library only."""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import os
import re
import signal
from pathlib import Path
from typing import TYPE_CHECKING

from stormjib_health.sampler.proc import descendants

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterable

SHM = Path("/dev/shm")

_PR_SET_PDEATHSIG = 1
_PR_SET_NAME = 15
_PR_SET_CHILD_SUBREAPER = 36
_FIRST_DELAY_S, _LAST_DELAY_S = 0.001, 0.02


def kill(pid: int, number: signal.Signals = signal.SIGKILL) -> None:
    """Send a signal to a process that may be gone already."""
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, number)


async def end_descendants(root: int, keep: Callable[[], Collection[int]]) -> list[int]:
    """SIGKILL everything below `root` but `keep`, again and again until none is left; the pids that were ended.

    Again and again, because a process can fork between the look and the kill. A zombie is not left: its memory is
    free and its parent knows. `keep` is asked in each round, because what to keep may die and be replaced meanwhile.
    """
    ended: set[int] = set()
    delay = _FIRST_DELAY_S
    while True:
        kept = keep()
        left = [stat.pid for stat in descendants(root) if stat.pid not in kept and stat.state != "Z"]
        if not left:
            return sorted(ended)
        for pid in left:
            kill(pid)
        ended.update(left)
        await asyncio.sleep(delay)
        delay = min(2 * delay, _LAST_DELAY_S)


def become_subreaper() -> None:
    """Orphans below this process become its children, as they do below PID 1: a daemon of a rank stays in the tree."""
    _prctl(_PR_SET_CHILD_SUBREAPER, 1)


def die_with_parent() -> None:
    """The kernel ends this process when its parent dies. Lost at the next fork, kept over exec."""
    _prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def call_myself(name: str) -> None:
    """What `ps -o comm` and `top` show: all forks of a zygote have its command line."""
    _prctl(_PR_SET_NAME, name.encode()[:15])


def _prctl(option: int, value: int | bytes) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(option, value, 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), f"prctl({option}) failed")


def shared_memory_files(folder: Path = SHM) -> frozenset[str]:
    """Names on /dev/shm now."""
    try:
        return frozenset(os.listdir(folder))
    except FileNotFoundError:
        return frozenset()


def leftovers(before: Collection[str], now: Iterable[str], ended: Collection[int], alone: bool) -> list[str]:
    """Which of the names `now` on /dev/shm were left by ranks that have been killed.

    `alone`: we are PID 1, so everything that appeared since `before` is theirs. Else others share the folder, and
    only names that carry a dead rank's pid (torch's do: `torch_<pid>_...`) are.
    """
    new = sorted(name for name in now if name not in before and not name.startswith("stormjib-"))
    if alone:
        return new
    pids = {str(pid) for pid in ended}
    return [name for name in new if pids.intersection(re.split(r"\D+", name))]


def remove_files(names: Iterable[str], folder: Path = SHM) -> None:
    """Remove our own plain files; what is another user's or already gone stays so."""
    for name in names:
        with contextlib.suppress(FileNotFoundError, PermissionError, IsADirectoryError):
            os.unlink(folder / name)


def exit_code(status: int) -> int:
    """A wait status as `subprocess` gives it: the exit code, or minus the signal."""
    return os.waitstatus_to_exitcode(status)
