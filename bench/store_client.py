"""What an upload costs the client: the engine's flush into a store beside plain obstore, in pairs, against a server that throws all away.

    python -m bench.store_client [--quick] [--json FILE]

The server is a process of its own on this machine, so its rate is bounded by the loopback, which both share: the ratio counts, and
the processor time per gigabyte, which is what a node that trains has to give. Plain HTTP, the payload not hashed.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import multiprocessing
import os
import re
import resource
import time
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import obstore
from obstore.store import S3Store
from rich.console import Console

from bench.table import Row, show, write_json
from stormjib_checkpoint.engine.arena import Arena
from stormjib_checkpoint.engine.flush import Handover, flush
from stormjib_checkpoint.format import PIECE_BYTES
from stormjib_checkpoint.stores.store import WRITERS
from stormjib_checkpoint.stores.urls import open_storage

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping
    from multiprocessing.connection import Connection

GB = 1e9
NOT_REAL = {"AWS_ACCESS_KEY_ID": "x", "AWS_SECRET_ACCESS_KEY": "y", "AWS_REGION": "us-east-1"}


class Cost(NamedTuple):
    """Of one upload."""

    seconds: float
    cpu_s: float


class NullS3(asyncio.Protocol):
    """Says yes to every put and every upload, and keeps nothing."""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transport, self._head, self._left = transport, b"", 0

    def data_received(self, data: bytes) -> None:
        while data:
            if self._left:
                skipped = min(self._left, len(data))
                self._left, data = self._left - skipped, data[skipped:]
                if self._left == 0:
                    self._answer()
                continue
            self._head += data
            head, end, data = self._head.partition(b"\r\n\r\n")
            if not end:
                return
            self._head, length = head, re.search(rb"(?i)\ncontent-length: *(\d+)", head)
            self._left = int(length[1]) if length else 0
            if b"100-continue" in head:
                self._transport.write(b"HTTP/1.1 100 Continue\r\n\r\n")
            if self._left == 0:
                self._answer()

    def _answer(self) -> None:
        method, target = self._head.split(b" ", 2)[:2]
        self._head, body, status = b"", b"", b"404 Not Found" if method == b"HEAD" else b"200 OK"
        if method == b"POST" and b"uploads" in target:
            body = b"<InitiateMultipartUploadResult><UploadId>u</UploadId></InitiateMultipartUploadResult>"
        elif method == b"POST" and b"delete" in target:
            body = b"<DeleteResult><Deleted><Key>k</Key></Deleted></DeleteResult>"
        elif method == b"POST":
            body = b'<CompleteMultipartUploadResult><ETag>"e"</ETag></CompleteMultipartUploadResult>'
        self._transport.write(
            b'HTTP/1.1 %b\r\nETag: "e"\r\nContent-Length: %d\r\n\r\n%b' % (status, len(body), body)
        )


def _serve(told: Connection) -> None:
    async def run() -> None:
        server = await asyncio.get_running_loop().create_server(NullS3, "127.0.0.1", 0)
        told.send(server.sockets[0].getsockname()[1])
        await server.serve_forever()

    asyncio.run(run())


@contextlib.contextmanager
def null_server() -> Iterator[str]:
    """The endpoint of one that runs."""
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=_serve, args=(theirs,), daemon=True)
    process.start()
    try:
        yield f"http://127.0.0.1:{ours.recv()}"
    finally:
        process.terminate()
        process.join()


def uploads(endpoint: str, size: int) -> Mapping[str, Callable[[], None]]:
    """One upload of `size` bytes by each client, from memory that is there already."""
    arena = Arena(size)
    arena.touch()
    os.environ.update(NOT_REAL)
    stores = {
        "stormjib": open_storage("s3://bucket/job", options={"endpoint": endpoint}),
        "stormjib, s3fs": open_storage("fsspec+s3://bucket/job", options={"endpoint_url": endpoint}),
    }
    plain = S3Store("bucket", endpoint=endpoint, unsigned_payload=True, client_options={"allow_http": True})

    def by(name: str) -> Callable[[], None]:
        def run() -> None:
            handover = Handover()
            for piece in range(-(-size // PIECE_BYTES)):
                arena.take(piece)
                handover.put(piece)
            handover.end()
            flush(stores[name], "step/rank", size, arena, handover)

        return run

    def alone() -> None:
        data = arena.view[:size]
        obstore.put(plain, "rank", data, use_multipart=True, chunk_size=PIECE_BYTES, max_concurrency=WRITERS)

    return {"stormjib": by("stormjib"), "plain obstore": alone, "stormjib, s3fs": by("stormjib, s3fs")}


def measured(upload: Callable[[], None]) -> Cost:
    """What it cost this process, whatever its threads."""
    before, began = resource.getrusage(resource.RUSAGE_SELF), time.perf_counter()
    upload()
    seconds, after = time.perf_counter() - began, resource.getrusage(resource.RUSAGE_SELF)
    return Cost(seconds, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)


def rows(size: int, pairs: int) -> list[Row]:
    """All clients in each round, in turn from the front and from the back."""
    with null_server() as endpoint:
        clients = uploads(endpoint, size)
        for upload in clients.values():
            upload()
        costs: dict[str, list[Cost]] = {name: [] for name in clients}
        for number in range(pairs):
            for name in list(clients)[:: -1 if number % 2 else 1]:
                costs[name].append(measured(clients[name]))
    case = f"{size / GB:.2f} GB"
    found = []
    for name, seen in costs.items():
        found.append(Row.of("cpu", case, name, [cost.cpu_s / size * GB for cost in seen], "CPU-s/GB"))
        found.append(Row.of("rate", case, name, [size / GB / cost.seconds for cost in seen], "GB/s"))
    ratios = [
        100 * plain.seconds / ours.seconds
        for ours, plain in zip(costs["stormjib"], costs["plain obstore"], strict=True)
    ]
    return [*found, Row.of("rate beside plain obstore", case, "stormjib", ratios, "%")]


def main() -> None:
    """Run the bench."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="an eighth of a gigabyte, five rounds")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    found = rows(128 << 20, 5) if options.quick else rows(1 << 30, 15)
    Console().print(show(found))
    if options.json:
        write_json(options.json, found, ["obstore", "s3fs"])


if __name__ == "__main__":
    main()
