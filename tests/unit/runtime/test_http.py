"""HTTP between our own programs: limits, malformed input, slow and vanishing peers, both address families."""

from __future__ import annotations

import asyncio
import socket
from contextlib import asynccontextmanager
from http import HTTPStatus
from typing import TYPE_CHECKING

import pytest

from stormjib_runtime import http, http_server
from stormjib_runtime.http import MAX_BODY, MAX_HEAD, Client, RequestFailed, Response, request, split_url
from stormjib_runtime.http_server import Request, Server, serve, text

if TYPE_CHECKING:
    from collections.abc import AsyncIterator


class Echo:
    """Answers what it got; `/wait` waits for ever and remembers how it ended."""

    def __init__(self) -> None:
        self.waiting = asyncio.Event()
        self.closed = asyncio.Event()
        self.cancelled = asyncio.Event()

    async def echo(self, request: Request) -> Response:
        return Response(200, request.body + request.query.get("q", "").encode())

    async def secret(self, request: Request) -> Response:
        return text(HTTPStatus.OK, "yes" if request.bearer("token") else "no")

    async def broken(self, request: Request) -> Response:
        raise KeyError("a bug")

    async def wait(self, request: Request) -> Response:
        request.connection.on_close = self.closed.set
        self.waiting.set()
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            self.cancelled.set()
            raise
        return Response(200)


@asynccontextmanager
async def serving(host: str = "127.0.0.1") -> AsyncIterator[tuple[Server, Echo]]:
    echo = Echo()
    routes = {
        ("POST", "/echo"): echo.echo,
        ("GET", "/secret"): echo.secret,
        ("GET", "/broken"): echo.broken,
        ("GET", "/wait"): echo.wait,
    }
    server = await serve(routes, host, 0)
    try:
        yield server, echo
    finally:
        await server.close()


