"""What the coordinator of a very large job costs: a real one, and as many agents as a job may have, which speak to it as real ones do.

`python -m bench.coordinator [--agents N] [--quick] [--json FILE]`. An agent of eight ranks sends heartbeats, waits for orders and sends
samples of a generated healthy job, each on a connection of its own; behind it stands no process.
"""

from __future__ import annotations

import argparse
import asyncio
import resource
import signal
import sys
import tempfile
import time
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console

sys.path.insert(
    0, str(Path(__file__).parents[1] / "tests")
)  # the simulated agents and traces are the tests' own

from bench.table import Row, show, write_json
from fakes.coordinator import TOKEN, HttpAgent, Process
from fakes.runtime import JOB, bounds
from fakes.traces import Shape, Trace
from stormjib_health.wire import Wish
from stormjib_runtime.codec import pack, unpack
from stormjib_runtime.http import Client, RequestFailed
from stormjib_runtime.watch import INTERVAL_S, PER_AGENT_S

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

AGENTS, PER_SLOT = 1250, 8
WINDOWS, WINDOW_S = 5, 10.0
SETTLE = 1.5
"""Intervals between two samples: the first ones name all groups."""
SUBJECT = "stormjib"


def main(words: Sequence[str] | None = None) -> None:
    """Run the bench."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--agents", type=int, default=AGENTS)
    parser.add_argument("--quick", action="store_true", help="a tenth of the agents, one window")
    parser.add_argument("--json", type=Path, metavar="FILE")
    options = parser.parse_args(words)
    count = options.agents // 10 if options.quick else options.agents
    _allow_connections(3 * count)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # the coordinator must not stay behind
    rows = asyncio.run(measure(count, 1 if options.quick else WINDOWS))
    Console().print(show(rows))
    if options.json:
        write_json(options.json, rows, [])


def _allow_connections(count: int) -> None:
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(hard, count + 256), hard))


async def measure(count: int, windows: int) -> list[Row]:
    """Processor seconds per second of the coordinator, in windows one after the other; what reached it in them."""
    told = _samples(count, windows)
    given = bounds(count, count, processes=PER_SLOT)
    with tempfile.TemporaryDirectory() as folder:
        coordinator = await Process.start(Path(folder))
        agents: list[HttpAgent] = []
        sampling: list[asyncio.Task[None]] = []
        try:
            await coordinator.put(given)
            agents = [HttpAgent(int(slot), coordinator.port, processes=PER_SLOT) for slot in given.slots]
            start_s = await _started(coordinator, agents)
            eyes = [Eye(coordinator.port, _interval(count), iter(bodies)) for bodies in told]
            sampling = [asyncio.create_task(eye.run(i / count)) for i, eye in enumerate(eyes)]
            await asyncio.sleep(SETTLE * _interval(count))
            seen = [await _window(coordinator, agents, eyes) for _ in range(windows)]
            memory = coordinator.rss_mb()
        finally:
            for task in sampling:
                task.cancel()
            await asyncio.gather(*sampling, return_exceptions=True)
            for agent in agents:
                await agent.close()
            await coordinator.kill()
    case = f"{count} agents"
    cpu, reports, samples = zip(*seen, strict=True)
    return [
        Row.of("part of a core", case, SUBJECT, cpu, ""),
        Row.of("heartbeats", case, SUBJECT, reports, "1/s"),
        Row.of("samples", case, SUBJECT, samples, "1/s"),
        Row.of("memory", case, SUBJECT, [memory], "MB"),
        Row.of("until every rank has begun", case, SUBJECT, [start_s], "s"),
    ]


async def _started(coordinator: Process, agents: Sequence[HttpAgent]) -> float:
    """Seconds from here until every agent has begun the first generation and stepped."""
    began = time.monotonic()
    async with asyncio.timeout(300):
        while not all(agent.fake.ranks for agent in agents):
            await asyncio.sleep(0.05)
    seconds = time.monotonic() - began
    for agent in agents:
        agent.fake.step(1)
        agent.changed()
    async with asyncio.timeout(300):
        while (await _step(coordinator)) != 1:
            await asyncio.sleep(0.5)
    return seconds


async def _step(coordinator: Process) -> int:
    """The step that the coordinator knows of; -1 where it is too busy to say."""
    with suppress(RequestFailed):
        return (await coordinator.state()).step
    return -1


async def _window(
    coordinator: Process, agents: Sequence[HttpAgent], eyes: Sequence[Eye]
) -> tuple[float, float, float]:
    """Part of a core, heartbeats a second and samples a second."""
    before = coordinator.cpu_s(), sum(a.reports for a in agents), sum(e.sent for e in eyes)
    began = time.monotonic()
    await asyncio.sleep(WINDOW_S)
    seconds = time.monotonic() - began
    after = coordinator.cpu_s(), sum(a.reports for a in agents), sum(e.sent for e in eyes)
    cpu, reports, samples = ((new - old) / seconds for old, new in zip(before, after, strict=True))
    return cpu, reports, samples


class Eye:
    """The sampling side of one agent."""

    def __init__(self, port: int, interval_s: float, bodies: Iterator[bytes]) -> None:
        self.sent = 0
        self._client = Client("127.0.0.1", port, token=TOKEN)
        self._interval, self._bodies = interval_s, bodies

    async def run(self, phase: float) -> None:
        """Send as often as the coordinator wants; `phase` (0 to 1) spreads the agents over the interval."""
        interval = self._interval
        await asyncio.sleep(phase * interval)
        try:
            for body in self._bodies:
                with suppress(RequestFailed):
                    answer = await self._client.request("POST", "/v1/sample", body=body, timeout_s=3)
                    if answer.status != 200:
                        sys.exit(f"bench.coordinator: a sample is refused: {answer.status} {answer.body!r}")
                    self.sent += 1
                    interval = unpack(Wish, answer.body).interval_s
                await asyncio.sleep(interval)
        finally:
            self._client.close()


def _interval(count: int) -> float:
    """Between two samples of one agent, seconds."""
    return max(INTERVAL_S, count * PER_AGENT_S)


def _samples(count: int, windows: int) -> list[list[bytes]]:
    """For each slot the samples that it will send, packed beforehand."""
    trace = Trace(Shape("tp_dp", count * PER_SLOT, PER_SLOT, PER_SLOT, step_s=1.0), 2)
    interval = _interval(count)
    rounds = 4 + int(windows * (WINDOW_S + 1) / interval)
    told: list[list[bytes]] = [[] for _ in range(count)]
    for number in range(rounds):
        for slot in trace.slots:
            sample = trace.sample(slot, 2.0 + number * interval + slot * interval / count)
            told[slot].append(pack(replace(sample, job_uid=JOB, agent=1)))
    return told


if __name__ == "__main__":
    main()
