"""Running programs, and finding the processes of a cluster.

No pid files: a pid may be another process tomorrow. Whatever we start carries `MARKER` in its environment, and what a
node starts in turn lies in the node's own namespaces.
"""

from __future__ import annotations

import os
import subprocess
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from stormjib_local.errors import CommandFailed, Timeout

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

MARKER = "STORMJIB_LOCAL"
PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
_EXEC_S = 0.5
_KERNEL_THREAD = 0x00200000
"""PF_KTHREAD of the kernel's include/linux/sched.h."""
# Programs that only lead to another one, and containerd's children, which inherit its environment.
_WRAPPERS = frozenset({"setsid", "nsenter", "unshare", "containerd-shim"})


@dataclass(frozen=True)
class Process:
    """One process of a cluster. `component` is what started it, not always what it is."""

    pid: int
    name: str
    host: str
    component: str

    @property
    def is_component(self) -> bool:
        """Is it the program itself, and not one that leads to it or was started by it?"""
        return self.name not in _WRAPPERS


def run(*argv: str | Path, stdin: str | None = None, check: bool = True, timeout: float = 60) -> str:
    """Output of a program that ends by itself."""
    command = [str(word) for word in argv]
    environment = os.environ | {"PATH": f"{os.environ.get('PATH', '')}:{PATH}"}
    try:
        done = subprocess.run(
            command,
            input=stdin,
            check=False,
            capture_output=True,
            text=True,
            timeout=timeout,
            env=environment,
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise CommandFailed(f"{' '.join(command)}: {error}") from error
    if check and done.returncode:
        raise CommandFailed(f"{' '.join(command)} ended with {done.returncode}: {tail(done.stderr)}")
    return done.stdout


def spawn(argv: Sequence[str | Path], *, marker: str, log: Path) -> None:
    """Start a program that outlives us: a session of its own, output to `log`, nobody's child but init's."""
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("ab") as output:
        done = subprocess.run(
            ["setsid", "--fork", *(str(word) for word in argv)],
            check=False,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            cwd="/",
            env={"PATH": PATH, "LANG": "C.UTF-8", MARKER: marker},
        )
    if done.returncode:
        raise CommandFailed(f"cannot start {argv[0]}: setsid ended with {done.returncode}")


def tail(text: str, lines: int = 12) -> str:
    """The last lines of a program's output."""
    return "\n".join(text.strip().splitlines()[-lines:])


def wait_until(what: str, seconds: float, done: Callable[[], bool], interval: float = 0.05) -> None:
    """Ask `done` again and again until it says yes."""
    deadline = time.monotonic() + seconds
    while not done():
        if time.monotonic() > deadline:
            raise Timeout(f"{what}: not within {seconds:g} s")
        time.sleep(interval)


def pids() -> list[int]:
    """Every process of the machine."""
    return [int(entry) for entry in os.listdir("/proc") if entry.isdigit()]


def marked(cluster: str) -> Iterator[Process]:
    """The living processes that carry our marker (with those that they started, if these kept the environment)."""
    prefix = f"{MARKER}={cluster}/".encode()
    for pid in pids():
        for word in environment(pid).split(b"\0"):
            if word.startswith(prefix):
                _, host, component = word.decode().split("/", 2)
                yield Process(pid, _read(pid, "comm").decode().strip(), host, component)
                break


def environment(pid: int) -> bytes:
    """What a process was started with; empty for one that is gone.

    While it executes another program the kernel shows no environment, on a busy disk for long enough to be met: then it is
    asked again.
    """
    deadline = time.monotonic() + _EXEC_S
    while not (found := _read(pid, "environ")) and _becomes_another(pid) and time.monotonic() < deadline:
        time.sleep(0.001)
    return found


def _becomes_another(pid: int) -> bool:
    """Whether a process that showed no environment may show one soon: no zombie, no thread of the kernel, not without."""
    fields = _read(pid, "stat").rpartition(b")")[2].split()
    if len(fields) < 49 or fields[0] in (b"Z", b"X") or int(fields[6]) & _KERNEL_THREAD:
        return False
    program, start, end = (
        int(fields[at]) for at in (23, 47, 48)
    )  # addresses: execve gives that of the code last
    return not program or start != end


def init_of(cluster: str, host: str) -> int | None:
    """The process with pid 1 in the host's own pid namespace: while it lives, the host has power."""
    for process in marked(cluster):
        if (process.host, process.component, process.name) == (host, "init", "sleep"):
            status = _read(process.pid, "status").decode()
            numbers = next((line for line in status.splitlines() if line.startswith("NSpid:")), "").split()
            if len(numbers) > 2 and numbers[-1] == "1":
                return process.pid
    return None


def inside(namespaces: set[int], cgroups: str) -> list[int]:
    """Processes in one of these network namespaces, or in a cgroup whose first folder begins with `cgroups`."""
    needle = f":/{cgroups}".encode()
    return [pid for pid in pids() if network_of(pid) in namespaces or needle in _read(pid, "cgroup")]


def network_of(pid: int) -> int | None:
    """The inode of a process's network namespace."""
    try:
        return os.stat(f"/proc/{pid}/ns/net").st_ino
    except OSError:
        return None


def cgroup_lines(pid: int) -> list[str]:
    """The cgroups of a process, one path per hierarchy."""
    return [line.split(":", 2)[2] for line in _read(pid, "cgroup").decode().splitlines()]


def _read(pid: int, file: str) -> bytes:
    # A process may end between the listing and the reading, and a zombie has no environment: both read as empty.
    try:
        return Path(f"/proc/{pid}/{file}").read_bytes()
    except OSError:
        return b""
