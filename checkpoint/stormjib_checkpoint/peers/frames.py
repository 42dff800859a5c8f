"""What is said on a connection over which one process gives another copies of staged steps.

    keeper  its name and 32 random bytes
    giver   32 random bytes and HMAC-SHA-256(token, "giver" and both)
    keeper  HMAC-SHA-256(token, "keeper" and both): an address may be another's by now, who shall not get our weights
    giver   HELLO {"generation":"1.3","slot":0}, then for each step of a rank
            PLACE {"local_rank":0,"number":1}      what was begun before, and is not whole, is dropped
            TRAIN the bytes of train.json          rank 0's
            RECORD the bytes of its record
            PIECE one after the other, as the record says
            and ALIVE when there is nothing to give

A frame is a byte for its kind, four for its length (big-endian), and that many bytes. Each is answered by one byte. Whatever else
comes ends the connection. Nothing is encrypted, as nothing is that ranks send each other.
"""

from __future__ import annotations

import hashlib
import hmac
import os
import struct
import time
from dataclasses import dataclass
from enum import IntEnum
from typing import TYPE_CHECKING

from stormjib_checkpoint.errors import CheckpointError
from stormjib_checkpoint.format import MAX_SMALL_FILE
from stormjib_checkpoint.layout import GenerationId  # noqa: TC001 - records are built from their annotations

if TYPE_CHECKING:
    import socket
    from collections.abc import Callable

GREET_S = 2.0
"""Within it both sides have proved who they are: this long a stranger can hold a connection."""
SILENT_S = 2.0
"""A giver that sends nothing for so long is taken for dead."""
ALIVE_S = 0.5
"""How often a giver with nothing to give says that it lives."""
REPLY_S = 30.0
"""How long a giver waits for a reply: taking memory for a large step takes its keeper seconds."""
NAME = b"stormjib-copies/1\n"
_RANDOM = _PROOF = 32
_CHUNK = 1 << 20
_HEADER = struct.Struct("!BI")


class PeerRefused(CheckpointError):
    """The other side is not of this job, not expected, or does not keep to the protocol: the connection ends."""


class Kind(IntEnum):
    """Of a frame."""

    HELLO = 1
    ALIVE = 2
    PLACE = 3
    TRAIN = 4
    RECORD = 5
    PIECE = 6


class Reply(IntEnum):
    """To a frame."""

    OK = 1
    HELD = 2
    """To RECORD: this very step is there already; no pieces are wanted."""
    TORN = 3
    """To PIECE: not the bytes that the record speaks of. The rank has begun to stage its next step there, or they are damaged."""
    FULL = 4
    """To RECORD: there is no memory for it."""


MOST = {
    Kind.HELLO: 4096,
    Kind.ALIVE: 0,
    Kind.PLACE: 4096,
    Kind.TRAIN: MAX_SMALL_FILE,
    Kind.RECORD: MAX_SMALL_FILE,
    Kind.PIECE: 1 << 30,
}
"""Bytes of a frame; of a PIECE it must be what the record says."""


@dataclass(frozen=True)
class Hello:
    """Who gives: the slot, and the generation that it holds."""

    generation: GenerationId
    slot: int


@dataclass(frozen=True)
class Place:
    """Where a step lies below the giver's folder, and shall lie below its keeper's."""

    local_rank: int
    number: int


# --- greeting -------------------------------------------------------------------------------------------------------


def welcome(connection: socket.socket, token: str) -> None:
    """The keeper's side. Raises PeerRefused and OSError: then not a byte of ours depends on the token."""
    mine, until = os.urandom(_RANDOM), time.monotonic() + GREET_S
    connection.settimeout(GREET_S)
    connection.sendall(NAME + mine)
    theirs, proof = _read_until(connection, _RANDOM, until), _read_until(connection, _PROOF, until)
    if not hmac.compare_digest(proof, _proof(token, b"giver", mine, theirs)):
        raise PeerRefused("a connection that does not know this job's token")
    connection.sendall(_proof(token, b"keeper", mine, theirs))


def greet(connection: socket.socket, token: str) -> None:
    """The giver's side. Raises PeerRefused and OSError."""
    mine, until = os.urandom(_RANDOM), time.monotonic() + GREET_S
    if _read_until(connection, len(NAME), until) != NAME:
        raise PeerRefused("something else listens there")
    theirs = _read_until(connection, _RANDOM, until)
    connection.sendall(mine + _proof(token, b"giver", theirs, mine))
    if not hmac.compare_digest(
        _read_until(connection, _PROOF, until), _proof(token, b"keeper", theirs, mine)
    ):
        raise PeerRefused("who listens there does not know this job's token")


def _proof(token: str, side: bytes, keepers: bytes, givers: bytes) -> bytes:
    return hmac.new(token.encode(), NAME + side + keepers + givers, hashlib.sha256).digest()


# --- frames ---------------------------------------------------------------------------------------------------------


def send(connection: socket.socket, kind: Kind, data: bytes = b"") -> Reply:
    """One frame, and the reply to it. Raises PeerRefused and OSError."""
    connection.sendall(head(kind, len(data)) + data)
    return reply_to(connection)


def head(kind: Kind, size: int) -> bytes:
    """The first bytes of a frame."""
    return _HEADER.pack(kind, size)


def reply_to(connection: socket.socket) -> Reply:
    """The other side's answer. Raises PeerRefused where it hangs up instead."""
    connection.settimeout(REPLY_S)
    byte = connection.recv(1)
    try:
        return Reply(byte[0])
    except (IndexError, ValueError) as error:
        raise PeerRefused("it hung up: not of this generation, or another version") from error


def receive(connection: socket.socket) -> tuple[Kind, int]:
    """Kind and length of the next frame. Raises PeerRefused, and OSError where nothing comes for SILENT_S."""
    connection.settimeout(SILENT_S)
    number, size = _HEADER.unpack(read(connection, _HEADER.size))
    if number not in MOST or size > MOST[Kind(number)]:
        raise PeerRefused(f"a frame of kind {number} and {size} bytes")
    return Kind(number), size


def read(connection: socket.socket, size: int) -> bytes:
    """Exactly `size` bytes. Memory is taken as they come. Raises PeerRefused where it hangs up, OSError."""
    return _read(size, connection.recv)


def read_into(connection: socket.socket, view: memoryview) -> None:
    """Exactly as many bytes as there is room for. Raises as `read`."""
    done = 0
    while done < len(view):
        with view[done : done + _CHUNK] as part:
            got = connection.recv_into(part)
        if not got:
            raise PeerRefused("it hung up")
        done += got


def _read_until(connection: socket.socket, size: int, until: float) -> bytes:
    def recv(most: int) -> bytes:
        left = until - time.monotonic()
        if left <= 0:
            raise TimeoutError("no greeting")
        connection.settimeout(left)
        return connection.recv(most)

    return _read(size, recv)


def _read(size: int, recv: Callable[[int], bytes]) -> bytes:
    data = bytearray()
    while len(data) < size:
        more = recv(min(size - len(data), _CHUNK))
        if not more:
            raise PeerRefused("it hung up")
        data += more
    return bytes(data)
