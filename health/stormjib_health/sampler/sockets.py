"""The kernel's own books on TCP connections, through NETLINK_SOCK_DIAG: no rank need run, and no privilege is needed.

A dump walks the kernel's whole table of connections, which costs more than all our sockets together. So `Sockets.dump` is
for finding new ones, and `Sockets.look` asks for known ones by name. `parse` is pure. Linux 4.19 or newer.
"""

from __future__ import annotations

import errno
import os
import socket
import struct
from functools import lru_cache
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

NETLINK_SOCK_DIAG = 4
_ERROR, _DONE, _DUMP_OLD, _BY_FAMILY = 2, 3, 18, 20
_REQUEST, _REQUEST_DUMP = 0x1, 0x301
_TCP, _ESTABLISHED = 6, 1
_WANT_INFO = 1 << 1
_INFO = 2
"""The attribute that holds struct tcp_info."""

_HEADER = struct.Struct("=IHHII")  # struct nlmsghdr: length, type, flags, sequence, port
_ATTRIBUTE = struct.Struct("=HH")  # struct rtattr: length, type
_MESSAGE = struct.Struct("=BB2x48s4xII4xI")  # struct inet_diag_msg: family, state, id, rqueue, wqueue, inode
_TCP_INFO = struct.Struct("=4xB3xI12xI28xI8xI56xQ32xQ24xQQ")
"""Backoff, rto, unacked, last_ack_recv, rtt, bytes_received, busy_time, bytes_sent, bytes_retrans."""
_WINDOW = struct.Struct("=12xI")
"""snd_wnd, three counts after those; Linux 5.4 or newer."""
_ONE = struct.Struct("=BBBBI48s")  # struct inet_diag_req_v2
_ALL = struct.Struct(
    "=4B48sII"
)  # struct inet_diag_req: the old form, and the only one that takes both families at once

_MAPPED = b"\0" * 10 + b"\xff\xff"
_BUFFER = 1 << 16
"""The kernel fills at most 32 KiB at once."""
_AT_ONCE = 64
"""Answers that surely fit into the socket's default receive buffer."""


class SocketsError(OSError):
    """The kernel refused, or what it sent has not the form of <linux/inet_diag.h>."""


class Socket(NamedTuple):
    """One established TCP connection, as the kernel has it now. Counts are since it was opened."""

    inode: int
    family: int
    identity: bytes
    """struct inet_diag_sockid: ports, addresses, interface, cookie. Of no other connection until the next boot."""
    unread: int
    """Bytes received that its process has not taken."""
    unsent: int
    """Bytes that its process has written and the peer has not acknowledged."""
    backoff: int
    rto_us: int
    unacked: int
    last_ack_ms: int
    rtt_us: int
    received: int
    busy_us: int
    sent: int
    """Bytes, repeated ones included."""
    retransmitted: int
    window: int = 0
    """Bytes that the peer would take now; 0 where it takes none, or the kernel does not say."""

    @property
    def blocked(self) -> bool:
        """There is something to send, the peer would take it, and nothing leaves: this end has no way out, as when its own
        cable is pulled. A peer that is stopped closes its window instead."""
        return bool(self.backoff and self.unsent and self.window) and not self.unacked

    @property
    def local(self) -> str:
        """`address:port`, IPv6 in brackets; an IPv4 address in IPv6 form is given as IPv4, because its peer may say so."""
        return address(self.family, self.identity[4:20], self.identity[0:2])

    @property
    def remote(self) -> str:
        """The other end, in the same form."""
        return address(self.family, self.identity[20:36], self.identity[2:4])


class Parsed(NamedTuple):
    """What one datagram of the kernel's holds."""

    sockets: list[Socket]
    done: bool = False
    """A dump ends here."""
    error: int = 0
    """errno of a request that was refused."""


@lru_cache(4096)
def address(family: int, host: bytes, port: bytes) -> str:
    """16 bytes of address and 2 of port, as in struct inet_diag_sockid, in the form of `Edge.local`."""
    number = int.from_bytes(port, "big")
    if family == socket.AF_INET:
        return f"{socket.inet_ntop(socket.AF_INET, host[:4])}:{number}"
    if host.startswith(_MAPPED):
        return f"{socket.inet_ntop(socket.AF_INET, host[12:])}:{number}"
    return f"[{socket.inet_ntop(socket.AF_INET6, host)}]:{number}"


def parse(data: bytes | memoryview) -> Parsed:
    """One datagram: the established connections in it that a process holds. Raises SocketsError on anything malformed."""
    found: list[Socket] = []
    at, size = 0, len(data)
    while at < size:
        length, kind = _header(data, at, size)
        if kind == _DONE:
            return Parsed(found, done=True)
        if kind == _ERROR:
            return Parsed(found, error=_refusal(data, at, length))
        one = _socket(data, at + _HEADER.size, at + length) if kind in (_BY_FAMILY, _DUMP_OLD) else None
        if one is not None:
            found.append(one)
        at += (length + 3) & ~3
    return Parsed(found)


