"""One zygote for many tests, and the same commands run by `python` itself to compare with."""

from __future__ import annotations

import asyncio
import os
import re
import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING, Self

from fakes.agents import SCRIPTS
from stormjib_runtime.children import Children, Streams
from stormjib_runtime.environment import base_environment
from stormjib_runtime.zygote_client import Zygote

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable
    from pathlib import Path

    from stormjib_runtime.children import Exited


ADDRESS = re.compile("0x[0-9a-f]+")


@dataclass(frozen=True)
class Done:
    """How a process ended, and what it said."""

    exit: int
    out: str
    err: str


class Warm:
    """Use as an async context manager, in one event loop, in the main thread."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.env = {**base_environment(os.environ), "PYTHONPATH": str(SCRIPTS)}
        self.env.pop("PYTHONUNBUFFERED", None)
        self._runs = 0

    async def __aenter__(self) -> Self:
        loop = asyncio.get_running_loop()
        self._children = Children(loop, lambda pid, status: None)
        self.zygote = Zygote(loop, lambda: None)
        self.zygote.start(self._children, self.env, 2)
        await self.zygote.ready
        return self

    async def __aexit__(self, *_: object) -> None:
        self.zygote.close()
        while self._children.pids:
            await asyncio.sleep(0.01)
        self._children.close()

    async def fork(self, *words: str, **env: str) -> Done:
        """Run what follows `torchrun` in a fork of the zygote."""
        return await self._run(lambda out, err, exited: self.zygote.fork(words, env, out, err, exited))

    async def python(self, *words: str, **env: str) -> Done:
        """Run the same by `python` itself, unbuffered as torchrun does."""

        async def start(out: int, err: int, exited: Exited) -> int:
            argv = [sys.executable, "-u", *words]
            streams = Streams(stdout=out, stderr=err)
            return self._children.start(argv, {**self.env, **env}, streams, exited)

        return await self._run(start)

    async def _run(self, start: Callable[[int, int, Exited], Awaitable[int]]) -> Done:
        self._runs += 1
        paths = [self.folder / f"{name}-{self._runs}" for name in ("out", "err")]
        ended = asyncio.get_running_loop().create_future()
        out, err = (os.open(path, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC) for path in paths)
        await start(out, err, ended.set_result)
        os.close(out)
        os.close(err)
        async with asyncio.timeout(50):
            code = await ended
        return Done(code, *(ADDRESS.sub("0x", path.read_text()) for path in paths))
