"""How long a cgroup was refused the processor by its quota: cpu.stat of cgroup v1 and v2, of the process's own cgroup.

In a container the files are mounted from its own cgroup down, so the path that /proc/PID/cgroup gives has to be taken
relative to the mount's root, and where it does not lie below that, the mount is the cgroup itself.
"""

from __future__ import annotations

from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING

from stormjib_health.sampler.proc import read_small

if TYPE_CHECKING:
    from collections.abc import Iterable

_SECONDS = {b"throttled_time": 1e-9, b"throttled_usec": 1e-6}
"""The key in v1 (ns) and in v2 (µs), and what one unit is in seconds."""


def throttled_s(stat: bytes) -> float:
    """Seconds refused so far, from the content of a cpu.stat; 0 where the cgroup has no quota."""
    for line in stat.splitlines():
        key, _, value = line.partition(b" ")
        if key in _SECONDS and value.isdigit():
            return int(value) * _SECONDS[key]
    return 0.0


def stat_path(cgroup: str, mountinfo: str) -> str:
    """Where cpu.stat is, from /proc/PID/cgroup and /proc/self/mountinfo; empty where there is none.

    On a machine with both versions the controller is where v1 names it, else in v2.
    """
    own = _own(cgroup)
    for version in ("cpu", ""):
        mount = _mount(mountinfo, version)
        if version in own and mount is not None:
            return str(_below(own[version], *mount) / "cpu.stat")
    return ""


def _own(cgroup: str) -> dict[str, str]:
    """Path by v1 controller; that of v2 by the empty name. Without those outside of our namespace, which is mounted alone."""
    found: dict[str, str] = {}
    for line in cgroup.splitlines():
        _, controllers, path = line.split(":", 2)
        if not path.startswith("/.."):
            found.update((name, path) for name in controllers.split(","))
    return found


def _mount(mountinfo: str, controller: str) -> tuple[str, str] | None:
    """Root and mount point of the hierarchy that has the controller."""
    for line in mountinfo.splitlines():
        where, _, what = line.partition(" - ")
        kind, _, options = what.split(" ")
        v1 = kind == "cgroup" and controller in options.split(",")
        if v1 if controller else kind == "cgroup2":
            _, _, _, root, point, *_ = where.split(" ")
            return root, point
    return None


def _below(own: str, root: str, point: str) -> PurePosixPath:
    path = PurePosixPath(own)
    return PurePosixPath(point, path.relative_to(root)) if path.is_relative_to(root) else PurePosixPath(point)


class Throttling:
    """Reads the counters of processes; each file at most once in a pass."""

    def __init__(self) -> None:
        self._mounts = Path("/proc/self/mountinfo").read_text()
        self._paths: dict[bytes, str] = {}

    def read(self, pids: Iterable[int]) -> dict[int, float]:
        """Seconds refused so far to the cgroup of each process; 0 where none is known."""
        seen: dict[str, float] = {"": 0.0}
        found: dict[int, float] = {}
        for pid in pids:
            path = self._path(pid)
            if path not in seen:
                seen[path] = throttled_s(read_small(path))
            found[pid] = seen[path]
        return found

    def _path(self, pid: int) -> str:
        cgroup = read_small(f"/proc/{pid}/cgroup")
        if cgroup not in self._paths:
            self._paths[cgroup] = stat_path(cgroup.decode("utf-8", "surrogateescape"), self._mounts)
        return self._paths[cgroup]
