"""Keeps copies of what other nodes have staged: listens, lets in who is expected, and one connection for each.

COPIES/<giver's slot>/lock                    held while its giver is connected
COPIES/<giver's slot>/<local rank>/<slot>/    as in the giver's own memory
"""

from __future__ import annotations

import contextlib
import shutil
import socket
import threading
from dataclasses import dataclass
from typing import TYPE_CHECKING

from stormjib_checkpoint.errors import CheckpointError
from stormjib_checkpoint.layout import GenerationId  # noqa: TC001 - records are built from their annotations
from stormjib_checkpoint.peers import frames
from stormjib_checkpoint.peers.frames import Hello, Kind, PeerRefused
from stormjib_checkpoint.peers.lock import held
from stormjib_checkpoint.peers.taking import Taking
from stormjib_checkpoint.records import build, parse

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

CONNECTIONS = 16
"""At once, strangers included."""
BREATH_S = 1.0


@dataclass(frozen=True)
class Expected:
    """Who may give: these slots of this generation, each with so many local ranks."""

    generation: GenerationId
    slots: tuple[int, ...]
    processes: int


class Keeper:
    """Listens from the start; lets nobody in before `expect`."""

    def __init__(
        self, copies: Path, token: str, key: bytes | None, say: Callable[[str], None], port: int = 0
    ) -> None:
        """Raises OSError where `port` is taken; 0 lets the kernel choose."""
        self._copies, self._token, self._key, self._say = copies, token, key, say
        self._expected: Expected | None = None
        self._lock, self._closed = threading.Lock(), threading.Event()
        self._open: dict[socket.socket, GenerationId | None] = {}
        """The oldest first; with the generation that it gives, once it has proved who it is."""
        self._listener = _listening(port)
        self.port: int = self._listener.getsockname()[1]
        threading.Thread(target=self._accept, name="stormjib-keep", daemon=True).start()

    def expect(self, expected: Expected) -> None:
        """From now on only these. What is kept of others goes: their steps are on the storage, or of no use to any generation to come."""
        with self._lock:
            self._expected = expected
            for connection, generation in self._open.items():
                if generation not in (None, expected.generation):
                    _hang_up(connection)
        names = {str(slot) for slot in expected.slots}
        for folder in self._copies.glob("*"):
            if folder.name not in names:
                shutil.rmtree(folder, ignore_errors=True)

    def close(self) -> None:
        """Hang up on everybody."""
        self._closed.set()
        _hang_up(self._listener)
        self._listener.close()
        with self._lock:
            for connection in self._open:
                _hang_up(connection)

    def _accept(self) -> None:
        while not self._closed.is_set():
            try:
                connection, _ = self._listener.accept()
            except OSError as error:  # no descriptors, or closed
                if not self._closed.wait(BREATH_S):
                    self._say(f"no copies are taken: {error}")
                continue
            self._open_for(connection)

    def _open_for(self, connection: socket.socket) -> None:
        if not self._has_room():
            connection.close()
            return
        with self._lock:
            self._open[connection] = None
        threading.Thread(target=self._serve, args=(connection,), daemon=True).start()

    def _has_room(self) -> bool:
        """Strangers must not keep givers out: the one that has been here longest without a proof goes."""
        with self._lock:
            if len(self._open) < CONNECTIONS:
                return True
            stranger = next((one for one, generation in self._open.items() if generation is None), None)
            if stranger is not None:
                del self._open[stranger]
                _hang_up(stranger)
            return stranger is not None

    def _serve(self, connection: socket.socket) -> None:
        try:
            frames.welcome(connection, self._token)
            self._take(connection)
        except (OSError, CheckpointError) as error:
            with self._lock:
                known = self._open.get(connection) is not None
            if known:
                self._say(f"a giver of copies is gone: {error}")
        finally:
            with self._lock:
                self._open.pop(connection, None)
            connection.close()

    def _take(self, connection: socket.socket) -> None:
        kind, size = frames.receive(connection)
        if kind is not Kind.HELLO:
            raise PeerRefused(f"{kind.name} instead of HELLO")
        hello: Hello = build(Hello, parse(frames.read(connection, size), "hello"), "hello")
        expected = self._let_in(connection, hello)
        folder = self._copies / str(hello.slot)
        with (
            held(folder),
            Taking(folder, expected.generation, expected.processes, self._key) as taking,
        ):
            connection.sendall(bytes([frames.Reply.OK]))
            while True:
                reply = taking.take(connection, *frames.receive(connection))
                connection.sendall(bytes([reply]))

    def _let_in(self, connection: socket.socket, hello: Hello) -> Expected:
        with self._lock:
            expected = self._expected
            if (
                expected is None
                or hello.generation != expected.generation
                or hello.slot not in expected.slots
            ):
                raise PeerRefused(f"slot {hello.slot} of generation {hello.generation} is not expected")
            if connection in self._open:
                self._open[connection] = hello.generation
            return expected


def _hang_up(connection: socket.socket) -> None:
    with contextlib.suppress(OSError):  # it is gone already
        connection.shutdown(socket.SHUT_RDWR)


def _listening(port: int) -> socket.socket:
    try:
        # One socket for both families: with two, port 0 would give two ports.
        return socket.create_server(("", port), family=socket.AF_INET6, dualstack_ipv6=True)
    except (OSError, ValueError):  # no IPv6 in this kernel, or switched off
        return socket.create_server(("", port))
