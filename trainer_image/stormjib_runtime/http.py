"""HTTP/1.1 as small and as strict as two of our own programs need it: messages and the client.

`await request("POST", host, port, "/v1/report", token=..., body=..., timeout_s=3)` opens a fresh connection;
`Client` keeps one open between requests. Both answer any status, and raise `RequestFailed` when no answer came.
The server is in `http_server`. Standard library only: this runs in a trainer pod.
"""

from __future__ import annotations

import asyncio
import re
from dataclasses import dataclass
from http import HTTPStatus
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

if TYPE_CHECKING:
    from collections.abc import Mapping

MAX_HEAD = 8 * 1024
MAX_BODY = 1 << 20
CONNECT_S = 1.0
"""A dead host behind a Service shall be left quickly; inside one cluster a second is plenty."""

_HEADER = re.compile(r"([!#$%&'*+\-.^_`|~0-9A-Za-z]+):[ \t]*([^\x00-\x08\x0a-\x1f\x7f]*)")
JSON = "application/json"


class HttpError(Exception):
    """Root of what goes wrong here."""


class RequestFailed(HttpError):
    """No answer: not connected, cut, too slow, or not HTTP. Says which request."""


class Malformed(HttpError):
    """What the peer sent is not a message that we take; `status` is a server's answer to it."""

    def __init__(self, status: HTTPStatus, text: str) -> None:
        super().__init__(text)
        self.status = status


@dataclass(frozen=True)
class Response:
    """Status and body, sent or received."""

    status: int
    body: bytes = b""
    content_type: str = JSON


def split_url(url: str) -> tuple[str, int]:
    """Host and port of `http://HOST:PORT`, an IPv6 host without its brackets. Raises ValueError on anything else."""
    parts = urlsplit(url)
    if parts.scheme != "http" or not parts.hostname or parts.port is None or parts.path not in ("", "/"):
        raise ValueError(f"{url!r} is not of the form http://HOST:PORT")
    return parts.hostname, parts.port


# --- messages -------------------------------------------------------------------------------------------------------


async def read_head(reader: asyncio.StreamReader) -> tuple[str, dict[str, str]]:
    """First line and headers. Names in lower case; repeated ones joined, so that a second length never passes."""
    try:
        raw = await reader.readuntil(b"\r\n\r\n")
    except asyncio.LimitOverrunError:
        raw = b" " * (MAX_HEAD + 1)
    if len(raw) > MAX_HEAD:
        raise Malformed(HTTPStatus.REQUEST_HEADER_FIELDS_TOO_LARGE, f"head of more than {MAX_HEAD} bytes")
    first, *lines = raw[:-4].decode("latin-1").split("\r\n")
    headers: dict[str, str] = {}
    for line in lines:
        name, value = _header(line)
        headers[name] = f"{headers[name]}, {value}" if name in headers else value
    return first, headers


def _header(line: str) -> tuple[str, str]:
    match = _HEADER.fullmatch(line)
    if match is None:
        raise Malformed(HTTPStatus.BAD_REQUEST, f"bad header line {line[:64]!r}")
    return match[1].lower(), match[2].rstrip(" \t")


async def read_body(reader: asyncio.StreamReader, headers: Mapping[str, str], *, required: bool) -> bytes:
    """The body that the headers announce."""
    if "transfer-encoding" in headers:
        raise Malformed(HTTPStatus.NOT_IMPLEMENTED, "send Content-Length, not Transfer-Encoding")
    length = headers.get("content-length", "" if required else "0")
    if not length:
        raise Malformed(HTTPStatus.LENGTH_REQUIRED, "Content-Length is missing")
    if not (length.isascii() and length.isdecimal() and len(length) <= 16):
        raise Malformed(HTTPStatus.BAD_REQUEST, f"bad Content-Length {length[:32]!r}")
    if int(length) > MAX_BODY:
        raise Malformed(HTTPStatus.REQUEST_ENTITY_TOO_LARGE, f"body of {length} bytes; limit {MAX_BODY}")
    return await reader.readexactly(int(length))


