"""The agent's own child processes: started without a shell, reaped in one place, each exit told to who waits for it."""

from __future__ import annotations

import os
import signal
import subprocess
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from stormjib_runtime.processes import die_with_parent, exit_code

if TYPE_CHECKING:
    import asyncio
    from collections.abc import Mapping, Sequence

Exited = Callable[[int], None]
"""Is told the exit code, negative for a signal."""


@dataclass(frozen=True)
class Streams:
    """Descriptors that a child gets; the parent keeps and closes its own copies."""

    stdin: int = subprocess.DEVNULL
    stdout: int = subprocess.DEVNULL
    stderr: int = subprocess.DEVNULL


class Children:
    """Reaps every child of this process, also orphans that fell to it: it is PID 1, or a subreaper."""

    def __init__(self, loop: asyncio.AbstractEventLoop, orphan: Callable[[int, int], None]) -> None:
        self._loop = loop
        self._orphan = orphan
        self._running: dict[int, tuple[subprocess.Popen[bytes], Exited]] = {}
        loop.add_signal_handler(signal.SIGCHLD, self._reap)

    def start(
        self,
        argv: Sequence[str],
        env: Mapping[str, str],
        streams: Streams,
        exited: Exited,
        keep: Sequence[int] = (),
        outlive: bool = False,
    ) -> int:
        """Start a program in a session of its own; its pid. `exited` gets the exit code, negative for a signal.

        `keep` are further descriptors that it inherits. It dies with this process unless `outlive`: the zygote has
        ranks to end first.
        """
        process = subprocess.Popen(  # reaped by `_reap`, which sets returncode
            argv,
            env=env,
            stdin=streams.stdin,
            stdout=streams.stdout,
            stderr=streams.stderr,
            pass_fds=keep,
            start_new_session=True,
            preexec_fn=None if outlive else die_with_parent,  # noqa: PLW1509  this process has one thread
        )
        self._running[process.pid] = (process, exited)
        return process.pid

    @property
    def pids(self) -> frozenset[int]:
        return frozenset(self._running)

    def close(self) -> None:
        self._loop.remove_signal_handler(signal.SIGCHLD)

    def _reap(self) -> None:
        while True:
            try:
                pid, status = os.waitpid(-1, os.WNOHANG)
            except ChildProcessError:
                return
            if pid == 0:
                return
            process, exited = self._running.pop(pid, (None, None))
            if process is None or exited is None:
                self._orphan(pid, status)
                continue
            process.returncode = exit_code(status)
            exited(process.returncode)
