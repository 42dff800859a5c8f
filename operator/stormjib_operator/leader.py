"""A process that acts while it holds its Lease: a standby until then, and gone as soon as it has lost it.

The operator and the isolator are one each. kopf runs its watches and nothing else.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import signal
from dataclasses import dataclass
from typing import TYPE_CHECKING

import kopf

from stormjib_operator import metrics

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable

    from stormjib_operator.lease import Elector

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Watches:
    """What kopf shall watch: cluster-scoped kinds, and others in these namespaces; none named is all of them."""

    registry: kopf.OperatorRegistry
    settings: kopf.OperatorSettings
    namespaces: tuple[str, ...] = ()


class Leader:
    """Runs `begin` once it holds the Lease: that starts the tasks that act. `close` is called when they have ended."""

    def __init__(
        self,
        elector: Elector,
        identity: str,
        begin: Callable[[], Awaitable[list[asyncio.Task[None]]]],
        close: Callable[[], Awaitable[None]],
        watches: Watches,
    ) -> None:
        self._elector = elector
        self._identity = identity
        self._begin = begin
        self._close = close
        self._watches = watches
        self._stop = asyncio.Event()
        self._watches_stop = asyncio.Event()

    async def run(self) -> int:
        """The exit code: 0 where it was told to stop, 1 where it cannot go on."""
        self._listen_to_signals()
        if not await self._until_stopped(self._elector.acquire()):
            return 0
        metrics.LEADING.set(1)
        kept = asyncio.create_task(self._elector.keep(), name="lease")
        work = await self._begin()
        watches = asyncio.create_task(self._watch(), name="watches")
        stopped = asyncio.create_task(self._stop.wait(), name="stop")
        await asyncio.wait({kept, watches, stopped, *work}, return_when=asyncio.FIRST_COMPLETED)
        lost = kept.done()
        # Nothing acts any more before the Lease is given back, and nothing waits for kopf, which takes seconds.
        await _cancelled(kept, *work)
        await self._close()
        if not lost:
            await self._elector.release()
        self._watches_stop.set()
        await _cancelled(stopped, watches)
        return 0 if self._stop.is_set() else 1

    async def _watch(self) -> None:
        ready = asyncio.Event()
        watching = kopf.operator(
            registry=self._watches.registry,
            settings=self._watches.settings,
            clusterwide=not self._watches.namespaces,
            namespaces=self._watches.namespaces,
            standalone=True,
            # Else kopf asks for the user's name, which a bare uid lacks. Its own type for it is private.
            identity=self._identity,  # type: ignore[arg-type]
            stop_flag=self._watches_stop,
            ready_flag=ready,
        )
        task = asyncio.ensure_future(watching)
        flag = asyncio.ensure_future(ready.wait())
        await asyncio.wait({task, flag}, return_when=asyncio.FIRST_COMPLETED)
        flag.cancel()
        self._listen_to_signals()  # kopf has put its own handlers in place of ours
        await task

    def _listen_to_signals(self) -> None:
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._stop.set)

    async def _until_stopped(self, wanted: Awaitable[None]) -> bool:
        """Whether it was done before we were told to stop."""
        task = asyncio.ensure_future(wanted)
        stopped = asyncio.create_task(self._stop.wait())
        await asyncio.wait({task, stopped}, return_when=asyncio.FIRST_COMPLETED)
        stopped.cancel()
        if not task.done():
            await _cancelled(task)
            return False
        task.result()
        return True


async def _cancelled(*tasks: asyncio.Future[None] | asyncio.Task[bool]) -> None:
    """Cancel tasks, wait for them, and log how those ended that ended by themselves."""
    for task in tasks:
        task.cancel()
    for task, result in zip(tasks, await asyncio.gather(*tasks, return_exceptions=True), strict=True):
        if isinstance(result, Exception):
            _log.error("%s ended: %r", task, result)


@contextlib.asynccontextmanager
async def served(port: int) -> AsyncIterator[None]:
    """Metrics and probes are served meanwhile."""
    endpoint = metrics.Endpoint(port)
    await endpoint.start()
    try:
        yield
    finally:
        await endpoint.stop()
