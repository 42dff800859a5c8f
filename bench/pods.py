"""Processes of pods as the machine sees them: which are an agent, which ranks, what they cost. Root on the same machine."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path

PROC = Path("/proc")
TICKS_PER_S = os.sysconf("SC_CLK_TCK")


@dataclass(frozen=True)
class Process:
    """One process of a pod. `session` is the pid of its session's leader."""

    pid: int
    parent: int
    session: int
    state: str
    name: str
    command: str

    @property
    def cpu_s(self) -> float:
        """CPU seconds used so far, user and system; 0 when it is gone."""
        fields = _stat(self.pid)
        return (int(fields[11]) + int(fields[12])) / TICKS_PER_S if fields else 0.0

    @property
    def rss_mb(self) -> float:
        """Resident memory in MB (10^6 bytes)."""
        return int((PROC / str(self.pid) / "statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 1e6

    def send(self, sig: int) -> None:
        """Send a signal."""
        os.kill(self.pid, sig)


def of_pod(uid: str) -> list[Process]:
    """Every process in the cgroup of the pod with this uid, the oldest first."""
    names = (uid, uid.replace("-", "_"))
    found = [p for p in map(_process, _pids_in(names)) if p is not None]
    return sorted(found, key=lambda p: p.pid)


def agent_of(uid: str) -> Process | None:
    """The agent of a slot's pod."""
    return next((p for p in of_pod(uid) if "stormjib_runtime.agent" in p.command), None)


def ranks_of(uid: str) -> list[Process]:
    """The ranks of a slot's pod: named by the zygote that forked them."""
    return [p for p in of_pod(uid) if re.fullmatch(r"rank\d+", p.name)]


def torchrun_workers_of(uid: str) -> list[Process]:
    """The workers that stock torchrun started in a slot's pod."""
    found = of_pod(uid)
    torchruns = {p.pid for p in found if "torch.distributed.run" in p.command}
    return [p for p in found if p.parent in torchruns and "stormjib_trainer" in p.command]


def _pids_in(names: tuple[str, ...]) -> list[int]:
    pids = []
    for entry in PROC.iterdir():
        if entry.name.isdecimal():
            try:
                groups = (entry / "cgroup").read_text()
            except OSError:
                continue
            if any(name in groups for name in names):
                pids.append(int(entry.name))
    return pids


def _process(pid: int) -> Process | None:
    fields = _stat(pid)
    try:
        name = (PROC / str(pid) / "comm").read_text().strip()
        command = (PROC / str(pid) / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
    except OSError:
        return None
    return Process(pid, int(fields[1]), int(fields[3]), fields[0], name, command) if fields else None


def _stat(pid: int) -> list[str]:
    """Fields of /proc/PID/stat from the state letter on; empty when the process is gone."""
    try:
        return (PROC / str(pid) / "stat").read_text().rpartition(") ")[2].split()
    except OSError:
        return []
