"""A cgroup for one process, version 1 or 2, made for a fault and removed after it."""

from __future__ import annotations

import contextlib
import time
from pathlib import Path

from stormjib_fault.words import Refused

REMOVE_S = 2.0


def _mount(controller: str) -> tuple[Path, int]:
    """Where the hierarchy of a controller is mounted, and its version. Raises Refused."""
    second = None
    for line in Path("/proc/self/mounts").read_text().splitlines():
        _, path, kind, options, *_ = line.split()
        if kind == "cgroup" and controller in options.split(","):
            return Path(path), 1
        if kind == "cgroup2":
            second = Path(path)
    # The freezer of version 2 belongs to the core and is in no list.
    if second is not None and (
        controller == "freezer" or controller in (second / "cgroup.controllers").read_text().split()
    ):
        return second, 2
    raise Refused(f"this kernel offers no cgroup controller {controller!r} here")


class Cgroup:
    """One group with one controller. Raises Refused where that may not be made."""

    def __init__(self, controller: str, name: str) -> None:
        root, self.version = _mount(controller)
        self._controller = controller
        self._root = root
        self.path = root / name
        self._homes: dict[int, Path] = {}
        try:
            if self.version == 2 and controller != "freezer":
                (root / "cgroup.subtree_control").write_text(f"+{controller}")
            self.path.mkdir(exist_ok=True)
        except OSError as error:
            raise Refused(f"no cgroup may be made here: {error}") from error

    def take(self, pid: int) -> None:
        """Move a process in, with all its threads."""
        self._homes[pid] = self._home(pid)
        self.write("cgroup.procs", str(pid))

    def write(self, file: str, text: str) -> None:
        """Set a value."""
        (self.path / file).write_text(text)

    def read(self, file: str) -> str:
        """Get a value."""
        return (self.path / file).read_text()

    def stat(self, file: str, key: str) -> int:
        """One number of a file of `key value` lines; 0 where it is absent."""
        for line in self.read(file).splitlines():
            found, _, value = line.partition(" ")
            if found == key:
                return int(value)
        return 0

    def remove(self) -> None:
        """Move back whoever lives in it, born there or not, and remove it. Waits for dying processes, which keep a group busy."""
        home = next(iter(self._homes.values()), self._root)
        deadline = time.monotonic() + REMOVE_S
        while self.path.exists():
            for pid in map(int, self.read("cgroup.procs").split()):
                with contextlib.suppress(ProcessLookupError, FileNotFoundError):
                    (self._homes.get(pid, home) / "cgroup.procs").write_text(str(pid))
            try:
                self.path.rmdir()
            except OSError:
                if time.monotonic() >= deadline:
                    raise
                time.sleep(0.01)

    def _home(self, pid: int) -> Path:
        for line in Path(f"/proc/{pid}/cgroup").read_text().splitlines():
            _, controllers, path = line.split(":", 2)
            if (self.version == 2 and not controllers) or self._controller in controllers.split(","):
                return self._root / path.lstrip("/")
        return self._root
