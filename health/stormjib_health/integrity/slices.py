"""Which part of a rank's state is looked at in a step: a sixteenth, another one each step, all of it in sixteen steps."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Sequence

SLICES = 16
"""A flip that stays is seen by the vote at most this many steps later, and one more, because a vote is about the
state that the step before has left."""


class Part(NamedTuple):
    """Words [begin, end) of tensor number `tensor`. A word is 8 bytes; the last one of a tensor may be shorter."""

    tensor: int
    begin: int
    end: int


def parts(words: Sequence[int], index: int, count: int = SLICES) -> tuple[Part, ...]:
    """Slice `index` of `count` of the tensors with these many words, laid end to end. Slices differ by one word at
    most, and together hold every word once."""
    total = sum(words)
    begin, end = total * index // count, total * (index + 1) // count
    found, at = [], 0
    for tensor, length in enumerate(words):
        first, last = max(begin - at, 0), min(end - at, length)
        if first < last:
            found.append(Part(tensor, first, last))
        at += length
    return tuple(found)
