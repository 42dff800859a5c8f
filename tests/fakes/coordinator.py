"""A real coordinator process, and agents that speak to it over HTTP but hold no processes."""

from __future__ import annotations

import asyncio
import os
import sys
import time
from contextlib import asynccontextmanager, suppress
from dataclasses import replace
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from fakes.runtime import JOB, FakeAgent
from stormjib_runtime.codec import decode, encode
from stormjib_runtime.http import Client, RequestFailed, Response, request
from stormjib_runtime.link import POLL_S
from stormjib_runtime.wire import HEARTBEAT_S, Bounds, Env, Generation, JobPhase, JobState, Order, Report

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable
    from pathlib import Path

TOKEN, OPERATOR = "agent-token", "operator-token"
LIMIT_S = 20.0


class Process:
    """`python -m stormjib_runtime.coordinator`, its port and what it said."""

    def __init__(self, process: asyncio.subprocess.Process, port: int, said: asyncio.StreamReader) -> None:
        self.process, self.port = process, port
        self.lines: list[str] = []
        self._reader = asyncio.create_task(self._read(said))

    @staticmethod
    async def start(run_dir: Path, *, port: int = 0, incarnation: int = 1) -> Process:
        variables = {
            Env.JOB_UID: JOB,
            Env.INCARNATION: str(incarnation),
            Env.TOKEN: TOKEN,
            Env.OPERATOR_TOKEN: OPERATOR,
            Env.RUN_DIR: str(run_dir),
        }
        process = await asyncio.create_subprocess_exec(
            sys.executable,
            "-m",
            "stormjib_runtime.coordinator",
            "--port",
            str(port),
            env={**os.environ, **{str(name): value for name, value in variables.items()}},
            stderr=asyncio.subprocess.PIPE,
        )
        if process.stderr is None:
            raise RuntimeError("no pipe")
        first = (await asyncio.wait_for(process.stderr.readline(), LIMIT_S)).decode()
        if "port " not in first:
            await process.wait()
            raise RuntimeError(first)
        return Process(process, int(first.rpartition(" ")[2]), process.stderr)

    async def _read(self, stream: asyncio.StreamReader) -> None:
        async for line in stream:
            self.lines.append(line.decode().rstrip())

    async def kill(self) -> None:
        with suppress(ProcessLookupError):
            self.process.kill()
        await self.process.wait()
        await self._reader

    async def ended(self) -> int:
        """Exit code, once it ends by itself."""
        code = await asyncio.wait_for(self.process.wait(), LIMIT_S)
        await self._reader
        return code

    async def call(
        self, method: str, path: str, *, token: str = OPERATOR, body: bytes | None = None
    ) -> Response:
        return await request(method, "127.0.0.1", self.port, path, token=token, body=body)

    async def put(self, bounds: Bounds) -> JobState:
        answer = await self.call("PUT", "/v1/bounds", body=encode(bounds))
        if answer.status != 200:
            raise RuntimeError(f"{answer.status} {answer.body!r}")
        return decode(JobState, answer.body)

    async def state(self) -> JobState:
        return decode(JobState, (await self.call("GET", "/v1/state")).body)

    async def until(self, holds: Callable[[JobState], bool]) -> JobState:
        """The state as soon as it holds."""
        seen = -1
        async with asyncio.timeout(LIMIT_S):
            while True:
                answer = await self.call("GET", f"/v1/state?after={max(seen, 0)}")
                state = decode(JobState, answer.body)
                if holds(state):
                    return state
                seen = state.version

    def cpu_s(self) -> float:
        with open(f"/proc/{self.process.pid}/stat") as file:
            fields = file.read().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    def rss_mb(self) -> float:
        with open(f"/proc/{self.process.pid}/statm") as file:
            return int(file.read().split()[1]) * os.sysconf("SC_PAGESIZE") / 1e6


@lru_cache(maxsize=16)
def _order(body: bytes) -> Order:
    """Decoded once for all that get the same."""
    return decode(Order, body)


