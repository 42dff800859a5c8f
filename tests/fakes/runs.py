"""`stormjib-run` as a process, and a model that it trains in a moment."""

from __future__ import annotations

import asyncio
import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

from fakes.agents import alive, until
from stormjib_health.sampler.proc import descendants

PROGRAM = Path(sys.executable).with_name("stormjib-run")
START_S = 60.0
"""Importing torch on a machine that others use too."""

TINY = """
[model]
dim = 16
layers = 1
heads = 2
context = 16
[optimizer]
warmup = 5
[train]
batch = 4
steps = {steps}
"""


class Run:
    """One `stormjib-run`, its output in files."""

    def __init__(self, folder: Path, *arguments: str, **env: str) -> None:
        self.folder = folder
        self.pids: set[int] = set()
        with open(folder / "out", "wb") as out, open(folder / "err", "wb") as err:
            self.process = subprocess.Popen(
                [PROGRAM, *arguments],
                env={**os.environ, "TMPDIR": str(folder), **env},
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=err,
            )

    @property
    def out(self) -> str:
        return (self.folder / "out").read_text()

    @property
    def err(self) -> str:
        return (self.folder / "err").read_text()

    def collectives(self, generation: str) -> list[dict[str, float]]:
        """What each rank of a generation said of its first collective."""
        found = [json.loads(line) for line in re.findall(r'\{"event": "collective".*\}', self.out)]
        return [one for one in found if one["generation"] == generation]

    async def joined(self, generation: str, limit_s: float = START_S) -> list[int]:
        """Process ids of the two ranks, once both have done a collective."""
        await until(lambda: len(self.collectives(generation)) == 2, limit_s)
        assert "/dev/shm/stormjib-" in self.out
        self.pids |= {stat.pid for stat in descendants(self.process.pid)}
        return [int(one["pid"]) for one in sorted(self.collectives(generation), key=lambda one: one["rank"])]

    async def exit(self, limit_s: float = START_S) -> int:
        """The exit code; nothing of the run may be left then."""
        code = await asyncio.to_thread(self.process.wait, limit_s)
        await until(lambda: not any(alive(pid) for pid in self.pids))
        assert not any(Path(one).exists() for one in re.findall(r"/dev/shm/stormjib-\w+-0", self.out))
        assert not [path for path in self.folder.iterdir() if path.name.startswith("stormjib-")]
        return code

    def close(self) -> None:
        for pid in [stat.pid for stat in descendants(self.process.pid)] + [self.process.pid]:
            if alive(pid):
                os.kill(pid, signal.SIGKILL)
        self.process.wait()
        print(self.err[-3000:])