def _header(data: bytes | memoryview, at: int, size: int) -> tuple[int, int]:
    if size - at < 16:
        raise SocketsError(f"a netlink header of {size - at} bytes; wanted {_HEADER.size}")
    length, kind, _, _, _ = _HEADER.unpack_from(data, at)
    if not 16 <= length <= size - at:
        raise SocketsError(f"a netlink message says {length} bytes; {size - at} are there")
    return length, kind


def _refusal(data: bytes | memoryview, at: int, length: int) -> int:
    """A message that is an error of 0 only acknowledges, which we never ask for."""
    if length < _HEADER.size + 4:
        raise SocketsError(f"a netlink error of {length} bytes names no error")
    return -int(struct.unpack_from("=i", data, at + _HEADER.size)[0])


def _socket(data: bytes | memoryview, at: int, end: int) -> Socket | None:
    """None for one that is not established, that no process holds (yet), or whose kernel is too old."""
    if end - at < _MESSAGE.size:
        raise SocketsError(f"a socket of {end - at} bytes; wanted {_MESSAGE.size}")
    family, state, identity, unread, unsent, inode = _MESSAGE.unpack_from(data, at)
    info = _find(data, at + _MESSAGE.size, end, _INFO)
    if state != _ESTABLISHED or not inode or info is None or info[1] - info[0] < _TCP_INFO.size:
        return None
    newer = info[0] + _TCP_INFO.size
    window = _WINDOW.unpack_from(data, newer)[0] if newer + _WINDOW.size <= info[1] else 0
    counts = (*_TCP_INFO.unpack_from(data, info[0]), window)
    return Socket(inode, family, identity, unread, unsent, *counts)


def _find(data: bytes | memoryview, at: int, end: int, wanted: int) -> tuple[int, int] | None:
    """Where the content of an attribute begins and ends."""
    while at + _ATTRIBUTE.size <= end:
        length, kind = _ATTRIBUTE.unpack_from(data, at)
        if not _ATTRIBUTE.size <= length <= end - at:
            raise SocketsError(f"an attribute says {length} bytes; {end - at} are there")
        if kind == wanted:
            return at + _ATTRIBUTE.size, at + length
        at += (length + 3) & ~3
    return None


def ask_all() -> bytes:
    """The request for all established connections of this network namespace, in both families."""
    return _message(_DUMP_OLD, _REQUEST_DUMP, _ALL.pack(0, 0, 0, _WANT_INFO, bytes(48), 1 << _ESTABLISHED, 0))


def ask(one: Socket) -> bytes:
    """The request for one connection."""
    return _message(
        _BY_FAMILY, _REQUEST, _ONE.pack(one.family, _TCP, _WANT_INFO, 0, 1 << _ESTABLISHED, one.identity)
    )


def _message(kind: int, flags: int, body: bytes) -> bytes:
    return _HEADER.pack(_HEADER.size + len(body), kind, flags, 1, 0) + body


class Sockets:
    """A conversation with the kernel. It answers while we send, so nothing here waits."""

    def __init__(self) -> None:
        self._netlink: socket.socket | None = None
        self._buffer = memoryview(bytearray(_BUFFER))

    def close(self) -> None:
        if self._netlink is not None:
            self._netlink.close()
            self._netlink = None

    def dump(self) -> list[Socket]:
        """Every established connection of this network namespace. Raises SocketsError."""
        found: list[Socket] = []
        try:
            netlink = self._open()
            netlink.send(ask_all())
            parsed = Parsed([])
            while not parsed.done:
                parsed = self._receive(netlink)
                _raise(parsed.error)
                found += parsed.sockets
        except OSError as error:
            raise self._failed(error) from error
        return found

    def look(self, known: Sequence[Socket]) -> list[Socket]:
        """The same connections now, less those that have ended. Raises SocketsError."""
        found: list[Socket] = []
        try:
            netlink = self._open()
            for first in range(0, len(known), _AT_ONCE):
                some = known[first : first + _AT_ONCE]
                netlink.send(b"".join(map(ask, some)))
                found += self._answers(netlink, some)
        except OSError as error:
            raise self._failed(error) from error
        return found

    def _answers(self, netlink: socket.socket, asked: Iterable[Socket]) -> list[Socket]:
        found: list[Socket] = []
        for _ in asked:
            parsed = self._receive(netlink)
            if parsed.error != errno.ENOENT:
                _raise(parsed.error)
            found += parsed.sockets
        return found

    def _open(self) -> socket.socket:
        if self._netlink is None:
            self._netlink = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, NETLINK_SOCK_DIAG)
            self._netlink.setblocking(False)
        return self._netlink

    def _receive(self, netlink: socket.socket) -> Parsed:
        return parse(self._buffer[: netlink.recv_into(self._buffer)])

    def _failed(self, error: OSError) -> SocketsError:
        """Answers that were not read would be taken for those to the next question: begin anew."""
        self.close()
        return error if isinstance(error, SocketsError) else SocketsError(error.errno, f"sock_diag: {error}")


def _raise(number: int) -> None:
    if number:
        raise SocketsError(number, f"sock_diag: {os.strerror(number)}")