async def raw(port: int, data: bytes) -> bytes:
    """Send bytes and read until the server closes."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    try:
        writer.write(data)
        async with asyncio.timeout(10):
            return await reader.read()
    finally:
        writer.transport.abort()


def status(answer: bytes) -> int:
    return int(answer.split(b" ", 2)[1])


async def test_a_request_is_answered_over_both_address_families() -> None:
    async with serving("") as (server, _):
        for host in ("127.0.0.1", "::1"):
            answer = await request("POST", host, server.port, "/echo?q=b%20c", body=b"a", token="t")
            assert answer == Response(200, b"ab c")


async def test_one_connection_carries_many_requests_and_is_made_again_when_it_was_closed() -> None:
    async with serving() as (server, _):
        client = Client("127.0.0.1", server.port)
        for _ in range(3):
            assert (await client.request("POST", "/echo", body=b"x")).body == b"x"
        assert len(server._tasks) == 1
        for task in list(server._tasks):
            task.cancel()
        assert (await client.request("POST", "/echo", body=b"again")).body == b"again"
        client.close()


async def test_unknown_paths_and_methods_are_told_apart() -> None:
    async with serving() as (server, _):
        assert (await request("GET", "127.0.0.1", server.port, "/nothing")).status == 404
        assert (await request("GET", "127.0.0.1", server.port, "/echo")).status == 405


async def test_a_token_is_compared_whole() -> None:
    async with serving() as (server, _):
        for token, answer in (
            ("token", b"yes"),
            ("toke", b"no"),
            ("tokenn", b"no"),
            ("", b"no"),
            ("ä", b"no"),
        ):
            assert (await request("GET", "127.0.0.1", server.port, "/secret", token=token)).body == answer
    assert not Request("GET", "/", {}, {"authorization": "Bearer "}).bearer("")


async def test_a_bug_in_a_handler_is_one_answer_and_one_traceback(capsys: pytest.CaptureFixture[str]) -> None:
    async with serving() as (server, _):
        assert (await request("GET", "127.0.0.1", server.port, "/broken")).status == 500
        assert (await request("POST", "127.0.0.1", server.port, "/echo", body=b"")).status == 200
    assert "KeyError" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("data", "code"),
    [
        (b"GARBAGE\r\n\r\n", 400),
        (b"\r\n\r\n", 400),
        (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03\r\n\r\n", 400),
        (b"get /echo HTTP/1.1\r\n\r\n", 400),
        (b"GET echo HTTP/1.1\r\n\r\n", 400),
        (b"GET /a b HTTP/1.1\r\n\r\n", 505),
        (b"GET /echo HTTP/1.0\r\n\r\n", 505),
        (b"GET /echo HTTP/2\r\n\r\n", 505),
        (b"GET /\xc3\xa4 HTTP/1.1\r\n\r\n", 400),
        (b"GET /echo?a HTTP/1.1\r\n\r\n", 400),
        (b"GET /echo?a=1&a=2 HTTP/1.1\r\n\r\n", 400),
        (b"GET /echo?" + b"&".join(b"k%d=1" % i for i in range(99)) + b" HTTP/1.1\r\n\r\n", 400),
        (b"POST /echo HTTP/1.1\r\n\r\n", 411),
        (b"POST /echo HTTP/1.1\r\nContent-Length: -1\r\n\r\n", 400),
        (b"POST /echo HTTP/1.1\r\nContent-Length: 1e3\r\n\r\n", 400),
        (b"POST /echo HTTP/1.1\r\nContent-Length: 1\r\nContent-Length: 2\r\n\r\nab", 400),
        (b"POST /echo HTTP/1.1\r\nContent-Length: %d\r\n\r\n" % (MAX_BODY + 1), 413),
        (b"POST /echo HTTP/1.1\r\nContent-Length: " + b"9" * 400 + b"\r\n\r\n", 400),
        (b"POST /echo HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n", 501),
        (b"POST /echo HTTP/1.1\r\nExpect: 100-continue\r\nContent-Length: 1\r\n\r\n", 417),
        (b"GET /echo HTTP/1.1\r\nno colon\r\n\r\n", 400),
        (b"GET /echo HTTP/1.1\r\nname : v\r\n\r\n", 400),
        (b"GET /echo HTTP/1.1\r\na: 1\r\n folded\r\n\r\n", 400),
        (b"GET /echo HTTP/1.1\r\na: \x00\r\n\r\n", 400),
        (b"GET /echo HTTP/1.1\r\na: " + b"x" * MAX_HEAD + b"\r\n\r\n", 431),
    ],
)
async def test_malformed_input_is_answered_and_closed_and_not_logged(
    data: bytes, code: int, capsys: pytest.CaptureFixture[str]
) -> None:
    async with serving() as (server, _):
        assert status(await raw(server.port, data)) == code
        assert (await request("POST", "127.0.0.1", server.port, "/echo", body=b"x")).status == 200
    assert capsys.readouterr().err == ""


async def test_headers_without_end_are_cut_off_at_the_limit() -> None:
    async with serving() as (server, _):
        assert status(await raw(server.port, b"GET / HTTP/1.1\r\n" + b"a: b\r\n" * 5000)) == 431


async def test_the_largest_body_is_taken() -> None:
    async with serving() as (server, _):
        answer = await request("POST", "127.0.0.1", server.port, "/echo", body=b"x" * MAX_BODY)
        assert len(answer.body) == MAX_BODY


@pytest.mark.parametrize(
    "part", [b"", b"GET /echo HTT", b"POST /echo HTTP/1.1\r\nContent-Length: 5\r\n\r\nab"]
)
async def test_a_peer_that_dribbles_is_dropped(part: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http_server, "IDLE_S", 0.2)
    monkeypatch.setattr(http_server, "READ_S", 0.2)
    async with serving() as (server, _):
        assert await raw(server.port, part) == b""


async def test_connections_beyond_the_limit_are_dropped(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http_server, "MAX_CONNECTIONS", 1)
    async with serving() as (server, echo):
        first = asyncio.create_task(request("GET", "127.0.0.1", server.port, "/wait"))
        await asyncio.wait_for(echo.waiting.wait(), 5)
        with pytest.raises(RequestFailed):
            await request("POST", "127.0.0.1", server.port, "/echo", body=b"")
        first.cancel()
        with pytest.raises(asyncio.CancelledError):
            await first


@pytest.mark.parametrize("reset", [True, False])
async def test_a_handler_that_waits_learns_at_once_that_its_peer_is_gone(reset: bool) -> None:
    async with serving() as (server, echo):
        _, writer = await asyncio.open_connection("127.0.0.1", server.port)
        writer.write(b"GET /wait HTTP/1.1\r\n\r\n")
        await asyncio.wait_for(echo.waiting.wait(), 5)
        if reset:  # as a killed container with unread data, or a firewall
            linger = b"\x01\x00\x00\x00\x00\x00\x00\x00"
            writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
            writer.transport.abort()
        else:
            writer.close()
        async with asyncio.timeout(1):
            await echo.closed.wait()
            await echo.cancelled.wait()


async def test_no_answer_is_one_error_that_names_the_request() -> None:
    with socket.create_server(("127.0.0.1", 0)) as deaf:
        port = deaf.getsockname()[1]
        with pytest.raises(RequestFailed, match=f"GET http://127.0.0.1:{port}/x"):
            await request("GET", "127.0.0.1", port, "/x", timeout_s=0.2)
    with pytest.raises(RequestFailed):
        await request("GET", "127.0.0.1", port, "/x")


@pytest.mark.parametrize(
    "answer",
    [
        b"SSH-2.0-OpenSSH\r\n\r\n",
        b"HTTP/1.1 abc OK\r\nContent-Length: 0\r\n\r\n",
        b"HTTP/1.1 200 OK\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nab",
        b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % (MAX_BODY + 1),
        b"",
    ],
)
async def test_an_answer_that_is_not_ours_is_an_error(answer: bytes) -> None:
    async def answer_so(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(answer)
        writer.close()

    server = await asyncio.start_server(answer_so, "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]
    async with server:
        with pytest.raises(RequestFailed):
            await request("GET", "127.0.0.1", port, "/x")


async def test_a_cancelled_request_leaves_no_answer_behind_for_the_next() -> None:
    async with serving() as (server, echo):
        client = Client("127.0.0.1", server.port)
        waiting = asyncio.create_task(client.request("GET", "/wait"))
        await asyncio.wait_for(echo.waiting.wait(), 5)
        waiting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await waiting
        assert (await client.request("POST", "/echo", body=b"mine")).body == b"mine"
        client.close()


def test_addresses_are_read_with_and_without_brackets() -> None:
    assert split_url("http://10.0.0.1:7070") == ("10.0.0.1", 7070)
    assert split_url("http://[fd00::1]:7070/") == ("fd00::1", 7070)
    for wrong in ("https://a:1", "http://a", "a:1", "http://a:1/path", ""):
        with pytest.raises(ValueError, match="HOST:PORT"):
            split_url(wrong)


def test_the_two_halves_share_their_limits() -> None:
    assert (http.MAX_HEAD, http.MAX_BODY) == (8 * 1024, 1 << 20)


async def test_what_a_peer_said_before_it_was_gone_is_not_taken_up_any_more() -> None:
    """Nobody would be told that it is gone: whoever asks for that asks while its request is answered."""
    asked: list[Request] = []

    async def handler(request: Request) -> Response:
        asked.append(request)
        return Response(200)

    server = await serve({("GET", "/"): handler}, "127.0.0.1", 0)
    try:
        for gone in (False, True):
            connection, reader = http_server.Connection(), asyncio.StreamReader()
            reader.feed_data(b"GET / HTTP/1.1\r\nconnection: close\r\n\r\n")
            if gone:
                connection.ended()
            writer = await asyncio.open_connection("127.0.0.1", server.port)
            await server._talk(connection, reader, writer[1])
            writer[1].close()
            assert len(asked) == 1, "the first one is answered"
    finally:
        await server.close()
