"""How this agent starts processes of its job: forks of a warm zygote where that is possible, else by exec."""

from __future__ import annotations

import asyncio
import sys
from typing import TYPE_CHECKING

from stormjib_runtime.children import Streams
from stormjib_runtime.errors import ZygoteError
from stormjib_runtime.output import LastLines
from stormjib_runtime.script import parse_command
from stormjib_runtime.zygote_client import Zygote

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from stormjib_runtime.children import Children
    from stormjib_runtime.output import Outputs

REFORK_S = 1.0
"""A zygote that died (memory) is started anew after this; ranks go on without it."""


class Launching:
    """Starts ranks and stores. `ready` once that takes milliseconds, or once it is known that it never will."""

    def __init__(
        self,
        children: Children,
        outputs: Outputs,
        env: Mapping[str, str],
        changed: Callable[[], None],
        event: Callable[[str], None],
    ) -> None:
        self.ready = False
        self._children = children
        self._outputs = outputs
        self._env = dict(env)
        self._changed = changed
        self._event = event
        self._zygote: Zygote | None = None
        self._former: list[Zygote] = []
        self._warm = asyncio.Event()
        self._closed = False

    def warm(self) -> None:
        """Start the zygote; it is ready in seconds."""
        loop = asyncio.get_running_loop()
        tap = self._outputs.pipe("[zygote] ", LastLines(), error=True)
        self._zygote = Zygote(loop, self._gone)
        self._zygote.ready.add_done_callback(self._proved)
        self._zygote.start(self._children, self._env, tap.writer)
        tap.started()

    def cold(self, why: str) -> None:
        """Do without a zygote from now on."""
        self._zygote = None
        if why:
            self._event(f"ZygoteUnfit: {why}; ranks start by exec")
        self._known()

    async def known(self) -> None:
        """Wait until a start takes milliseconds, or will never."""
        await self._warm.wait()

    @property
    def pids(self) -> frozenset[int]:
        """What must not be ended with a generation."""
        return frozenset() if self._zygote is None else frozenset({self._zygote.pid})

    async def launch(
        self,
        words: Sequence[str],
        env: Mapping[str, str],
        stdout: int,
        stderr: int,
        exited: Callable[[int], None],
    ) -> int:
        """Start one process that runs `words` (what follows `torchrun`); its pid. Waits until that can be done."""
        await self._warm.wait()
        if self._zygote is not None:
            return await self._zygote.fork(words, {**self._threads(), **env}, stdout, stderr, exited)
        argv = parse_command(words).argv(sys.executable)
        return await self.execute(argv, env, stdout, stderr, exited)

    async def execute(
        self,
        argv: Sequence[str],
        env: Mapping[str, str],
        stdout: int,
        stderr: int,
        exited: Callable[[int], None],
    ) -> int:
        """Start a program by exec; its pid."""
        return self._children.start(argv, {**self._env, **env}, Streams(stdout=stdout, stderr=stderr), exited)

    async def quiet(self) -> None:
        """Wait for forks under way, so that all there is can be found."""
        if self._zygote is not None:
            await self._zygote.quiet()

    def orphaned(self, pid: int, status: int) -> None:
        """An orphan was reaped: perhaps a rank whose zygote has died."""
        for zygote in (self._zygote, *self._former):
            if zygote is not None:
                zygote.orphaned(pid, status)

    def close(self) -> None:
        self._closed = True
        if self._zygote is not None:
            self._zygote.close()

    def _threads(self) -> dict[str, str]:
        """The zygote itself runs with one thread."""
        return {"OMP_NUM_THREADS": self._env["OMP_NUM_THREADS"]}

    def _proved(self, ready: asyncio.Future[None]) -> None:
        error = None if ready.cancelled() else ready.exception()
        if isinstance(error, ZygoteError):
            self.cold(str(error))
        else:
            self._known()

    def _known(self) -> None:
        self.ready = True
        self._warm.set()
        self._changed()

    def _gone(self) -> None:
        if self._closed or not self.ready or self._zygote is None:
            return
        self._event("ZygoteLost: the zygote died and is started anew; its ranks go on")
        self._former.append(self._zygote)
        self.ready = False
        self._warm.clear()
        self._changed()
        asyncio.get_running_loop().call_later(REFORK_S, self._rewarm)

    def _rewarm(self) -> None:
        if not self._closed:
            self.warm()
