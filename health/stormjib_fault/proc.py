"""What /proc says about a process. Nothing here raises for a process that is gone."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import signal

GONE = ""


def _fields(pid: int) -> list[str]:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return []


def state(pid: int) -> str:
    """State letter, or GONE."""
    fields = _fields(pid)
    return fields[0] if fields else GONE


def alive(pid: int) -> bool:
    """Whether it exists and is no zombie."""
    return state(pid) not in (GONE, "Z", "X")


def parent(pid: int) -> int:
    """Its parent's pid; 0 for none."""
    fields = _fields(pid)
    return int(fields[1]) if fields else 0


def name(pid: int) -> str:
    """As `ps` shows it."""
    try:
        return Path(f"/proc/{pid}/comm").read_text().strip()
    except (FileNotFoundError, ProcessLookupError):
        return ""


def pids() -> list[int]:
    """Every process that can be seen."""
    return [int(entry) for entry in os.listdir("/proc") if entry.isdecimal()]


def below(root: int) -> list[int]:
    """All living descendants of a process."""
    parents = {pid: parent(pid) for pid in pids()}
    found, wave = [], {root}
    while wave:
        wave = {pid for pid, above in parents.items() if above in wave and pid != above}
        found += sorted(wave)
    return [pid for pid in found if alive(pid)]


def cpu_s(pid: int) -> float:
    """Processor time of all its threads, by the scheduler's own books, which are finer than ticks."""
    total = 0
    try:
        threads = os.listdir(f"/proc/{pid}/task")
    except (FileNotFoundError, ProcessLookupError):
        return 0.0
    for thread in threads:
        try:
            total += int(Path(f"/proc/{pid}/task/{thread}/schedstat").read_text().split()[0])
        except (FileNotFoundError, ProcessLookupError):
            continue  # a thread that ended while we looked
    return total / 1e9


def environment(pid: int) -> dict[str, str]:
    """Its environment as it was when it was executed; empty where that may not be read."""
    try:
        raw = Path(f"/proc/{pid}/environ").read_bytes()
    except (FileNotFoundError, ProcessLookupError, PermissionError):
        return {}
    pairs = (item.partition(b"=") for item in raw.split(b"\0") if b"=" in item)
    return {key.decode(errors="replace"): value.decode(errors="replace") for key, _, value in pairs}


def send(pid: int, number: signal.Signals) -> bool:
    """Signal it; whether it was there."""
    try:
        os.kill(pid, number)
    except ProcessLookupError:
        return False
    return True
