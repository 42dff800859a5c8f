"""What sampling costs an agent: `python -m bench.health_sampler [--ranks 8] [--seconds 20] [--quick] [--json FILE]`.

The ranks are plain processes that record and send as a step loop does (ten steps a second, ten calls each, every rank
connected to every other), without torch, so that the cores are free for what is measured.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Self

from rich.console import Console

from bench.table import Row, show, write_json
from stormjib_health.records.groups import GroupsWriter, groups_path
from stormjib_health.records.layout import PENDING
from stormjib_health.records.ring import Recorder, ring_path
from stormjib_health.sampler.core import Core
from stormjib_health.sampler.look import Looker, Target
from stormjib_health.wire import Answer, Kind, Phase, Sample, Wish
from stormjib_runtime import codec
from stormjib_runtime.http import Response
from stormjib_runtime.http_server import serve
from stormjib_runtime.sampling import LOOK_S, Place, Sampling
from stormjib_runtime.wire import PROTOCOL, Cause, Generation, GenerationId, Member

if TYPE_CHECKING:
    from collections.abc import Sequence

    from stormjib_health.wire import Check
    from stormjib_runtime.http_server import Request

SUBJECT = "stormjib"
RUNS = 5
STEP_S = 0.1
CALLS = 10
TIMED = (0, 9)
BYTES = 1 << 16
TOKEN = "bench"
JOB = "0b2f7f3e-6c3e-4a55-9a4e-0242ac120002"


class Steppers:
    """Processes that look like ranks from outside. Use as a context manager."""

    def __init__(self, count: int, folder: Path) -> None:
        self.folder = folder
        self._count = count
        self._processes: list[subprocess.Popen[bytes]] = []

    def __enter__(self) -> Self:
        for rank in range(self._count):
            Recorder.create(ring_path(self.folder, rank)).close()
            words = [sys.executable, "-m", "bench.health_sampler", "--step-as", str(rank)]
            words += ["--ranks", str(self._count), "--folder", str(self.folder)]
            self._processes.append(subprocess.Popen(words, stdin=subprocess.PIPE))
        return self

    def __exit__(self, *_: object) -> None:
        for process in self._processes:
            process.kill()
            process.communicate()

    @property
    def pids(self) -> list[int]:
        return [process.pid for process in self._processes]

    def targets(self) -> tuple[Target, ...]:
        """As `stormjib_runtime.ranks.Ranks` gives them."""
        return tuple(Target(rank, rank, process.pid) for rank, process in enumerate(self._processes))


def step_as(rank: int, count: int, folder: Path) -> None:
    """One stepper: record and send until killed, or until its parent is gone."""
    recorder = Recorder.open(ring_path(folder, rank))
    index = GroupsWriter(groups_path(folder, rank)).add("default_pg", tuple(range(count)))
    assert index is not None
    lane = recorder.lane(index)
    peers = _mesh(rank, count, folder)
    recorder.phase = Phase.STEP
    step, due = 0, time.monotonic()
    parent = os.getppid()
    while os.getppid() == parent:
        if lane.step != recorder.clock[0]:
            lane.turn()
        for position in range(CALLS):
            timed = PENDING if position in TIMED else 0
            call = lane.call(Kind.ALL_REDUCE, size=BYTES, signature=position + 1, done=timed)
            with contextlib.suppress(ConnectionError):  # the others are killed before us
                peers[(rank + 1) % count].sendall(bytes(BYTES // CALLS))
            _drain(peers[(rank - 1) % count])
            if timed:
                recorder.done(call, time.monotonic_ns())
        recorder.finished(step)
        step, due = step + 1, due + STEP_S
        time.sleep(max(0.0, due - time.monotonic()))


def _mesh(rank: int, count: int, folder: Path) -> dict[int, socket.socket]:
    """A connection to every other rank."""
    with socket.create_server(("127.0.0.1", 0), backlog=count) as server:
        port = folder / f"port-{rank}.new"
        port.write_text(str(server.getsockname()[1]))
        port.rename(folder / f"port-{rank}")
        peers = {}
        for other in range(rank):
            while not (folder / f"port-{other}").exists():
                time.sleep(0.01)
            peers[other] = socket.create_connection(
                ("127.0.0.1", int((folder / f"port-{other}").read_text()))
            )
            peers[other].sendall(bytes([rank]))
        for _ in range(rank + 1, count):
            one = server.accept()[0]
            peers[one.recv(1)[0]] = one
    return peers


def _drain(peer: socket.socket) -> None:
    with contextlib.suppress(BlockingIOError, ConnectionError):
        while peer.recv(1 << 20, socket.MSG_DONTWAIT):
            pass


def parts(steppers: Steppers, looks: int) -> dict[str, list[float]]:
    """CPU milliseconds of each part of one sample, and its size, in growing order."""
    looker = Looker(steppers.folder, {one.rank: one.local_rank for one in steppers.targets()}, "")
    core = Core(Sample(PROTOCOL, JOB, 0, 1, "1.1", 0, 0.0), len(steppers.pids))
    rows: list[dict[str, float]] = []
    for _ in range(looks):
        marks = [time.thread_time()]
        reading = looker.look(steppers.targets(), ())
        marks.append(time.thread_time())
        core.take(reading)
        marks.append(time.thread_time())
        data = codec.pack(core.sample())
        marks.append(time.thread_time())
        codec.unpack(Sample, data)
        marks.append(time.thread_time())
        core.accepted()
        names = ("look", "take", "sample and pack", "unpack")
        row = {name: 1e3 * (marks[at + 1] - marks[at]) for at, name in enumerate(names)}
        rows.append({**row, "bytes": len(data), "sockets": len(reading.sockets)})
        time.sleep(LOOK_S)
    looker.close()
    return {name: sorted(row[name] for row in rows) for name in rows[0]}


def share(steppers: Steppers, seconds: float) -> tuple[float, list[int]]:
    """Part of a core that the whole of sampling takes, HTTP to another process included, and the samples' sizes."""
    words = [sys.executable, "-m", "bench.health_sampler", "--answer"]
    with subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as server:
        assert server.stdout is not None
        used = asyncio.run(_sample(steppers, seconds, int(server.stdout.readline())))
        return used, json.loads(server.communicate()[0])


