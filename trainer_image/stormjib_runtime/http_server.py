"""The server side of `http`: routes to async handlers, limits and time-outs on everything a peer may send.

`server = await serve(routes, host, port)`. When the peer goes away while a handler waits (a long poll), the handler is
cancelled; `Connection.on_close`, if set, is called in any case. Malformed input is answered and the connection closed;
it never reaches the log.
"""

from __future__ import annotations

import asyncio
import hmac
import re
import socket
import sys
import traceback
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from http import HTTPStatus
from urllib.parse import parse_qsl

from stormjib_runtime.http import MAX_HEAD, Malformed, Response, read_body, read_head

MAX_CONNECTIONS = 4096
_METHOD = re.compile("[A-Z]+")
_TARGET = re.compile(r"/[!\"$-~]*")  # printable, and no fragment
IDLE_S = 30.0
"""From one answer to the whole head of the next request: bounds both an idle connection and a peer that dribbles."""
READ_S = 5.0
"""For a body to come in, and for an answer to go out."""


class Connection:
    """One accepted connection, as a handler sees it."""

    def __init__(self) -> None:
        self.on_close: Callable[[], None] | None = None
        self.closed = False
        self._handling: asyncio.Task[None] | None = None

    def ended(self) -> None:
        """The peer closed, or the link was reset."""
        if self.closed:
            return
        self.closed = True
        if self._handling is not None:
            self._handling.cancel()
        if self.on_close is not None:
            self.on_close()

    async def handle(self, handler: Handler, request: Request) -> Response:
        """Run a handler; it is cancelled when the peer goes away before its answer."""
        self._handling = asyncio.current_task()
        try:
            return await handler(request)
        finally:
            self._handling = None


@dataclass(frozen=True)
class Request:
    """One request, whole: bodies are short."""

    method: str
    path: str
    query: Mapping[str, str]
    headers: Mapping[str, str]
    body: bytes = b""
    connection: Connection = field(default_factory=Connection)

    def number(self, name: str) -> int:
        """The number that the query gives for `name`. Raises Malformed, which a handler may let pass."""
        value = self.query.get(name, "")
        if not (value.isascii() and value.isdecimal() and len(value) <= 19):
            raise Malformed(HTTPStatus.BAD_REQUEST, f"query {name} is {value[:32]!r}; wanted a number")
        return int(value)

    def bearer(self, token: str) -> bool:
        """Whether it carries `token`. Takes the same time for every wrong one; an empty token opens nothing."""
        given = self.headers.get("authorization", "").encode("latin-1")
        return bool(token) and hmac.compare_digest(given, f"Bearer {token}".encode())


Handler = Callable[[Request], Awaitable[Response]]
Routes = Mapping[tuple[str, str], Handler]
"""(method, path) -> handler."""


def text(status: HTTPStatus, words: str) -> Response:
    """A plain-text answer, for people."""
    return Response(status, words.encode("utf-8", "replace"), "text/plain; charset=utf-8")


async def serve(routes: Routes, host: str, port: int) -> Server:
    """Listen on `host` ("" is every address, IPv4 and IPv6) and `port` (0 lets the kernel choose)."""
    server = Server(routes, _listen(host, port))
    await server.start()
    return server


def _listen(host: str, port: int) -> socket.socket:
    if host:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        return socket.create_server((host, port), family=family, backlog=512)
    try:
        # One socket for both families: with two, port 0 would give two ports.
        return socket.create_server((host, port), family=socket.AF_INET6, dualstack_ipv6=True, backlog=512)
    except (OSError, ValueError):  # no IPv6 in this kernel, or switched off
        return socket.create_server((host, port), backlog=512)


