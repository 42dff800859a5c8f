"""Measures one path between two agents: four bursts of 256 KiB and twenty pings, in at most a second.

Every agent has a `Server`; `measure` is the client. The bursts go from the client to the server, which acknowledges every
16 KiB, so that a path that is too slow for the whole still gives a figure. One connection:

    client  greeting with the token of the job     server  K
    client  P                                      server  P                        a ping, at most 20
    client  B and 256 KiB                          server  A after every 16 KiB     a burst, at most 4
                                                   server  4 bytes, big-endian      microseconds of it that the server was
                                                                                    ready to run and had no processor

What either end waited for a processor is not the path's, and is taken off: agents share their node with ranks that load data.

Whoever does not know the token gets no byte, and nobody gets more than a few connections, seconds and megabytes.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import hmac
import ipaddress
import socket
import statistics
import struct
import time
from dataclasses import dataclass, field

from stormjib_health.sampler.proc import parse_schedule, read_small
from stormjib_health.wire import Answer

BURSTS = 4
BURST_BYTES = 256 * 1024
CHUNK = 16 * 1024
PINGS = 20
LIMIT_S = 1.0
"""No measurement takes longer, whatever was asked for."""
PING_SHARE = 0.3
"""Of the limit: a path of long delay gets fewer pings, so that the bursts get their turn."""

CONNECTIONS = 16
GREET_S = 0.5
"""How long a connection may take to say its token."""
CONNECTION_S = 2.0
_RETRANSMITTED = struct.Struct("=100xI")
"""tcpi_total_retrans of struct tcp_info."""
_QUEUED_US = struct.Struct("!I")
_WELCOME, _PING, _BURST, _ARRIVED = b"K", b"P", b"B", b"A"
_PAYLOAD = _BURST + bytes(range(256)) * (BURST_BYTES // 256)


class AddressError(ValueError):
    """A peer's address is not an IP address with a port."""


class _Stranger(Exception):
    """Not one of us, or not our protocol: the connection is dropped without a word."""


def measuring_token(secret: str) -> str:
    """The token of a job's measuring servers, from the token of its agents: that one itself never goes to a peer."""
    return hmac.new(secret.encode(), b"stormjib measure", hashlib.sha256).hexdigest()


def parse_address(peer: str) -> tuple[str, int]:
    """`1.2.3.4:5` or `[::1]:5` as (host, port). Raises AddressError: a name would have to be looked up."""
    host, _, port = peer.rpartition(":")
    host = host.removeprefix("[").removesuffix("]")
    try:
        ipaddress.ip_address(host)
    except ValueError:
        host = ""
    if not host or "%" in host or not (port.isascii() and port.isdecimal() and 0 < int(port[:6]) < 65536):
        raise AddressError(f"peer {peer[:80]!r} is not an IP address and a port, such as 10.0.0.7:4711")
    return host, int(port)


def _greeting(token: str) -> bytes:
    return f"stormjib-measure/2 {token}\n".encode()


class _Clock:
    """Of a stretch of this thread's life: time that passed, time on a processor, time waiting for one."""

    def __init__(self) -> None:
        self._began = time.monotonic()
        self._ran, self._queued = _schedule()

    def queued_s(self) -> float:
        """Ready to run, and no processor was free."""
        return _schedule()[1] - self._queued

    def path_s(self, peer_queued_s: float) -> tuple[float, float]:
        """What is left without both ends' waiting, and that. Never less than the thread ran: both may have waited at once."""
        passed = time.monotonic() - self._began
        ran, queued = _schedule()
        waited = queued - self._queued + peer_queued_s
        return max(passed - waited, ran - self._ran), waited


def _schedule() -> tuple[float, float]:
    return parse_schedule(read_small("/proc/thread-self/schedstat"))


# --- the server -----------------------------------------------------------------------------------------------------


