"""The measuring server and its client over loopback: what they say, and what strangers cannot do."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import os
import socket
import subprocess
import sys
import time
from typing import TYPE_CHECKING

import pytest
import pytest_asyncio

from stormjib_health.confirm import transfer
from stormjib_health.confirm.transfer import (
    BURST_BYTES,
    BURSTS,
    CONNECTIONS,
    PINGS,
    AddressError,
    Server,
    measure,
    measuring_token,
    parse_address,
)

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

TOKEN = measuring_token("secret")
SLACK_S = 0.25
"""A busy machine may be late by this much in noticing that a limit is over."""


@pytest_asyncio.fixture
async def server() -> AsyncIterator[Server]:
    one = Server(TOKEN)
    await one.start()
    yield one
    await one.close()


async def connect(server: Server) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    return await asyncio.open_connection("127.0.0.1", server.port)


async def greeted(server: Server) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    reader, writer = await connect(server)
    writer.write(f"stormjib-measure/2 {TOKEN}\n".encode())
    assert await reader.readexactly(1) == b"K"
    return reader, writer


async def rest(reader: asyncio.StreamReader) -> bytes:
    """All that comes until the server hangs up, or so long that it plainly does not."""
    try:
        async with asyncio.timeout(5):
            return await reader.read()
    except ConnectionError:
        return b""


@pytest.mark.parametrize("host", ["127.0.0.1", "[::1]"])
async def test_a_healthy_path_is_measured_whole(server: Server, host: str) -> None:
    answer = await measure(f"{host}:{server.port}", TOKEN, 1.0)
    assert (answer.ok, answer.text) == (True, "")
    assert answer.bytes == BURSTS * BURST_BYTES
    assert 0 < answer.seconds < 1
    assert 0 < answer.rtt_s < 0.1


async def test_acknowledgements_do_not_wait_for_each_other(server: Server) -> None:
    """With Nagle's algorithm and delayed acknowledgements every burst would take 40 ms, on any path."""
    answers = [await measure(f"127.0.0.1:{server.port}", TOKEN) for _ in range(3)]
    assert min(answer.seconds for answer in answers) < BURSTS * 0.02


async def test_two_measurements_at_once_are_both_whole(server: Server) -> None:
    peer = f"127.0.0.1:{server.port}"
    answers = await asyncio.gather(*(measure(peer, TOKEN, 1.0) for _ in range(2)))
    assert [answer.bytes for answer in answers] == [BURSTS * BURST_BYTES] * 2


async def test_nobody_listens(server: Server) -> None:
    await server.close()
    answer = await measure(f"127.0.0.1:{server.port}", TOKEN, 1.0)
    assert not answer.ok
    assert not answer.turned_away, "something may be in the way"
    assert "connection to 127.0.0.1" in answer.text


@pytest.mark.parametrize("limit", [0.0, 0.3, 60.0])
async def test_a_peer_that_never_answers_costs_the_limit_and_no_more(limit: float) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        begin = time.monotonic()
        answer = await measure(f"127.0.0.1:{silent.getsockname()[1]}", TOKEN, limit)
        assert time.monotonic() - begin < min(limit, 1.0) + SLACK_S
    assert not answer.ok
    assert "not done in" in answer.text