async def _none(checks: Sequence[Check]) -> Sequence[Answer]:
    """Nobody asks this bench for checks."""
    return [Answer(check.id, ok=False) for check in checks]


async def _sample(steppers: Steppers, seconds: float, port: int) -> float:
    sampling = Sampling(("127.0.0.1", port), TOKEN, Place(JOB, 0, 1), print, _none, str)
    member = Member(0, 1, "pod", "127.0.0.1", len(steppers.pids))
    generation = Generation(GenerationId(1, 1), None, (member,), Cause.START)
    task = asyncio.create_task(sampling.run(generation, steppers, ""))
    await asyncio.sleep(2)  # the first looks find every socket
    before = time.process_time()
    await asyncio.sleep(seconds)
    used = (time.process_time() - before) / seconds
    task.cancel()
    await asyncio.wait([task])
    return used


async def answer() -> None:
    """A coordinator that wants nothing: prints its port, and when its input ends the sizes of what it was sent."""
    sizes: list[int] = []

    async def take(request: Request) -> Response:
        sizes.append(len(request.body))
        return Response(200, codec.pack(Wish()))

    server = await serve({("POST", "/v1/sample"): take}, "127.0.0.1", 0)
    print(server.port, flush=True)
    await asyncio.to_thread(sys.stdin.read)
    print(json.dumps(sizes))
    await server.close()


def main() -> None:
    """Run the bench."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--ranks", type=int, default=8)
    parser.add_argument("--seconds", type=float, default=20.0)
    parser.add_argument("--quick", action="store_true", help="one run of 5 seconds")
    parser.add_argument("--json", type=Path, metavar="FILE")
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--step-as", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--answer", action="store_true", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.step_as is not None:
        step_as(given.step_as, given.ranks, given.folder)
    elif given.answer:
        asyncio.run(answer())
    else:
        rows = measure(given.ranks, 1 if given.quick else RUNS, 5.0 if given.quick else given.seconds)
        Console().print(show(rows))
        if given.json:
            write_json(given.json, rows, [])


def measure(ranks: int, runs: int, seconds: float) -> list[Row]:
    """What the parts of a sample cost, and all of it as part of a core."""
    case = f"{ranks} ranks"
    with tempfile.TemporaryDirectory(dir="/dev/shm") as folder, Steppers(ranks, Path(folder)) as steppers:
        while not all((steppers.folder / f"port-{rank}").exists() for rank in range(ranks)):
            time.sleep(0.05)
        rows = [
            Row.of(name, case, SUBJECT, values, "" if name in ("bytes", "sockets") else "ms of CPU")
            for name, values in parts(steppers, 50).items()
        ]
        shares = [share(steppers, seconds) for _ in range(runs)]
    largest = [float(max(sizes)) for _, sizes in shares]
    return [
        *rows,
        Row.of("all of it", case, SUBJECT, [100 * used for used, _ in shares], "% of a core"),
        Row.of("largest sample", case, SUBJECT, largest, "bytes"),
    ]


if __name__ == "__main__":
    main()