class Server:
    """Answers measurements of peers that know `token`. Make it and `start` it inside a running event loop."""

    def __init__(self, token: str) -> None:
        self.port = 0
        """Chosen by the kernel; 0 until it is started."""
        self._greeting = _greeting(token)
        self._server: asyncio.Server | None = None
        self._open: dict[asyncio.Task[None], bool] = {}
        """Each connection's task, the oldest first, and whether it has shown the token."""

    async def start(self) -> None:
        """Listen on every address of this host. Raises OSError where that cannot be."""
        self._server = await asyncio.start_server(self._accept, sock=_listener(), limit=2 * CHUNK)
        self.port = self._server.sockets[0].getsockname()[1]

    async def close(self) -> None:
        """Stop listening and drop every connection."""
        if self._server is not None:
            self._server.close()
        tasks = list(self._open)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if len(self._open) >= CONNECTIONS and not self._make_room():
            writer.transport.abort()
            return
        task = asyncio.get_running_loop().create_task(self._serve(reader, writer))
        self._open[task] = False
        task.add_done_callback(lambda done: self._gone(done, writer))

    def _make_room(self) -> bool:
        """Strangers must not keep peers out: the one that has been here longest without a token goes."""
        oldest = next((task for task, known in self._open.items() if not known), None)
        if oldest is None:
            return False
        del self._open[oldest]
        oldest.cancel()
        return True

    def _gone(self, task: asyncio.Task[None], writer: asyncio.StreamWriter) -> None:
        self._open.pop(task, None)
        writer.transport.abort()
        if not task.cancelled():
            task.result()  # `_serve` handles all that a peer can do: what is left is a bug, and is shown

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            async with asyncio.timeout(CONNECTION_S):
                await self._greet(reader, writer)
                for _ in range(BURSTS + PINGS):
                    await _answer(reader, writer)
                await reader.read(1)  # the client hangs up first, and so keeps the port's TIME_WAIT
        except (OSError, TimeoutError, asyncio.IncompleteReadError, _Stranger):
            pass

    async def _greet(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        async with asyncio.timeout(GREET_S):
            said = await reader.readexactly(len(self._greeting))
        if not hmac.compare_digest(said, self._greeting):
            raise _Stranger
        task = asyncio.current_task()
        if task in self._open:
            self._open[task] = True
        writer.write(_WELCOME)


async def _answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    command = await reader.readexactly(1)
    if command == _PING:
        writer.write(_PING)
    elif command == _BURST:
        clock = _Clock()
        for _ in range(BURST_BYTES // CHUNK):
            await reader.readexactly(CHUNK)
            writer.write(_ARRIVED)
        writer.write(_QUEUED_US.pack(min(int(clock.queued_s() * 1e6), 0xFFFFFFFF)))
    else:
        raise _Stranger


def _listener() -> socket.socket:
    listener = _listening()
    # asyncio sets it only where the protocol is said by number. Without it every acknowledgement waits for the one before.
    listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return listener


def _listening() -> socket.socket:
    try:
        # One socket for both families: with two, port 0 would give two ports.
        return socket.create_server(("", 0), family=socket.AF_INET6, dualstack_ipv6=True)
    except (OSError, ValueError):  # no IPv6 in this kernel, or switched off
        return socket.create_server(("", 0))


# --- the client -----------------------------------------------------------------------------------------------------


async def measure(peer: str, token: str, limit_s: float = LIMIT_S) -> Answer:
    """Measure the path to `peer` (`host:port`). Always answers within `limit_s` and LIMIT_S, whatever the peer does.

    The answer (its `id` is 0) is `ok` once bytes have arrived: `bytes` of the bursts so far, `seconds` that they would have
    taken had all been like the median one and no end waited for a processor, `rtt_s` the shortest of the pings: a busy
    processor spoils one of them, the store of a rate limiter favours the first, a slow path shows in all. `text` says what
    was cut off, or why nothing was measured; `turned_away` that the peer did not want to.
    """
    limit_s = max(0.0, min(limit_s, LIMIT_S))
    found = _Found()
    problem = ""
    try:
        async with asyncio.timeout(limit_s):
            await _measure(*parse_address(peer), token, limit_s * PING_SHARE, found)
    except AddressError as error:
        problem = str(error)
    except TimeoutError:
        problem = f"{found.doing} {peer} not done in {limit_s:.2f} s"
    except asyncio.IncompleteReadError:
        problem = f"{peer} hung up: another job's, another version, or too busy"
        found.turned_away = found.doing == "greeting of"
    except OSError as error:
        found.turned_away = found.doing == "greeting of" and isinstance(error, ConnectionError)
        problem = f"{found.doing} {peer} failed: {error.strerror or error}"
    return found.answer(problem)


@dataclass
class _Found:
    """What is known so far."""

    doing: str = "connection to"
    pings: list[float] = field(default_factory=list)
    bursts: list[float] = field(default_factory=list)
    """Seconds of each that arrived, without what the ends waited for a processor."""
    unfinished_s: float = 0.0
    queued_s: float = 0.0
    bytes: int = 0
    again: int = 0
    turned_away: bool = False

    def answer(self, problem: str) -> Answer:
        if problem and self.doing == "transfer to":
            problem += f": {self.bytes} of {BURSTS * BURST_BYTES} bytes, {len(self.pings)} of {PINGS} pings"
        usual = statistics.median(self.bursts) if self.bursts else 0.0
        seconds = len(self.bursts) * usual + self.unfinished_s
        rtt = min(self.pings, default=0.0)
        ok, text = self.bytes > 0, problem[:512]
        return Answer(
            0, ok, seconds, bytes=self.bytes, again=self.again, rtt_s=rtt, text=text, turned_away=self.turned_away,
            queued_s=self.queued_s,
        )  # fmt: skip


async def _measure(host: str, port: int, token: str, ping_s: float, found: _Found) -> None:
    reader, writer = await asyncio.open_connection(host, port, limit=CHUNK)
    try:
        found.doing = "greeting of"
        writer.write(_greeting(token))
        await reader.readexactly(1)
        found.doing = "transfer to"
        stop = time.monotonic() + ping_s
        while len(found.pings) < PINGS and time.monotonic() < stop:
            await _ping(reader, writer, found)
        for _ in range(BURSTS):
            await _burst(reader, writer, found)
    finally:
        found.again = _sent_again(writer.get_extra_info("socket"))
        writer.transport.abort()


def _sent_again(connection: socket.socket) -> int:
    """Segments that the kernel has sent more than once: what is lost shows here, however quick the bursts were. 0 where the
    connection is gone already."""
    with contextlib.suppress(OSError):
        info = connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, _RETRANSMITTED.size)
        return int(_RETRANSMITTED.unpack(info)[0])
    return 0


async def _ping(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, found: _Found) -> None:
    begin = time.monotonic()
    writer.write(_PING)
    await reader.readexactly(1)
    found.pings.append(time.monotonic() - begin)


async def _burst(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, found: _Found) -> None:
    clock, peer_queued_s = _Clock(), 0.0
    writer.write(_PAYLOAD)
    try:
        for _ in range(BURST_BYTES // CHUNK):
            await reader.readexactly(1)
            found.bytes += CHUNK
        peer_queued_s = _QUEUED_US.unpack(await reader.readexactly(_QUEUED_US.size))[0] * 1e-6
    finally:
        found.unfinished_s, waited = clock.path_s(
            peer_queued_s
        )  # of one that is cut off it counts how far it came
        found.queued_s += waited
    found.bursts.append(found.unfinished_s)
    found.unfinished_s = 0.0
