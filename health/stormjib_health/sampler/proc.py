"""What /proc says about processes. Linux only, standard library only; the agent uses it too."""

from __future__ import annotations

import os
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

TICKS_PER_S = os.sysconf("SC_CLK_TCK")
IDLE_SHARE = 0.05
"""Below this share of a core a process does nothing worth the name."""
WINDOW_S = 0.5
"""CPU use is judged over at least this long: the kernel counts in ticks of 10 ms."""
BLINK_S = 2.0
"""Between two looks of ours: then we ourselves did not run, nor perhaps did anybody here, and nothing that lasted so long counts."""
STOPPED = frozenset("Tt")
HALTED = STOPPED | frozenset("ZD")
"""States in which a process does not run and no event of its own wakes it; D may also be a short wait for a device."""


@dataclass(frozen=True)
class Stat:
    """The fields of /proc/PID/stat that matter here."""

    pid: int
    state: str
    parent: int
    ticks: int
    """CPU time used so far by all threads, in ticks."""


@dataclass(frozen=True)
class Activity:
    """What a series of `Stat`s says about a process."""

    state: str
    state_age_s: float
    """Seconds the state has been one of HALTED; 0 in any other state."""
    idle_s: float
    """Seconds in which the process used less than IDLE_SHARE of a core."""


UNSEEN = Activity("R", 0.0, 0.0)
"""Of a process that was not looked at yet."""


class Watch:
    """Turns samples of one process into an `Activity`. Pure: the clock is a parameter."""

    def __init__(self) -> None:
        self._state = "R"
        self._state_since: float | None = None
        self._ticks = 0
        self._window: tuple[float, int] | None = None
        self._idle_since: float | None = None
        self._looked = 0.0

    def sample(self, now: float, stat: Stat) -> Activity:
        """Take one more sample; what is known now."""
        if now - self._looked > BLINK_S:
            self._state_since = self._window = self._idle_since = None
        self._looked = now
        if stat.state not in HALTED:
            self._state_since = None
        elif self._state_since is None or stat.state != self._state or self._ran(stat):
            self._state_since = now
        self._state, self._ticks = stat.state, stat.ticks
        self._judge_use(now, stat.ticks)
        return Activity(stat.state, _since(now, self._state_since), _since(now, self._idle_since))

    def _ran(self, stat: Stat) -> bool:
        """It is stopped now as it was before, and ran in between: somebody stops it again and again."""
        return stat.state in STOPPED and stat.ticks != self._ticks

    def _judge_use(self, now: float, ticks: int) -> None:
        if self._window is None:
            self._window = (now, ticks)
            return
        start, before = self._window
        if now - start < WINDOW_S:
            return
        busy = (ticks - before) / TICKS_PER_S >= IDLE_SHARE * (now - start)
        self._idle_since = None if busy else start if self._idle_since is None else self._idle_since
        self._window = (now, ticks)


def _since(now: float, start: float | None) -> float:
    return 0.0 if start is None else now - start


def read_stat(pid: int) -> Stat | None:
    """The process's state now, or None when it is gone."""
    line = read_small(f"/proc/{pid}/stat")
    return parse_stat(line) if line else None


def parse_stat(line: bytes) -> Stat:
    """One line of /proc/PID/stat. The name may hold blanks and parentheses, so fields count from its last `)`."""
    head, _, tail = line.rpartition(b")")
    fields = tail.split(None, 13)
    return Stat(
        pid=int(head.split(b" ", 1)[0]),
        state=fields[0].decode(),
        parent=int(fields[1]),
        ticks=int(fields[11]) + int(fields[12]),
    )


class StatFile:
    """What the kernel says of one process. Its files are opened once: opening a file of /proc costs more than reading it,
    and a number that is used again is never mistaken."""

    def __init__(self, pid: int) -> None:
        self._stat = _open(f"/proc/{pid}/stat")
        self._schedule = _open(f"/proc/{pid}/schedstat")

    def read(self) -> Stat | None:
        """The process's state now, or None when it is gone."""
        try:
            return parse_stat(os.pread(self._stat, 1024, 0))
        except OSError:
            return None

    def queued_s(self) -> float:
        """How long its main thread has been ready to run and waited for a processor; 0 where the kernel does not tell."""
        try:
            return parse_schedule(os.pread(self._schedule, 128, 0))[1]
        except OSError:
            return 0.0

    def close(self) -> None:
        for file in (self._stat, self._schedule):
            if file >= 0:
                os.close(file)
        self._stat = self._schedule = -1


def _open(path: str) -> int:
    with suppress(OSError):
        return os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    return -1


def parse_schedule(line: bytes) -> tuple[float, float]:
    """Seconds on a processor, and ready to run without one, of /proc/PID/schedstat; zeros where accounting is switched off."""
    fields = line.split()
    return (int(fields[0]) * 1e-9, int(fields[1]) * 1e-9) if len(fields) == 3 else (0.0, 0.0)


def read_wchan(pid: int) -> str:
    """Where in the kernel the main thread sleeps; empty where it runs, is gone, or the kernel does not tell."""
    name = read_small(f"/proc/{pid}/wchan").decode("ascii", "replace")
    return "" if name == "0" else name[:64]


def read_small(path: str) -> bytes:
    """The first 4 KiB of a file of the kernel's; nothing where its process is gone or another user's."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except (FileNotFoundError, ProcessLookupError, PermissionError):
        return b""
    try:
        return os.read(descriptor, 4096)
    except (ProcessLookupError, PermissionError):
        return b""
    finally:
        os.close(descriptor)


def children() -> dict[int, list[Stat]]:
    """Every process by its parent, as /proc shows them in one pass."""
    found: dict[int, list[Stat]] = {}
    for name in os.listdir("/proc"):
        stat = read_stat(int(name)) if name.isdecimal() else None
        if stat is not None:
            found.setdefault(stat.parent, []).append(stat)
    return found


def below(root: int, family: dict[int, list[Stat]]) -> list[Stat]:
    """Every process below `root`, of what `children` gave."""
    found: dict[int, Stat] = {}
    front = [root]
    while front:
        ones = [stat for stat in family.get(front.pop(), ()) if stat.pid not in found]
        found.update((stat.pid, stat) for stat in ones)
        front += [stat.pid for stat in ones]
    return list(found.values())


def descendants(root: int) -> list[Stat]:
    """Every process below `root` now."""
    return below(root, children())


def ranks_below(root: int) -> dict[int, int]:
    """Process of each rank below a launcher that starts them itself (torchrun): the topmost with RANK in its environment."""
    found: dict[int, int] = {}
    for stat in descendants(root):
        rank = _rank(stat.pid)
        if rank is not None:
            found.setdefault(rank, stat.pid)
    return found


def _rank(pid: int) -> int | None:
    try:
        words = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
    except OSError:  # gone, or another user's
        return None
    value = next((word[5:] for word in words if word.startswith(b"RANK=")), b"")
    return int(value) if value.isdigit() and len(value) < 10 else None


def open_sockets(pid: int) -> set[int]:
    """Inodes of the sockets that a process holds; none where it is gone or another user's."""
    found: set[int] = set()
    folder = f"/proc/{pid}/fd"
    try:
        names = os.listdir(folder)
    except OSError:
        return found
    for name in names:
        try:
            target = os.readlink(f"{folder}/{name}")
        except OSError:  # closed meanwhile
            continue
        if target.startswith("socket:["):
            found.add(int(target[8:-1]))
    return found
