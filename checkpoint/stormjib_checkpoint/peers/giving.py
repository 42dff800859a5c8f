"""Gives what this node's ranks have staged to one keeper: whole steps only, the newest first, each at the place that it has here.

A slot that is used again held a step that is on the storage by now, or one that was only staged, with a whole one in the other slot. The
keeper, which has both slots too, loses no more by it.
"""

from __future__ import annotations

import contextlib
import socket
import threading
import time
from typing import TYPE_CHECKING

from stormjib_checkpoint.errors import CheckpointError
from stormjib_checkpoint.node_memory import in_slot, stamps
from stormjib_checkpoint.peers import frames
from stormjib_checkpoint.peers.frames import Hello, Kind, PeerRefused, Place, Reply
from stormjib_checkpoint.records import canonical, plain

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable
    from pathlib import Path

    from stormjib_checkpoint.node_memory import Slot, Staged, Stamp

POLL_S = 0.05
"""How often the slots are looked at: a stat of each."""
RETRY_S = 0.5
"""Until the next try at a keeper that was not there, or did not expect us yet."""
LASTS_S = 5.0
"""After it a keeper that cannot be reached is worth a line."""


class Giver:
    """A thread that gives, until it is stopped. One stream, one piece on its way: training's own traffic comes first."""

    def __init__(
        self,
        address: tuple[str, int],
        token: str,
        hello: Hello,
        memory: Path,
        key: bytes | None,
        say: Callable[[str], None],
        told: Callable[[int], None],
    ) -> None:
        """To the keeper at `address`. `told` gets the step of each part that is whole there. What keeps it from giving for long is said."""
        self._address, self._token, self._hello = address, token, hello
        self._named = f"{address[0]} port {address[1]}"
        self._memory, self._key, self._say, self._told = memory, key, say, told
        self._failing_since, self._said = 0.0, ""
        self._stop = threading.Event()
        self._connection: socket.socket | None = None
        self._thread = threading.Thread(target=self._run, name="stormjib-give", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """Hang up; nothing is sent when this returns."""
        self._stop.set()
        connection = self._connection
        if connection is not None:
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)
        self._thread.join()

    def _run(self) -> None:
        while not self._stop.is_set():
            try:
                with socket.create_connection(self._address, frames.GREET_S) as self._connection:
                    self._give(self._connection)
            except (OSError, CheckpointError) as error:
                self._failed(f"no copies go to {self._named}: {error}")
            self._stop.wait(RETRY_S)

    def _failed(self, text: str) -> None:
        """Say so once, if it lasts: that a keeper has not heard of a generation yet is usual."""
        now = time.monotonic()
        self._failing_since = self._failing_since or now
        if now - self._failing_since >= LASTS_S and text != self._said and not self._stop.is_set():
            self._said = text
            self._say(text)

    def _give(self, connection: socket.socket) -> None:
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        frames.greet(connection, self._token)
        frames.send(connection, Kind.HELLO, canonical(plain(self._hello)))
        self._failing_since, self._said = 0.0, ""
        seen: dict[Slot, Stamp] = {}
        said_at = time.monotonic()
        while not self._stop.is_set():
            now = stamps(self._memory)
            ours = self._ours(slot for slot, stamp in now.items() if seen.get(slot) != stamp)
            later = {one.slot for one in ours[1:]}
            seen = {slot: stamp for slot, stamp in now.items() if slot not in later}
            if ours:
                self._copy(connection, ours[0])
            elif time.monotonic() - said_at > frames.ALIVE_S:
                frames.send(connection, Kind.ALIVE)
            else:
                self._stop.wait(POLL_S)
                continue
            said_at = time.monotonic()

    def _ours(self, slots: Iterable[Slot]) -> list[Staged]:
        """Of the generation that we give; the newest first."""
        found = (in_slot(slot, self._key) for slot in slots)
        ours = [one for one in found if one is not None and one.record.generation == self._hello.generation]
        return sorted(ours, key=lambda one: one.record.step, reverse=True)

    def _copy(self, connection: socket.socket, one: Staged) -> None:
        """Give one step. If the rank takes its slot meanwhile, the keeper finds that the bytes are others, and forgets it."""
        frames.send(connection, Kind.PLACE, canonical(plain(_place(one.slot))))
        if one.records.train is not None:
            frames.send(connection, Kind.TRAIN, one.records.train)
        reply = frames.send(connection, Kind.RECORD, one.records.rank)
        if reply is Reply.FULL:
            self._say(f"{self._named} has no memory for step {one.record.step} of rank {one.record.rank}")
        if reply is Reply.HELD or (reply is Reply.OK and _pieces(connection, one)):
            self._told(one.record.step)


def _pieces(connection: socket.socket, one: Staged) -> bool:
    """Whether all have arrived as they were staged."""
    data = one.record.data
    with open(one.slot.data, "rb") as file:
        for number in range(len(data.pieces)):
            start = number * data.piece_bytes
            size = min(data.piece_bytes, data.bytes - start)
            connection.sendall(frames.head(Kind.PIECE, size))
            if connection.sendfile(file, start, size) != size:
                raise PeerRefused(f"{one.slot.data} is shorter than its record says")
            if frames.reply_to(connection) is not Reply.OK:
                return False
    return True


def _place(slot: Slot) -> Place:
    return Place(int(slot.folder.parent.name), int(slot.folder.name))