class HttpAgent:
    """A FakeAgent with a heartbeat and a long poll."""

    def __init__(self, slot: int, port: int, **fields: Any) -> None:
        self.fake = FakeAgent(slot, **fields)
        self.port = port
        self.obeyed: list[tuple[float, Order]] = []
        self.reports = 0
        """Answered ones."""
        self.told = -1
        """The newest step of an answered one."""
        self._finished = -1, 0.0
        """The newest step, and when it was."""
        self._told: tuple[Generation | None, ...] = ()
        self._news = asyncio.Event()
        self._registered = asyncio.Event()
        self._report_client = Client("127.0.0.1", port, token=TOKEN)
        self._poll_client = Client("127.0.0.1", port, token=TOKEN)
        self._tasks = [asyncio.create_task(self._report()), asyncio.create_task(self._poll())]

    def changed(self) -> None:
        """Report at once."""
        self._news.set()

    async def _report(self) -> None:
        while self.fake.alive:
            self._news.clear()
            with suppress(RequestFailed):
                report = self._aged(self.fake.report())
                answer = await self._report_client.request(
                    "POST", "/v1/report", body=self._encoded(report), timeout_s=3
                )
                self._told = (report.generation,) if answer.status == 200 else ()
                self.reports += answer.status == 200
                self.told = self._finished[0] if answer.status == 200 else self.told
                self._take(answer)
            with suppress(TimeoutError):
                async with asyncio.timeout(self.fake.last.heartbeat_s if self.fake.last else HEARTBEAT_S):
                    await self._news.wait()

    def _aged(self, report: Report) -> Report:
        """The report with the age of its newest step: whoever says at every heartbeat that it has just finished one says that it
        trains, and nobody else's end is believed."""
        step = max((rank.step for rank in report.ranks), default=-1)
        if step != self._finished[0]:
            self._finished = step, time.monotonic()
        age = time.monotonic() - self._finished[1]
        return replace(report, ranks=tuple(replace(rank, step_age_s=age) for rank in report.ranks))

    def _encoded(self, report: Report) -> bytes:
        if report.generation is not None:
            report = replace(report, generation=report.generation.brief(*self._told))
        return encode(report)

    async def _poll(self) -> None:
        await self._registered.wait()
        while self.fake.alive:
            path = f"/v1/order?slot={self.fake.slot}&agent={self.fake.number}&after={self.fake.version}"
            try:
                answer = await self._poll_client.request("GET", path, timeout_s=POLL_S)
                self._take(answer)
            except RequestFailed:
                answer = Response(0)
            if answer.status != 200:
                self._registered.clear()
                await self._registered.wait()

    def _take(self, answer: Response) -> None:
        if answer.status != 200:
            return
        order = _order(answer.body)
        self._told = (*self._told[:1], order.generation)
        if order.generation is not None:
            order = replace(order, generation=order.generation.whole(self.fake.generation))
        before = self.fake.report()
        self.fake.obey(order)
        self._registered.set()
        if order.version > before.order_version:
            self.obeyed.append((time.monotonic(), order))
        if self.fake.report() != before:
            self.changed()

    async def close(self) -> None:
        """Gone as a killed container is: every connection breaks."""
        for task in self._tasks:
            task.cancel()
        await asyncio.wait(self._tasks)
        self._report_client.close()
        self._poll_client.close()


@asynccontextmanager
async def running_job(
    run_dir: Path, given: Bounds, **fields: Any
) -> AsyncIterator[tuple[Process, list[HttpAgent]]]:
    """A coordinator with an agent in every slot, its first generation at step 1."""
    coordinator = await Process.start(run_dir)
    agents: list[HttpAgent] = []
    try:
        await coordinator.put(given)
        agents += [HttpAgent(int(slot), coordinator.port, **fields) for slot in given.slots]
        await coordinator.until(
            lambda state: state.phase is JobPhase.STARTING and len(state.agents) == len(agents)
        )
        await step(coordinator, agents, 1)
        yield coordinator, agents
    finally:
        for agent in agents:
            await agent.close()
        await coordinator.kill()


async def step(coordinator: Process, agents: list[HttpAgent], number: int) -> None:
    """Every member finishes step `number`."""
    state = await coordinator.until(lambda one: one.generation is not None and one.history[-1].resume is None)
    generation = state.generation
    async with asyncio.timeout(LIMIT_S):
        members = {member.slot for member in generation.members} if generation else set()
        while any(a.fake.slot in members and a.fake.generation != generation for a in agents):
            await asyncio.sleep(0.01)
        for agent in agents:
            if agent.fake.slot in members:
                agent.fake.step(number)
                agent.changed()
        while any(agent.fake.slot in members and agent.told < number for agent in agents):
            await asyncio.sleep(0.01)
    await coordinator.until(lambda one: one.step >= number and one.phase is JobPhase.RUNNING)
