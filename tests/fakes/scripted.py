"""A coordinator whose orders the test writes, and that keeps what agents report. Real HTTP, no engine."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from typing import TYPE_CHECKING, Self

from stormjib_health.wire import Sample, Wish
from stormjib_runtime import codec
from stormjib_runtime.http import Response
from stormjib_runtime.http_server import serve
from stormjib_runtime.wire import (
    PROTOCOL,
    UNKNOWN_GENERATION,
    AgentPhase,
    Cause,
    Do,
    Generation,
    GenerationId,
    Member,
    Order,
    Report,
)

if TYPE_CHECKING:
    from collections.abc import Callable

    from stormjib_runtime.http_server import Request, Server

TOKEN = "agent-token"


class ScriptedCoordinator:
    """Use as an async context manager."""

    def __init__(self) -> None:
        self.reports: dict[int, Report] = {}
        self.seen: list[Report] = []
        self.samples: list[Sample] = []
        self.sizes: list[int] = []
        """Bytes of each sample as it came."""
        self.wish = Wish()
        """The answer to the next sample, once; after that it is the default again."""
        self.deaf = False
        """Samples are answered with 503."""
        self.refused = 0
        self.broken: list[int] = []
        """Slots whose long poll was cut by their side."""
        self._orders: dict[int, Order] = {}
        self._changed = asyncio.Condition()
        self._server: Server | None = None
        self._port = 0

    async def __aenter__(self) -> Self:
        await self.start()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.stop()

    async def start(self) -> None:
        """Listen, at the port of the life before."""
        routes = {
            ("POST", "/v1/report"): self._report,
            ("GET", "/v1/order"): self._poll,
            ("POST", "/v1/sample"): self._sample,
        }
        self._server = await serve(routes, "127.0.0.1", self._port)
        self._port = self._server.port

    async def stop(self) -> None:
        """Gone, with every connection."""
        if self._server is not None:
            await self._server.close()
            self._server = None

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._port}"

    def generation(
        self, number: int, slots: tuple[int, ...] = (0,), cause: Cause = Cause.START
    ) -> Generation:
        """A generation of the agents that have reported."""
        members = tuple(
            Member(slot, report.agent, report.pod_uid, report.address, report.processes)
            for slot, report in ((slot, self.reports[slot]) for slot in slots)
        )
        parent = GenerationId(1, number - 1) if number > 1 else None
        return Generation(GenerationId(1, number), parent, members, cause)

    async def order(self, slot: int, order: Order) -> None:
        """Give one agent a new order, with the next version."""
        async with self._changed:
            self._orders[slot] = replace(order, version=self._order(slot).version + 1)
            self._changed.notify_all()

    async def until(self, what: Callable[[Report], bool], slot: int = 0, limit_s: float = 20.0) -> Report:
        """The first report of `slot` that is as wanted."""
        async with asyncio.timeout(limit_s), self._changed:
            await self._changed.wait_for(lambda: slot in self.reports and what(self.reports[slot]))
            return self.reports[slot]

    async def sampled(self, what: Callable[[Sample], bool], limit_s: float = 40.0) -> Sample:
        """The first sample from now on that is as wanted."""
        start = len(self.samples)
        async with asyncio.timeout(limit_s), self._changed:
            await self._changed.wait_for(lambda: any(map(what, self.samples[start:])))
            return next(filter(what, self.samples[start:]))

    async def run(
        self, number: int, cause: Cause = Cause.START, limit_s: float = 20.0, **fields: object
    ) -> Report:
        """Bring slot 0 alone into generation `number`; its first report with ranks."""
        await self.until(lambda report: report.phase is not AgentPhase.STARTING, limit_s=150)
        generation = self.generation(number, cause=cause)
        await self.order(0, new_order(Do.PREPARE, generation))
        prepared = await self.until(
            lambda report: report.phase is AgentPhase.PREPARED and report.generation == generation,
            limit_s=limit_s,
        )
        run = new_order(Do.RUN, generation, store=prepared.store, resume=prepared.resume, **fields)
        await self.order(0, run)
        return await self.until(
            lambda report: report.phase is AgentPhase.RUNNING and len(report.ranks) == report.processes
        )

    def _order(self, slot: int) -> Order:
        return self._orders.get(slot, Order(PROTOCOL, 1, 1, Do.WAIT))

    async def _report(self, request: Request) -> Response:
        assert request.bearer(TOKEN)
        report = codec.decode(Report, request.body)
        if report.generation is not None:
            before = self.reports.get(report.slot)
            known = (self._order(report.slot).generation, before.generation if before else None)
            whole = report.generation.whole(*known)
            if whole is None:
                return Response(UNKNOWN_GENERATION, b"who is in it?")
            report = replace(report, generation=whole)
        async with self._changed:
            self.reports[report.slot] = report
            self.seen.append(report)
            self._changed.notify_all()
        return Response(200, codec.encode(self._order(report.slot)))

    async def _sample(self, request: Request) -> Response:
        assert request.bearer(TOKEN)
        if self.deaf:
            self.refused += 1
            return Response(503, b"deaf")
        sample = codec.unpack(Sample, request.body)
        async with self._changed:
            self.samples.append(sample)
            self.sizes.append(len(request.body))
            wish, self.wish = self.wish, Wish()
            self._changed.notify_all()
        return Response(200, codec.pack(wish))

    async def _poll(self, request: Request) -> Response:
        assert request.bearer(TOKEN)
        slot, after = int(request.query["slot"]), int(request.query["after"])
        request.connection.on_close = lambda: self.broken.append(slot)
        async with self._changed:
            try:
                async with asyncio.timeout(10):
                    await self._changed.wait_for(lambda: self._order(slot).version > after)
            except TimeoutError:
                pass
        return Response(200, codec.encode(self._order(slot)))


def new_order(do: Do, generation: Generation | None = None, **fields: object) -> Order:
    """An order of incarnation 1; `ScriptedCoordinator.order` gives it its version."""
    return replace(Order(PROTOCOL, 1, 1, do, generation), **fields)  # type: ignore[arg-type]