class Server:
    """A listening server; `port` is the one that the kernel chose."""

    def __init__(self, routes: Routes, listener: socket.socket) -> None:
        self.port: int = listener.getsockname()[1]
        self._routes = routes
        self._listener = listener
        self._server: asyncio.Server | None = None
        self._tasks: set[asyncio.Task[None]] = set()

    async def start(self) -> None:
        loop = asyncio.get_running_loop()
        self._server = await loop.create_server(self._protocol, sock=self._listener, backlog=512)

    async def close(self) -> None:
        """Stop listening and drop every connection."""
        if self._server is not None:
            self._server.close()
        for task in self._tasks:
            task.cancel()
        if self._tasks:
            await asyncio.wait(self._tasks)

    def _protocol(self) -> asyncio.StreamReaderProtocol:
        connection = Connection()

        async def connected(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            await self._connected(connection, reader, writer)

        return asyncio.StreamReaderProtocol(_Reader(connection), connected)

    async def _connected(
        self, connection: Connection, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        task = asyncio.current_task()
        if task is None or len(self._tasks) >= MAX_CONNECTIONS:
            writer.transport.abort()
            return
        self._tasks.add(task)
        try:
            await self._talk(connection, reader, writer)
        except (OSError, EOFError, TimeoutError, asyncio.CancelledError):
            # The peer went away or was too slow, or `close` ended us: nothing is left to do for this connection.
            writer.transport.abort()
        finally:
            self._tasks.discard(task)
            writer.close()
            connection.ended()

    async def _talk(
        self, connection: Connection, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        keep = True
        while keep:
            try:
                request = await _read_request(reader, connection)
            except Malformed as error:
                await _answer(writer, text(error.status, str(error)), keep=False)
                return
            if connection.closed:
                return  # its peer said this and was gone: nobody is told of that any more who asks for it now
            response = await connection.handle(self._handle, request)
            keep = request.headers.get("connection", "").lower() != "close"
            await _answer(writer, response, keep=keep)

    async def _handle(self, request: Request) -> Response:
        handler = self._routes.get((request.method, request.path))
        if handler is None:
            known = any(path == request.path for _, path in self._routes)
            return text(HTTPStatus.METHOD_NOT_ALLOWED if known else HTTPStatus.NOT_FOUND, "no such call")
        try:
            return await handler(request)
        except Malformed as error:
            return text(error.status, str(error))
        except Exception:  # noqa: BLE001  the top of one request: a bug in it must not end the others
            traceback.print_exc(file=sys.stderr)
            return text(HTTPStatus.INTERNAL_SERVER_ERROR, "a bug; the log has it")


class _Reader(asyncio.StreamReader):
    """Tells the connection at once that the peer is gone, also while nobody reads (a long poll)."""

    def __init__(self, connection: Connection) -> None:
        super().__init__(limit=MAX_HEAD)
        self._connection = connection

    def feed_eof(self) -> None:
        super().feed_eof()
        self._connection.ended()

    def set_exception(self, exc: Exception) -> None:
        super().set_exception(exc)
        self._connection.ended()


async def _read_request(reader: asyncio.StreamReader, connection: Connection) -> Request:
    async with asyncio.timeout(IDLE_S) as limit:
        first, headers = await read_head(reader)
        limit.reschedule(asyncio.get_running_loop().time() + READ_S)
        method, path, query = _first_line(first)
        if "expect" in headers:
            raise Malformed(HTTPStatus.EXPECTATION_FAILED, "send the body without asking")
        body = await read_body(reader, headers, required=method in ("POST", "PUT"))
    return Request(method, path, query, headers, body, connection)


def _first_line(first: str) -> tuple[str, str, dict[str, str]]:
    method, _, rest = first.partition(" ")
    target, _, version = rest.partition(" ")
    if not _METHOD.fullmatch(method):
        raise Malformed(HTTPStatus.BAD_REQUEST, f"bad request line {first[:64]!r}")
    if not _TARGET.fullmatch(target):
        raise Malformed(HTTPStatus.BAD_REQUEST, f"bad request target {target[:64]!r}")
    if version != "HTTP/1.1":
        raise Malformed(HTTPStatus.HTTP_VERSION_NOT_SUPPORTED, f"{version[:16]!r} is not HTTP/1.1")
    path, _, query = target.partition("?")
    return method, path, _query(query) if query else {}


def _query(query: str) -> dict[str, str]:
    try:
        pairs = parse_qsl(query, keep_blank_values=True, strict_parsing=True, max_num_fields=16)
    except ValueError as error:
        raise Malformed(HTTPStatus.BAD_REQUEST, f"bad query: {error}") from error
    if len(dict(pairs)) != len(pairs):
        raise Malformed(HTTPStatus.BAD_REQUEST, "a query name is given twice")
    return dict(pairs)


async def _answer(writer: asyncio.StreamWriter, response: Response, *, keep: bool) -> None:
    status = HTTPStatus(response.status)
    head = (
        f"HTTP/1.1 {status.value} {status.phrase}",
        f"Content-Type: {response.content_type}",
        f"Content-Length: {len(response.body)}",
        f"Connection: {'keep-alive' if keep else 'close'}",
    )
    writer.write(("\r\n".join(head) + "\r\n\r\n").encode("latin-1") + response.body)
    if writer.transport.get_write_buffer_size():  # nearly always the kernel has taken all of it
        async with asyncio.timeout(READ_S):
            await writer.drain()
