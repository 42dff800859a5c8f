"""Ranks forked from one warm process: a test of several worlds pays for torch's import once.

`Warm` is the test's side; the file run as a program is the other: JSON lines on stdin and stdout, one job at a time.
Each job has a store of its own in a process of its own, so that any rank may die.
"""

from __future__ import annotations

import json
import os
import runpy
import signal
import subprocess
import sys
import traceback
from dataclasses import dataclass
from typing import IO, TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence
    from pathlib import Path


@dataclass(frozen=True)
class Job:
    """Ranks that were started: their pids and the files that they print to."""

    pids: list[int]
    folder: Path

    def text(self, rank: int = 0) -> str:
        """What a rank has printed so far, stdout and stderr together."""
        return (self.folder / f"rank-{rank}.log").read_text()

    def lines(self) -> list[dict[str, Any]]:
        """The JSON lines of rank 0."""
        return [json.loads(line) for line in self.text().splitlines() if line.startswith("{")]

    def losses(self) -> dict[int, float]:
        """step -> loss."""
        return {line["step"]: line["loss"] for line in self.lines() if "loss" in line}


class Warm:
    """A process that has imported torch and forks ranks of `python -m module arguments` on request."""

    def __init__(self, module: str, imports: Sequence[str]) -> None:
        self._process = subprocess.Popen(
            [sys.executable, __file__, module, *imports],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            text=True,
        )

    def start(
        self, world: int, arguments: Sequence[str], folder: Path, env: Mapping[str, str] | None = None
    ) -> Job:
        """Fork the ranks of a world; they print to files in `folder`."""
        folder.mkdir(parents=True, exist_ok=True)
        answer = self._ask(
            do="start", world=world, arguments=list(arguments), folder=str(folder), env=dict(env or {})
        )
        return Job(answer["pids"], folder)

    def wait(self) -> list[int]:
        """Wait for all ranks of the job; their exit codes, negative for a signal."""
        codes: list[int] = self._ask(do="wait")["codes"]
        return codes

    def run(
        self, world: int, arguments: Sequence[str], folder: Path, env: Mapping[str, str] | None = None
    ) -> tuple[Job, list[int]]:
        """Start and wait."""
        job = self.start(world, arguments, folder, env)
        return job, self.wait()

    def close(self) -> None:
        """End the process and whatever it still runs."""
        _pipe(self._process.stdin).close()
        self._process.wait(timeout=10)
        _pipe(self._process.stdout).close()

    def _ask(self, **request: object) -> dict[str, Any]:
        stdin, stdout = _pipe(self._process.stdin), _pipe(self._process.stdout)
        stdin.write(json.dumps(request) + "\n")
        stdin.flush()
        answer: dict[str, Any] = json.loads(stdout.readline())
        return answer


def _pipe(pipe: IO[str] | None) -> IO[str]:
    if pipe is None:
        raise ValueError("the warm process was started without pipes")
    return pipe


# --- the other side --------------------------------------------------------------------------------------------------


class _Server:
    def __init__(self, module: str) -> None:
        self._module = module
        self._store = 0
        self._ranks: list[int] = []

    def serve(self, requests: Iterator[str]) -> None:
        for line in requests:
            request = json.loads(line)
            answer = self._start(request) if request["do"] == "start" else self._wait()
            print(json.dumps(answer), flush=True)
        self._end()

    def _start(self, request: dict[str, Any]) -> dict[str, Any]:
        self._end()  # a test that failed did not wait for its ranks
        self._store, port = _fork_store()
        world = request["world"]
        for rank in range(world):
            pid = os.fork()
            if pid == 0:
                _become(self._module, request, rank, port)
            self._ranks.append(pid)
        return {"pids": self._ranks}

    def _wait(self) -> dict[str, Any]:
        codes = [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in self._ranks]
        self._ranks = []
        self._end()
        return {"codes": codes}

    def _end(self) -> None:
        for pid in [*self._ranks, self._store]:
            if pid:
                os.kill(pid, signal.SIGKILL)
                os.waitpid(pid, 0)
        self._ranks, self._store = [], 0


def _fork_store() -> tuple[int, int]:
    from torch.distributed import TCPStore  # type: ignore[attr-defined]

    reader, writer = os.pipe()
    pid = os.fork()
    if pid == 0:
        store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        os.write(writer, str(store.port).encode())
        while True:
            signal.pause()
    os.close(writer)
    with open(reader, "rb", buffering=0) as pipe:
        return pid, int(pipe.read(16))


def _become(module: str, request: dict[str, Any], rank: int, port: int) -> None:
    """In the child: a rank as a launcher starts it. Never returns."""
    log = os.open(f"{request['folder']}/rank-{rank}.log", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(log, 1)
    os.dup2(log, 2)
    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(request["world"]),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "TORCHELASTIC_USE_AGENT_STORE": "True",
        **request["env"],
    }
    sys.argv = [module, *request["arguments"]]
    code = 1
    try:
        runpy.run_module(module, run_name="__main__", alter_sys=True)
    except SystemExit as error:
        code = error.code if isinstance(error.code, int) else 1
    except BaseException:  # noqa: BLE001  the rank ends here, and shall say why
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


if __name__ == "__main__":
    for name in sys.argv[2:]:
        __import__(name)
    _Server(sys.argv[1]).serve(iter(sys.stdin.readline, ""))
