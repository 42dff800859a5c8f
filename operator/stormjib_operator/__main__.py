"""Start the operator: take the Lease, watch, work the queue; give the Lease back when told to stop."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import sys

import aiohttp

from stormjib_operator import handlers, metrics, tokens
from stormjib_operator.cluster import ApiServer
from stormjib_operator.coordinator_client import Streams
from stormjib_operator.errors import StormjibOperatorError
from stormjib_operator.events import Recorder
from stormjib_operator.isolation.reporter import Reporter
from stormjib_operator.leader import Leader, Watches, served
from stormjib_operator.lease import OPERATOR, Elector
from stormjib_operator.queue import WorkQueue
from stormjib_operator.reconcile import Reconciler
from stormjib_operator.settings import Settings, from_environment

_log = logging.getLogger("stormjib_operator")


class Operator:
    """What acts on jobs: the queue, its workers, and the streams from the coordinators."""

    def __init__(self, settings: Settings, cluster: ApiServer, session: aiohttp.ClientSession) -> None:
        self._settings = settings
        self._cluster = cluster
        self._elector = Elector(cluster, settings.namespace, settings.identity, OPERATOR)
        self._queue = WorkQueue()
        self._streams = Streams(session, self._queue.add)
        metrics.WAITING.set_function(lambda: len(self._queue))
        metrics.STREAMS.set_function(lambda: len(self._streams))

    async def run(self) -> int:
        """The exit code: 0 where it was told to stop, 1 where it cannot go on."""
        watches = Watches(handlers.registry(self._queue), handlers.settings(), self._settings.watched)
        close = self._streams.close
        return await Leader(self._elector, self._settings.identity, self._work, close, watches).run()

    async def _work(self) -> list[asyncio.Task[None]]:
        settings = self._settings
        key = await tokens.ensure_key(self._cluster, settings.namespace)
        reporter = Reporter(self._cluster) if settings.isolation else None
        reconciler = Reconciler(
            self._cluster,
            self._streams,
            Recorder(self._cluster),
            settings.render,
            key,
            lambda: self._elector.term,
            reporter=reporter,
        )
        count = range(settings.workers)
        work = [asyncio.create_task(self._queue.work(reconciler.look), name=f"worker {i}") for i in count]
        return [*work, asyncio.create_task(reporter.run(), name="reporter")] if reporter else work


async def _main(settings: Settings) -> int:
    cluster = await ApiServer.connect()
    async with contextlib.AsyncExitStack() as stack:
        stack.push_async_callback(cluster.close)
        connector = aiohttp.TCPConnector(limit=0)
        session = await stack.enter_async_context(aiohttp.ClientSession(connector=connector))
        await stack.enter_async_context(served(settings.port))
        return await Operator(settings, cluster, session).run()


def main() -> None:
    """Entry point of `stormjib-operator` and `python -m stormjib_operator`."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname).1s %(name)s: %(message)s")
    logging.getLogger("kopf").setLevel(logging.WARNING)
    try:
        code = asyncio.run(_main(from_environment()))
    except StormjibOperatorError as error:
        _log.error("%s", error)
        code = 1
    sys.exit(code)


if __name__ == "__main__":
    main()