async def test_a_peer_that_takes_part_of_it_gives_a_partial_answer(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def stingy(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if await reader.readexactly(1) == b"P":
            writer.write(b"P")
            return
        for _ in range(3):
            await reader.readexactly(transfer.CHUNK)
            writer.write(b"A")
        await asyncio.sleep(60)

    monkeypatch.setattr(transfer, "_answer", stingy)
    answer = await measure(f"127.0.0.1:{server.port}", TOKEN, 0.4)
    assert answer.ok
    assert answer.bytes == 3 * transfer.CHUNK
    assert 0.1 < answer.seconds < 0.4 + SLACK_S  # the waiting counts: the path has stood still
    assert answer.rtt_s > 0
    assert answer.text.endswith(f"49152 of 1048576 bytes, {PINGS} of {PINGS} pings")


@pytest.mark.parametrize(("told", "least", "most"), [(0.0, 0.2, 1.0), (0.05, 0.0, 0.1), (4000.0, 0.0, 0.1)])
async def test_what_the_peer_waited_for_a_processor_is_not_the_paths(
    server: Server, monkeypatch: pytest.MonkeyPatch, told: float, least: float, most: float
) -> None:
    async def late(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if await reader.readexactly(1) == b"P":
            writer.write(b"P")
            return
        await reader.readexactly(BURST_BYTES)
        await asyncio.sleep(0.05)
        writer.write(b"A" * (BURST_BYTES // transfer.CHUNK) + int(told * 1e6).to_bytes(4, "big"))

    monkeypatch.setattr(transfer, "_answer", late)
    answer = await measure(f"127.0.0.1:{server.port}", TOKEN)
    assert (answer.ok, answer.bytes) == (True, BURSTS * BURST_BYTES)
    assert least <= answer.seconds < most
    assert answer.seconds > 0  # the client ran for some time, whatever its peer says
    assert answer.queued_s >= BURSTS * told - 1e-6


async def test_what_the_client_waited_for_a_processor_is_not_the_paths(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every look at the scheduler finds 30 ms more of waiting: also of those that passed meanwhile."""
    looks = itertools.count()
    real = transfer._schedule

    def waiting() -> tuple[float, float]:
        time.sleep(0.03)
        return real()[0], 0.03 * next(looks)

    monkeypatch.setattr(transfer, "_schedule", waiting)
    begin = time.monotonic()
    answer = await measure(f"127.0.0.1:{server.port}", TOKEN)
    assert time.monotonic() - begin > 4 * 0.06, "the fault fired"
    assert answer.ok
    assert answer.seconds < 0.1


async def test_the_server_tells_what_it_waited_for_a_processor(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    waits = iter((7.0, 7.25))
    monkeypatch.setattr(transfer, "_schedule", lambda: (0.0, next(waits)))
    reader, writer = await greeted(server)
    writer.write(b"B" + bytes(BURST_BYTES))
    assert await reader.readexactly(BURST_BYTES // transfer.CHUNK) == b"A" * (BURST_BYTES // transfer.CHUNK)
    assert int.from_bytes(await reader.readexactly(4), "big") == 250_000
    writer.transport.abort()


def test_beside_a_busy_process_this_thread_waits() -> None:
    allowed = os.sched_getaffinity(0)
    cpu = min(allowed)
    burn = f"import os\nos.sched_setaffinity(0, {{{cpu}}})\nwhile True: pass"
    other = subprocess.Popen([sys.executable, "-c", burn])
    try:
        os.sched_setaffinity(0, {cpu})
        clock, deadline = transfer._Clock(), time.monotonic() + 10
        while clock.queued_s() < 0.05:
            assert time.monotonic() < deadline, "nothing competes with it"
        began = clock._began
        path_s, waited_s = clock.path_s(0.0)
        assert path_s <= time.monotonic() - began - 0.05
        assert waited_s >= 0.05
    finally:
        os.sched_setaffinity(0, allowed)
        other.kill()
        other.wait()


async def test_another_jobs_agent_gets_nothing(server: Server) -> None:
    answer = await measure(f"127.0.0.1:{server.port}", measuring_token("other"), 1.0)
    assert not answer.ok
    assert answer.turned_away, "it is there, and the path with it"
    assert "hung up" in answer.text or "failed" in answer.text


async def test_an_agent_of_another_version_turns_away_and_is_no_broken_path(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(transfer, "_greeting", lambda token: f"stormjib-measure/1 {token}\n".encode())
    answer = await measure(f"127.0.0.1:{server.port}", TOKEN, 1.0)
    assert (answer.ok, answer.turned_away) == (False, True)


HOSTILE = {
    "no token": f"stormjib-measure/2 {'0' * 64}\n".encode(),
    "http": b"GET / HTTP/1.1\r\nHost: x\r\nContent-Length: 100000\r\n\r\n" + b"y" * 100_000,
    "a line without an end": b"x" * 1_000_000,
    "bytes of all kinds": bytes(range(256)) * 4096,
    "the token in capitals": f"stormjib-measure/2 {TOKEN.upper()}\n".encode(),
    "a bare burst": b"B" + bytes(BURST_BYTES),
}


@pytest.mark.parametrize("said", HOSTILE.values(), ids=HOSTILE)
async def test_a_stranger_gets_no_byte_and_is_dropped_at_once(server: Server, said: bytes) -> None:
    begin = time.monotonic()
    reader, writer = await connect(server)
    writer.write(said)
    assert await rest(reader) == b""
    assert time.monotonic() - begin < 1.0
    writer.transport.abort()
    assert (await measure(f"127.0.0.1:{server.port}", TOKEN, 1.0)).ok


async def test_a_stranger_that_is_silent_is_dropped_soon(server: Server) -> None:
    begin = time.monotonic()
    reader, writer = await connect(server)
    assert await rest(reader) == b""
    assert transfer.GREET_S * 0.9 < time.monotonic() - begin < transfer.GREET_S + SLACK_S
    writer.transport.abort()


@pytest.mark.parametrize("said", [b"X", b"\x00", b"b"])
async def test_an_unknown_command_ends_the_connection(server: Server, said: bytes) -> None:
    reader, writer = await greeted(server)
    writer.write(said)
    assert await rest(reader) == b""
    writer.transport.abort()


async def test_a_peer_gets_no_more_than_one_measurement(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Pings for ever are answered so many times; then the server is gone."""
    monkeypatch.setattr(transfer, "CONNECTION_S", 0.5)
    reader, writer = await greeted(server)
    writer.write(b"P" * 1000)
    assert await rest(reader) == b"P" * (BURSTS + PINGS)
    writer.transport.abort()


async def test_a_peer_that_does_not_go_is_dropped(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transfer, "CONNECTION_S", 0.5)
    begin = time.monotonic()
    reader, writer = await greeted(server)
    assert await rest(reader) == b""
    assert time.monotonic() - begin < transfer.CONNECTION_S + SLACK_S
    writer.transport.abort()


async def test_strangers_do_not_keep_peers_out(server: Server) -> None:
    strangers = [await connect(server) for _ in range(3 * CONNECTIONS)]
    answer = await measure(f"127.0.0.1:{server.port}", TOKEN, 1.0)
    assert answer.bytes == BURSTS * BURST_BYTES
    for _, writer in strangers:
        writer.transport.abort()


async def test_connections_of_peers_are_bounded(server: Server) -> None:
    known = [await greeted(server) for _ in range(CONNECTIONS)]
    assert not (await measure(f"127.0.0.1:{server.port}", TOKEN, 0.5)).ok
    for _, writer in known:
        writer.transport.abort()


async def test_a_closed_server_leaves_no_connection_open() -> None:
    server = Server(TOKEN)
    await server.start()
    reader, writer = await greeted(server)
    await server.close()
    assert await rest(reader) == b""
    writer.transport.abort()


async def test_a_cancelled_measurement_hangs_up() -> None:
    came, left = asyncio.Event(), asyncio.Event()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        came.set()
        with contextlib.suppress(ConnectionError):
            await reader.read()
        left.set()
        writer.transport.abort()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    task = asyncio.create_task(measure(f"127.0.0.1:{server.sockets[0].getsockname()[1]}", TOKEN, 1.0))
    async with asyncio.timeout(5):
        await came.wait()
        task.cancel()
        await left.wait()
    assert task.cancelled()
    server.close()


@pytest.mark.parametrize(
    ("text", "address"),
    [
        ("10.0.0.7:4711", ("10.0.0.7", 4711)),
        ("[fd00::7]:1", ("fd00::7", 1)),
        ("0.0.0.0:65535", ("0.0.0.0", 65535)),
    ],
)
def test_an_address_is_read(text: str, address: tuple[str, int]) -> None:
    assert parse_address(text) == address


@pytest.mark.parametrize(
    "text",
    [
        "",
        ":",
        "10.0.0.7",
        "10.0.0.7:",
        "10.0.0.7:0",
        "10.0.0.7:65536",
        "10.0.0.7:-1",
        "10.0.0.7:1e3",
        "10.0.0.7:\u0661",
        "10.0.0.7:" + "9" * 10_000,
        "kubernetes.default.svc:443",
        "[fe80::1%eth0]:1",
        "10.0.0.7:1:2",
        "http://10.0.0.7:1",
        "\n10.0.0.7:1",
    ],
)
async def test_what_is_no_address_is_refused_by_name(text: str) -> None:
    with pytest.raises(AddressError, match="is not an IP address and a port"):
        parse_address(text)
    answer = await measure(text, TOKEN, 1.0)
    assert not answer.ok
    assert len(answer.text) < 300


def test_the_measuring_token_gives_nothing_away() -> None:
    assert "secret" not in TOKEN
    assert measuring_token("secret2") != TOKEN
