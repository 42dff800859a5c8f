"""A coordinator that only answers `GET /v1/state`, inside a network namespace, and says what the test tells it to."""

from __future__ import annotations

import asyncio
import threading
from dataclasses import replace
from typing import TYPE_CHECKING

from bench.lab.calls import OPERATOR_TOKEN
from bench.lab.network import COORDINATOR_ADDRESS, entered
from stormjib_runtime.codec import encode
from stormjib_runtime.coordinator import PORT
from stormjib_runtime.http import Response
from stormjib_runtime.http_server import serve
from stormjib_runtime.wire import PROTOCOL, JobPhase, JobState

if TYPE_CHECKING:
    from types import TracebackType
    from typing import Self

    from stormjib_health.verdict import Verdict
    from stormjib_runtime.http_server import Request


class ScriptedState:
    """Use as a context manager. Each life counts versions from its own number."""

    def __init__(self, netns: str, version: int = 1) -> None:
        self.state = JobState(PROTOCOL, "job", 1, version, JobPhase.RUNNING)
        self._netns = netns
        self._loop = asyncio.new_event_loop()
        self._up, self._over = threading.Event(), asyncio.Event()
        self._news = asyncio.Event()
        self._thread = threading.Thread(target=self._live)

    def __enter__(self) -> Self:
        self._thread.start()
        assert self._up.wait(10)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._loop.call_soon_threadsafe(self._over.set)
        self._thread.join()
        self._loop.close()

    def say(self, *verdicts: Verdict) -> None:
        """These are all the verdicts that there are, from now on."""
        self._loop.call_soon_threadsafe(self._say, verdicts)

    def _say(self, verdicts: tuple[Verdict, ...]) -> None:
        self.state = replace(self.state, version=self.state.version + 1, verdicts=verdicts)
        self._news.set()
        self._news = asyncio.Event()

    def _live(self) -> None:
        with entered(self._netns):
            self._loop.run_until_complete(self._serve())

    async def _serve(self) -> None:
        server = await serve({("GET", "/v1/state"): self._answer}, COORDINATOR_ADDRESS, PORT)
        self._up.set()
        await self._over.wait()
        await server.close()

    async def _answer(self, request: Request) -> Response:
        assert request.bearer(OPERATOR_TOKEN)
        if request.query.get("after") == str(self.state.version):
            try:
                async with asyncio.timeout(1):
                    await self._news.wait()
            except TimeoutError:
                pass
        return Response(200, encode(self.state))
