"""Agents as real processes, and what /proc says about them."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from stormjib_health.sampler.proc import descendants
from stormjib_runtime.ranks import remove_tree
from stormjib_runtime.wire import Env

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

SCRIPTS = Path(__file__).parents[1] / "process" / "scripts"


class AgentProcess:
    """`python -m stormjib_runtime.agent` as the operator starts it, on loopback."""

    def __init__(
        self,
        folder: Path,
        url: str,
        token: str,
        command: Sequence[str],
        slot: int = 0,
        grace_s: float = 12,
        **env: str,
    ) -> None:
        self.folder = folder
        self.out = folder / f"out-{slot}"
        self.err = folder / f"err-{slot}"
        self._env = {
            **os.environ,
            Env.COORDINATOR: url,
            Env.TOKEN: token,
            Env.JOB_UID: f"t{os.getpid()}",
            Env.SLOT: str(slot),
            Env.POD_UID: f"pod-{slot}",
            Env.POD_IP: "127.0.0.1",
            Env.PROCESSES: "2",
            Env.COMMAND: json.dumps(list(command)),
            Env.RUN_DIR: str(folder / f"run-{slot}"),
            Env.GRACE_S: str(grace_s),
            **env,
        }
        self.process = self._start()

    def _start(self) -> subprocess.Popen[bytes]:
        with open(self.out, "ab") as out, open(self.err, "ab") as err:
            return subprocess.Popen(
                [sys.executable, "-m", "stormjib_runtime.agent"], env=self._env, stdout=out, stderr=err
            )

    @property
    def pid(self) -> int:
        return self.process.pid

    def below(self) -> set[int]:
        """Living processes below the agent."""
        return {stat.pid for stat in descendants(self.pid) if stat.state != "Z"}

    def kill_container(self) -> set[int]:
        """SIGKILL the agent and everything below it at once, as an OOM kill of its cgroup does."""
        pids = {self.pid, *self.below()}
        for pid in pids:
            os.kill(pid, signal.SIGSTOP)
        for pid in pids:
            os.kill(pid, signal.SIGKILL)
        self.process.wait(10)
        return pids

    def restart(self) -> None:
        """The container's next life in the same pod."""
        self.process = self._start()

    async def exit(self, limit_s: float = 15.0) -> int:
        return await asyncio.to_thread(self.process.wait, limit_s)

    def close(self) -> None:
        if self.process.poll() is None:
            self.kill_container()
        for left in (self.pages, self.memory, self.copies):  # a killed agent leaves them to its next life
            remove_tree(left)

    @property
    def pages(self) -> Path:
        """Where its ranks and it tell each other their steps."""
        return Path(f"/dev/shm/stormjib-{self._env[Env.JOB_UID][:8]}-{self._env[Env.SLOT]}")

    @property
    def memory(self) -> Path:
        """Where its ranks stage what they save."""
        return Path(f"{self.pages}-steps")

    @property
    def copies(self) -> Path:
        """Where it keeps copies of what others have staged."""
        return Path(f"{self.pages}-copies")

    def lose_node(self) -> None:
        """The whole node is gone, and what its ranks had in its memory."""
        self.kill_container()
        for gone in (self.pages, self.memory, self.copies):
            remove_tree(gone)

    def output(self) -> str:
        return self.out.read_text()

    def errors(self) -> str:
        return self.err.read_text()


def comm(pid: int) -> str:
    """The name of a process; empty where it is gone."""
    try:
        return Path(f"/proc/{pid}/comm").read_text().strip()
    except (FileNotFoundError, ProcessLookupError):
        return ""


def alive(pid: int) -> bool:
    """Whether a process exists and is no zombie."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def cpu_seconds(pid: int) -> float:
    """CPU time that a process has used."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def rss_mb(pid: int) -> float:
    """Memory that a process holds."""
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 1e6


async def until(what: Callable[[], object], limit_s: float = 15.0) -> None:
    """Wait on a condition of the outside world, which tells nobody when it changes."""
    async with asyncio.timeout(limit_s):
        while not what():
            await asyncio.sleep(0.01)