# --- client ---------------------------------------------------------------------------------------------------------


class Client:
    """One peer, one connection kept open, one request at a time.

    A request that fails closes the connection; the next one opens a fresh one. A request on a kept connection that the
    server had closed meanwhile is sent once more: every call of this API may be repeated.
    """

    def __init__(self, host: str, port: int, *, token: str = "") -> None:
        self._host, self._port, self._token = host, port, token
        self._streams: tuple[asyncio.StreamReader, asyncio.StreamWriter] | None = None

    async def request(
        self, method: str, path: str, *, body: bytes | None = None, timeout_s: float = 3.0
    ) -> Response:
        """Send and read one answer within `timeout_s`, connecting included. Raises RequestFailed."""
        try:
            async with asyncio.timeout(timeout_s):
                return await self._exchange(method, path, body)
        except (OSError, EOFError, TimeoutError, Malformed) as error:
            why = str(error) or type(error).__name__
            raise RequestFailed(f"{method} http://{self._host}:{self._port}{path}: {why}") from error

    def close(self) -> None:
        """Drop the connection; the next request opens a fresh one."""
        if self._streams is not None:
            self._streams[1].transport.abort()
            self._streams = None

    async def _exchange(self, method: str, path: str, body: bytes | None) -> Response:
        reused = self._streams is not None
        try:
            return await self._attempt(method, path, body)
        except (ConnectionError, asyncio.IncompleteReadError) as error:
            if not reused or (isinstance(error, asyncio.IncompleteReadError) and error.partial):
                raise
        return await self._attempt(method, path, body)

    async def _attempt(self, method: str, path: str, body: bytes | None) -> Response:
        reader, writer = self._streams or await self._connect()
        # Out of its place until the answer is whole: whatever interrupts this leaves no half-read connection behind.
        self._streams = None
        keep = False
        try:
            writer.write(self._message(method, path, body))
            await writer.drain()
            response, keep = await _read_response(reader)
            return response
        finally:
            if keep:
                self._streams = reader, writer
            else:
                writer.transport.abort()

    async def _connect(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        async with asyncio.timeout(CONNECT_S):
            return await asyncio.open_connection(self._host, self._port, limit=MAX_HEAD)

    def _message(self, method: str, path: str, body: bytes | None) -> bytes:
        host = f"[{self._host}]" if ":" in self._host else self._host
        lines = [f"{method} {path} HTTP/1.1", f"Host: {host}:{self._port}"]
        if self._token:
            lines.append(f"Authorization: Bearer {self._token}")
        if body is not None:
            lines += [f"Content-Type: {JSON}", f"Content-Length: {len(body)}"]
        return ("\r\n".join(lines) + "\r\n\r\n").encode() + (body or b"")


async def request(
    method: str,
    host: str,
    port: int,
    path: str,
    *,
    token: str = "",
    body: bytes | None = None,
    timeout_s: float = 3.0,
) -> Response:
    """One request on a connection of its own. Raises RequestFailed."""
    client = Client(host, port, token=token)
    try:
        return await client.request(method, path, body=body, timeout_s=timeout_s)
    finally:
        client.close()


async def _read_response(reader: asyncio.StreamReader) -> tuple[Response, bool]:
    """The answer, and whether the connection may be kept."""
    first, headers = await read_head(reader)
    version, _, rest = first.partition(" ")
    if version != "HTTP/1.1" or not (rest[:3].isascii() and rest[:3].isdecimal() and len(rest[:3]) == 3):
        raise Malformed(HTTPStatus.BAD_GATEWAY, f"not an HTTP/1.1 answer: {first[:64]!r}")
    body = await read_body(reader, headers, required=True)
    keep = headers.get("connection", "").lower() != "close"
    return Response(int(rest[:3]), body, headers.get("content-type", "")), keep
