"""Checksums of a data file, piece by piece, while its bytes pass by. Needs `xxhash`: ranks only, never the child."""

from __future__ import annotations

import xxhash


def piece_digest(data: bytes | memoryview) -> str:
    """xxh3_64 with seed 0 of one piece, as 16 hexadecimal digits."""
    return xxhash.xxh3_64_hexdigest(data)


class PieceHasher:
    """xxh3_64 of every `piece_bytes` of a stream; the last piece may be shorter."""

    def __init__(self, piece_bytes: int) -> None:
        self._piece_bytes = piece_bytes
        self._hash = xxhash.xxh3_64()
        self._filled = 0
        self._done: list[str] = []
        self.bytes = 0

    def update(self, data: memoryview) -> None:
        """The next bytes of the file."""
        self.bytes += len(data)
        while data:
            part = data[: self._piece_bytes - self._filled]
            self._hash.update(part)
            self._filled += len(part)
            data = data[len(part) :]
            if self._filled == self._piece_bytes:
                self._close()

    def digests(self) -> tuple[str, ...]:
        """The pieces so far, an unfinished last one included. Ends the stream."""
        if self._filled:
            self._close()
        return tuple(self._done)

    def _close(self) -> None:
        self._done.append(self._hash.hexdigest())
        self._hash.reset()
        self._filled = 0
