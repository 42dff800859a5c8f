"""The checksum of a piece of a data file. Needs `xxhash`, which ranks have; the child imports it only where they have saved."""

from __future__ import annotations

import xxhash


def piece_digest(data: bytes | memoryview) -> str:
    """xxh3_64 with seed 0 of one piece, as 16 hexadecimal digits."""
    return xxhash.xxh3_64_hexdigest(data)
