"""The agent's link to a coordinator that answers, refuses, hangs, or is another one: over real sockets, without ranks."""

from __future__ import annotations

import asyncio
import contextlib
import time
from dataclasses import replace
from typing import TYPE_CHECKING

import pytest

from stormjib_runtime import codec
from stormjib_runtime.http import Response
from stormjib_runtime.http_server import serve
from stormjib_runtime.link import REPORT_S, Link
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
    from collections.abc import AsyncIterator

    from stormjib_runtime.http_server import Request

REPORT = Report(PROTOCOL, "job", 1, 0, 1, "pod", "10.0.0.2", 2, AgentPhase.IDLE)
ORDER = Order(PROTOCOL, 1, 1, Do.WAIT)


class Peer:
    """A coordinator whose answers the test sets."""

    def __init__(self) -> None:
        self.status = 200
        self.order = ORDER
        self.reports = self.polls = 0
        self.hangs = self.forgets = False
        self.heard: list[Generation | None] = []
        self.changed = asyncio.Event()

    async def report(self, request: Request) -> Response:
        self.reports += 1
        self.heard.append(codec.decode(Report, request.body).generation)
        if self.forgets and self.heard[-1] is not None and not self.heard[-1].members:
            return Response(UNKNOWN_GENERATION, b"who is in it?")
        if self.hangs:
            await asyncio.sleep(60)
        return Response(self.status, codec.encode(self.order) if self.status == 200 else b"not now")

    async def poll(self, request: Request) -> Response:
        self.polls += 1
        after = int(request.query["after"])
        while self.order.version == after or self.hangs:
            await self.changed.wait()
            self.changed.clear()
        return Response(200, codec.encode(self.order))

    def give(self, order: Order) -> None:
        self.order = order
        self.changed.set()


class Agent:
    """Takes orders and remembers them."""

    def __init__(self, port: int) -> None:
        self.orders: list[tuple[Order, bool]] = []
        self.said: list[str] = []
        self.report = REPORT
        self.link = Link(("127.0.0.1", port), "token", lambda: self.report, self.take, self.said.append)

    def take(self, order: Order, report: Report | None) -> None:
        self.orders.append((order, report is not None))

    async def until(self, version: int, limit_s: float = 10.0) -> None:
        async with asyncio.timeout(limit_s):
            while not any(order.version == version for order, _ in self.orders):
                await asyncio.sleep(0.002)


@pytest.fixture
async def both() -> AsyncIterator[tuple[Peer, Agent]]:
    peer = Peer()
    server = await serve(
        {("POST", "/v1/report"): peer.report, ("GET", "/v1/order"): peer.poll}, "127.0.0.1", 0
    )
    agent = Agent(server.port)
    running = asyncio.create_task(agent.link.run())
    yield peer, agent
    running.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await running
    agent.link.close()
    await server.close()


async def test_an_order_comes_by_the_poll_at_once(both: tuple[Peer, Agent]) -> None:
    peer, agent = both
    await agent.until(1)
    reports = peer.reports
    start = time.monotonic()
    peer.give(replace(ORDER, version=2))
    await agent.until(2)
    assert time.monotonic() - start < 0.25
    assert (agent.orders[-1][1], peer.reports - reports) == (False, 0)
    agent.link.changed()  # and what changes here is reported before the next heartbeat
    async with asyncio.timeout(0.5):
        while peer.reports == reports:
            await asyncio.sleep(0.002)


async def test_who_trains_together_is_said_once_and_again_to_another_coordinator(
    both: tuple[Peer, Agent],
) -> None:
    peer, agent = both
    await agent.until(1)
    members = tuple(Member(slot, 1, f"pod-{slot}", "10.0.0.1", 2) for slot in range(3))
    held = Generation(GenerationId(1, 1), None, members, Cause.START)
    agent.report = replace(REPORT, generation=held)
    peer.heard.clear()
    brief = replace(held, members=())
    peer.order = replace(ORDER, version=2, do=Do.RUN, generation=brief)
    for _ in range(2):
        seen = len(peer.heard)
        agent.link.changed()
        async with asyncio.timeout(5):
            while len(peer.heard) == seen:
                await asyncio.sleep(0.002)
    assert peer.heard == [held, brief]
    await agent.until(2)
    assert agent.orders[-1][0].generation == held, "an order that is as brief is completed"
    peer.forgets = True
    agent.link.changed()
    async with asyncio.timeout(0.9):
        while len(peer.heard) < 4:
            await asyncio.sleep(0.002)
    assert (peer.heard[2:], agent.said) == ([brief, held], [])
    peer.forgets = False
    following = replace(held, id=GenerationId(1, 2))
    peer.give(replace(ORDER, version=3, do=Do.RUN, generation=following))
    await agent.until(3)
    agent.report = replace(REPORT, generation=following)
    agent.link.changed()
    async with asyncio.timeout(0.9):
        while peer.heard[-1] == held:
            await asyncio.sleep(0.002)
    assert peer.heard[-1] == replace(following, members=()), "it has named them itself"


@pytest.mark.parametrize("status", [401, 403, 409, 503])
async def test_a_refusal_is_said_once_and_asked_again(both: tuple[Peer, Agent], status: int) -> None:
    peer, agent = both
    await agent.until(1)
    peer.status = status
    agent.link.changed()
    async with asyncio.timeout(5):
        reports = peer.reports
        while peer.reports < reports + 3:
            await asyncio.sleep(0.01)
    assert agent.said == [f"the coordinator answers {status}: not now"]
    peer.status, peer.order = 200, replace(ORDER, version=2)
    await agent.until(2)
    assert agent.said[-1] == "the coordinator answers"


async def test_a_coordinator_that_hangs_is_left_for_a_fresh_connection(both: tuple[Peer, Agent]) -> None:
    """A cut node sends no reset. Behind the same address another coordinator answers by then: both calls must move."""
    peer, agent = both
    await agent.until(1)
    peer.hangs = True
    agent.link.changed()
    while peer.reports < 2:
        await asyncio.sleep(0.002)
    start, polls = time.monotonic(), peer.polls
    peer.hangs = False  # for whoever connects anew; what hangs already goes on hanging
    peer.order = replace(ORDER, incarnation=2, version=1 << 41)
    await agent.until(1 << 41)
    assert time.monotonic() - start <= REPORT_S + 0.75
    async with asyncio.timeout(5):
        while peer.polls == polls:
            await asyncio.sleep(0.01)


async def test_an_unreadable_order_is_no_order(both: tuple[Peer, Agent]) -> None:
    peer, agent = both
    await agent.until(1)
    peer.order = replace(ORDER, do="Dance")  # type: ignore[arg-type]
    agent.link.changed()
    async with asyncio.timeout(5):
        while not agent.said:
            await asyncio.sleep(0.01)
    assert "Dance" in agent.said[0]
    assert {order.do for order, _ in agent.orders} == {Do.WAIT}
