"""What the digest of an atom is: a weighted sum of its elements, so partial digests add up however the atom is cut. Pure.

An element's little-endian bytes are unsigned words of at most 32 bits, and every word has an odd weight of 64 bits that its place in
the whole, unsharded atom gives it. A word that changes changes the sum by less than 2^32 times an odd number, which is never 0 modulo
2^64. Wider words would be cheaper, and two flipped signs would cancel: 2^63 times any two odd numbers add up to 0.
"""

from __future__ import annotations

import functools
import hashlib
from typing import TYPE_CHECKING, NamedTuple

from stormjib_checkpoint.format import ITEM_BYTES
from stormjib_checkpoint.records import canonical

if TYPE_CHECKING:
    from collections.abc import Iterable

VERSION = 1
"""Of the definition. What is computed otherwise has another one."""

BLOCK = 1024
"""Words that have the second factor of their weights in common: the first factors of a block are a table that a processor's cache holds."""

MASK = 2**64 - 1
FAR = 2**63
"""Where the second factors begin in the sequence that both are taken from."""
GOLDEN, FIRST, SECOND = 0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB
"""The multipliers of SplitMix64 (Steele, Lea and Flood, OOPSLA 2014)."""


class Words(NamedTuple):
    """What an element is made of."""

    width: int
    """Bytes of a word: 1, 2 or 4."""
    per_element: int
    """The low one first."""


class Row(NamedTuple):
    """One atom of a state. Its name says which state it is: of a parameter, or which moment of it."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    digest: str


@functools.cache
def words(dtype: str) -> Words:
    """The words of an element of this type tag."""
    size = ITEM_BYTES[dtype]
    return Words(min(size, 4), max(1, size // 4))


def mix(z: int) -> int:
    """Number `z` of the sequence that weights are made of."""
    z = z * GOLDEN & MASK
    z = (z ^ z >> 30) * FIRST & MASK
    z = (z ^ z >> 27) * SECOND & MASK
    return z ^ z >> 31


def weight(position: int) -> int:
    """The weight of a word. Word k of K of the element with the row-major index i has the position i * K + k."""
    block, within = divmod(position, BLOCK)
    return (mix(within) | 1) * (mix(FAR + block) | 1) & MASK


def add(partials: Iterable[int]) -> int:
    """The digest of disjoint boxes together. Of none it is 0."""
    return sum(partials) & MASK


def text(digest: int) -> str:
    """A digest as records have it: 16 hexadecimal digits."""
    return f"{digest:016x}"


def number(digest: str) -> int:
    """The inverse of `text`."""
    return int(digest, 16)


def whole(rows: Iterable[Row]) -> str:
    """The digest of a state: SHA-256, in hexadecimal, over its atoms, whatever their order."""
    atoms = sorted([row.name, row.dtype, list(row.shape), row.digest] for row in rows)
    return hashlib.sha256(canonical([VERSION, atoms])).hexdigest()
