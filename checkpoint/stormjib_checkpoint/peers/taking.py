"""What one giver's frames do to the folder of its copies: the keeper's half of the protocol, without threads and listening."""

from __future__ import annotations

from typing import TYPE_CHECKING, Self

from stormjib_checkpoint import room
from stormjib_checkpoint.errors import ArenaTooLarge
from stormjib_checkpoint.format import RankFile
from stormjib_checkpoint.left import Records
from stormjib_checkpoint.node_memory import SLOTS, Slot, holds
from stormjib_checkpoint.peers.frames import Kind, PeerRefused, Place, Reply, read, read_into
from stormjib_checkpoint.pieces import piece_digest
from stormjib_checkpoint.records import build, decode, parse

if TYPE_CHECKING:
    import socket
    from pathlib import Path

    from stormjib_checkpoint.layout import GenerationId


class Copy:
    """One rank's part of a step on its way into a slot, which says nothing before it is whole."""

    def __init__(self, slot: Slot, record: RankFile, records: Records) -> None:
        """Raises ArenaTooLarge where there is no memory for it."""
        slot.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        slot.clear()
        self._slot, self._data, self._records = slot, record.data, records
        size = room.aligned(record.data.bytes)
        if slot.data.exists() and slot.data.stat().st_size != size:
            slot.data.unlink()  # never cut: somebody may have mapped it
        room.check(size, room.allocated(slot.data))
        self._map = room.mapped(slot.data, size)
        self._arrived = 0

    def piece(self) -> memoryview:
        """Where the next piece is to be written. Raises PeerRefused where none is due."""
        if self._arrived >= len(self._data.pieces):
            raise PeerRefused("a piece too many")
        start = self._arrived * self._data.piece_bytes
        return memoryview(self._map)[start : min(start + self._data.piece_bytes, self._data.bytes)]

    def take(self) -> bool:
        """The next piece has been written; False where it is not what the record says."""
        with self.piece() as piece:
            if piece_digest(piece) != self._data.pieces[self._arrived]:
                return False
        self._arrived += 1
        return True

    def tell(self) -> bool:
        """Say so in the slot, if it is whole."""
        if self._arrived < len(self._data.pieces):
            return False
        self._slot.tell(self._records)
        return True

    def close(self) -> None:
        """Unmap. What lies in the slot stays."""
        self._map.close()


class Taking:
    """One connection that is let in. Use as a context manager."""

    def __init__(self, folder: Path, generation: GenerationId, processes: int, key: bytes | None) -> None:
        """Copies of steps of `generation`, of at most `processes` ranks, go below `folder`."""
        self._folder, self._generation, self._processes, self._key = folder, generation, processes, key
        self._place: Place | None = None
        self._train: bytes | None = None
        self._copy: Copy | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._drop()

    def take(self, connection: socket.socket, kind: Kind, size: int) -> Reply:
        """Do what one frame asks; its body is still to be read. Raises PeerRefused, FormatError, OSError."""
        if kind is Kind.PIECE:
            return self._piece(connection, size)
        data = read(connection, size)
        match kind:
            case Kind.ALIVE:
                pass
            case Kind.PLACE:
                self._begin(build(Place, parse(data, "place"), "place"))
            case Kind.TRAIN:
                self._train = data
            case Kind.RECORD:
                return self._record(data)
            case _:
                raise PeerRefused(f"{kind.name} where none is due")
        return Reply.OK

    def _begin(self, place: Place) -> None:
        if place.local_rank >= self._processes or place.number >= SLOTS:
            raise PeerRefused(f"no place for slot {place.number} of local rank {place.local_rank}")
        self._drop()
        self._place = place

    def _record(self, data: bytes) -> Reply:
        if self._place is None or self._copy is not None:
            raise PeerRefused("a record without a place")
        record = decode(RankFile, data, "record", self._key)
        if record.generation != self._generation or (record.rank == 0) != (self._train is not None):
            raise PeerRefused(f"a record of rank {record.rank} and generation {record.generation}")
        slot = Slot(self._folder / str(self._place.local_rank) / str(self._place.number))
        if holds(slot, data):
            return Reply.HELD
        try:
            self._copy = Copy(slot, record, Records(data, self._train))
        except ArenaTooLarge:
            return Reply.FULL
        self._told(self._copy)
        return Reply.OK

    def _piece(self, connection: socket.socket, size: int) -> Reply:
        if self._copy is None:
            raise PeerRefused("a piece without a record")
        with self._copy.piece() as piece:
            if size != len(piece):
                raise PeerRefused(f"a piece of {size} bytes; its record says {len(piece)}")
            read_into(connection, piece)
        if not self._copy.take():
            self._drop()
            return Reply.TORN
        self._told(self._copy)
        return Reply.OK

    def _told(self, copy: Copy) -> None:
        if copy.tell():
            self._drop()

    def _drop(self) -> None:
        """What is not whole never counts."""
        if self._copy is not None:
            self._copy.close()
        self._place = self._train = self._copy = None
