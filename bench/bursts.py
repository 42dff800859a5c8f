"""What a busy processor adds to the burst of a path that is well: by the clock, and without what its ends waited for one.

`python -m bench.bursts [--quick] [--json FILE]`. Loopback, an end on each of two cores, so many busy processes beside each.
"""

from __future__ import annotations

import argparse
import asyncio
import multiprocessing
import os
import random
import statistics
from contextlib import ExitStack, contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING
from unittest import mock

from rich.console import Console

from bench.table import Row, show, write_json
from stormjib_health.confirm import transfer

if TYPE_CHECKING:
    from collections.abc import Iterator
    from multiprocessing.queues import Queue

BUSY = (0, 1, 3)
RUNS = 60
TOKEN = transfer.measuring_token("bench")
_CONTEXT = multiprocessing.get_context("spawn")
_UNREAD = mock.patch.object(transfer, "_schedule", return_value=(0.0, 0.0))
"""An end that knows nothing of its waiting: its time is the clock's."""


def main() -> None:
    """Run the bench."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="ten runs")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    near, far = sorted(os.sched_getaffinity(0))[:2]
    rows: list[Row] = []
    with serving(far, read=False) as clocked, serving(far, read=True) as net:
        os.sched_setaffinity(0, {near})
        for busy in BUSY:
            rows += compared(busy, (near, far), clocked, net, 10 if options.quick else RUNS)
    Console().print(show(rows))
    if options.json:
        write_json(options.json, rows, [])


def compared(busy: int, cores: tuple[int, int], clocked: int, net: int, runs: int) -> list[Row]:
    """Both ways of measuring, in pairs of random order, beside `busy` processes on each core."""
    by_clock: list[float] = []
    without: list[float] = []
    turns = random.Random(busy)
    with ExitStack() as others:
        for core in cores:
            for _ in range(busy):
                others.enter_context(burning(core))
        for _ in range(runs):
            for read in turns.sample((False, True), 2):
                with nullcontext() if read else _UNREAD:
                    (without if read else by_clock).append(burst_ms(net if read else clocked))
    beside = f"{busy} busy a core"
    return [_row(f"{beside}, by the clock", by_clock), _row(f"{beside}, without waits", without)]


def burst_ms(port: int) -> float:
    """One measurement: ms of its median burst."""
    answer = asyncio.run(transfer.measure(f"127.0.0.1:{port}", TOKEN))
    if not answer.bytes:
        raise SystemExit(f"bench.bursts: {answer.text}")
    return 1e3 * answer.seconds * transfer.BURST_BYTES / answer.bytes


def _row(case: str, values: list[float]) -> Row:
    median, least, most = (round(x, 2) for x in (statistics.median(values), min(values), max(values)))
    return Row("burst of 256 KiB", case, "stormjib", median, least, most, len(values), "ms")


@contextmanager
def serving(core: int, *, read: bool) -> Iterator[int]:
    """A measuring server in a process of its own; its port."""
    told: Queue[int] = _CONTEXT.Queue()
    with process(serve, core, read, told):
        yield told.get(timeout=60)


@contextmanager
def burning(core: int) -> Iterator[None]:
    """A process that takes all of a core that there is to have, and has begun to."""
    told: Queue[int] = _CONTEXT.Queue()
    with process(burn, core, told):
        told.get(timeout=60)
        yield


@contextmanager
def process(target: object, *arguments: object) -> Iterator[None]:
    """A process that ends with the block."""
    one = _CONTEXT.Process(target=target, args=arguments, daemon=True)  # type: ignore[arg-type]
    one.start()
    try:
        yield
    finally:
        one.kill()
        one.join()


def serve(core: int, read: bool, told: Queue[int]) -> None:
    """The server's process."""
    os.sched_setaffinity(0, {core})
    with ExitStack() as stack:
        if not read:
            stack.enter_context(_UNREAD)
        asyncio.run(_serve(told))


async def _serve(told: Queue[int]) -> None:
    server = transfer.Server(TOKEN)
    await server.start()
    told.put(server.port)
    await asyncio.Event().wait()


def burn(core: int, told: Queue[int]) -> None:
    """The busy process."""
    os.sched_setaffinity(0, {core})
    told.put(core)
    while True:
        pass


if __name__ == "__main__":
    main()
