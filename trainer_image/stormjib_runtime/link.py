"""The agent's link to its coordinator: reports out, orders in. It knows when to give a connection up, nothing else."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from typing import TYPE_CHECKING

from stormjib_runtime import codec
from stormjib_runtime.http import Client, RequestFailed
from stormjib_runtime.wire import HEARTBEAT_S, UNKNOWN_GENERATION, Order, Report

if TYPE_CHECKING:
    from collections.abc import Callable

    from stormjib_runtime.http import Response
    from stormjib_runtime.wire import Generation

REPORT_S = 3.0
"""Time limit of a report: a coordinator that is gone behind its Service is left within this."""
POLL_S = 33.0
"""Time limit of a long poll: the coordinator answers after 30 s at the latest, and a report that fails drops the poll."""
RETRY_S = 0.25
MAX_HEARTBEAT_S = 60.0


class Link:
    """Two connections: one posts reports, the other waits for orders, and by breaking tells that this agent died."""

    def __init__(
        self,
        coordinator: tuple[str, int],
        token: str,
        report: Callable[[], Report],
        take: Callable[[Order, Report | None], None],
        say: Callable[[str], None],
    ) -> None:
        self._reports = Client(*coordinator, token=token)
        self._orders = Client(*coordinator, token=token)
        self._report = report
        self._take = take
        self._say = say
        self._changed = asyncio.Event()
        self._known = asyncio.Event()
        self._order: Order | None = None
        self._told: tuple[Generation | None, ...] = ()
        """Generations whose members this coordinator knows: of the newest report that it has answered, and of its newest order."""
        self._polling: asyncio.Task[Order | None] | None = None
        self._problem = ""

    def changed(self) -> None:
        """Something is worth a report before the next heartbeat."""
        self._changed.set()

    async def run(self) -> None:
        """Report and poll until cancelled."""
        try:
            async with asyncio.TaskGroup() as tasks:
                tasks.create_task(self._keep_reporting())
                tasks.create_task(self._keep_polling())
        finally:
            self._drop_poll()

    def close(self) -> None:
        self._reports.close()
        self._orders.close()

    async def _keep_reporting(self) -> None:
        while True:
            self._changed.clear()
            report = self._report()
            order = await self._post(report)
            self._told = () if order is None else (report.generation, order.generation)
            if order is None:
                await self._wait(RETRY_S if self._problem else HEARTBEAT_S)
                continue
            if self._order is not None and order.incarnation != self._order.incarnation:
                self._drop_poll()  # another coordinator answers now; the poll may hang at the one before
            self._give(order, report)
            await self._wait(min(max(HEARTBEAT_S, order.heartbeat_s), MAX_HEARTBEAT_S))

    async def _wait(self, limit_s: float) -> None:
        try:
            async with asyncio.timeout(limit_s):
                await self._changed.wait()
        except TimeoutError:
            pass

    async def _post(self, report: Report) -> Order | None:
        body = codec.encode(self._brief(report))
        try:
            response = await self._reports.request("POST", "/v1/report", body=body, timeout_s=REPORT_S)
            if response.status == UNKNOWN_GENERATION:  # another coordinator has answered
                body = codec.encode(report)
                response = await self._reports.request("POST", "/v1/report", body=body, timeout_s=REPORT_S)
        except RequestFailed as error:
            self._note(str(error))
            self._known.clear()
            self._drop_poll()
            return None
        return self._read(response)

    def _brief(self, report: Report) -> Report:
        if report.generation is None:
            return report
        return replace(report, generation=report.generation.brief(*self._told))

    async def _keep_polling(self) -> None:
        while True:
            await self._known.wait()
            self._polling = asyncio.create_task(self._poll())
            await asyncio.wait([self._polling])
            order = None if self._polling.cancelled() else self._polling.result()
            if order is None:
                self._known.clear()  # until a report is answered again
            else:
                self._told = (*self._told[:1], order.generation)
                self._give(order, None)

    async def _poll(self) -> Order | None:
        report = self._report()
        after = 0 if self._order is None else self._order.version
        path = f"/v1/order?slot={report.slot}&agent={report.agent}&after={after}"
        try:
            return self._read(await self._orders.request("GET", path, timeout_s=POLL_S))
        except RequestFailed as error:
            self._note(str(error))
            return None

    def _read(self, response: Response) -> Order | None:
        if response.status != 200:
            self._note(
                f"the coordinator answers {response.status}: {response.body[:512].decode(errors='replace')}"
            )
            return None
        try:
            order = codec.decode(Order, response.body)
        except codec.DecodeError as error:
            self._note(f"the coordinator's order is unreadable: {error}")
            return None
        self._note("")
        return self._whole(order)

    def _whole(self, order: Order) -> Order | None:
        """The order with the members of its generation; None where that was ended here meanwhile, which the next report says."""
        if order.generation is None:
            return order
        whole = order.generation.whole(self._report().generation)
        return None if whole is None else replace(order, generation=whole)

    def _give(self, order: Order, report: Report | None) -> None:
        self._order = order
        self._take(order, report)
        self._known.set()

    def _drop_poll(self) -> None:
        if self._polling is not None:
            self._polling.cancel()

    def _note(self, problem: str) -> None:
        """Say each problem once, and its end."""
        if problem != self._problem:
            self._say(problem or "the coordinator answers")
        self._problem = problem
