"""How many things are dealt out over the ranks of a mesh axis: which stretch each of them gets. Pure."""

from __future__ import annotations

from itertools import groupby
from typing import TYPE_CHECKING, Literal, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

Uneven = Literal["ceil", "front"]
"""`ceil`: as torch.chunk, late ranks get less or nothing. `front`: all alike, but for the first ones, which get one more."""
Stretch = tuple[int, int]


class Span(NamedTuple):
    """Elements from `start` to `end` along a dimension, as one rank holds them: on how many ranks they are, and whether it is the first."""

    start: int
    end: int
    copies: int = 1
    primary: bool = True

    def moved(self, by: int) -> Span:
        """The same, `by` elements further on."""
        return self._replace(start=self.start + by, end=self.end + by)


def stretch(count: int, ranks: int, index: int, uneven: Uneven) -> Stretch:
    """What rank `index` of `ranks` gets of `count` things."""
    if uneven == "ceil":
        size = -(-count // ranks)
        return min(size * index, count), min(size * (index + 1), count)
    least, more = divmod(count, ranks)
    start = least * index + min(index, more)
    return start, start + least + (index < more)


def spans(length: int, unit: int, ranks: int, index: int, uneven: Uneven, cover: int | None) -> list[Span]:
    """What rank `index` of `ranks` holds of `length` elements that are never cut inside a `unit` of them.

    With `cover` it is so many other things that are dealt out, and each rank holds the units that its things need: key-value heads of
    which there are fewer than ranks are then held by several. Raises ValueError where `unit` does not divide `length`.
    """
    if length % unit:
        raise ValueError(f"{length} elements are no whole number of units of {unit}")
    units = length // unit
    if cover is None:
        start, end = stretch(units, ranks, index, uneven)
        return [Span(start * unit, end * unit)]
    dealt_out = (stretch(cover, ranks, rank, uneven) for rank in range(ranks))
    needed = [(a * units // cover, -(-b * units // cover)) if a < b else (0, 0) for a, b in dealt_out]
    return _of_rank(index, needed, unit)


def _of_rank(rank: int, needed: Sequence[Stretch], unit: int) -> list[Span]:
    """The units of one rank, put together where the same number of ranks holds them."""
    found = []
    for (copies, primary), run in groupby(range(*needed[rank]), lambda one: _held(one, rank, needed)):
        ordered = list(run)
        found.append(Span(ordered[0] * unit, (ordered[-1] + 1) * unit, copies, primary))
    return found


def _held(unit: int, rank: int, needed: Sequence[Stretch]) -> tuple[int, bool]:
    holders = [other for other, (a, b) in enumerate(needed) if a <= unit < b]
    return len(holders), rank == holders[0]


def dealt(held_of: Sequence[Stretch], factor: int, parts: int, index: int) -> list[Stretch]:
    """What part `index` has of what is held along a dimension, where each of `factor` chunks of it is dealt out by itself.

    FSDP over tensor parallelism is such: what the inner axis will take is shared out before it is taken (torch's `_StridedShard`).
    """
    found: list[Stretch] = []
    length = sum(b - a for a, b in held_of)
    for chunk in range(factor):
        begin, end = stretch(length, factor, chunk, "ceil")
        start, stop = stretch(end - begin, parts, index, "ceil")
        for one in _between(held_of, begin + start, begin + stop):
            if found and found[-1][1] == one[0]:
                found[-1] = (found[-1][0], one[1])
            else:
                found.append(one)
    return found


def _between(held_of: Sequence[Stretch], start: int, stop: int) -> Iterator[Stretch]:
    """Some of what is held, counted from its beginning."""
    for begin, end in held_of:
        a, b = max(begin, begin + start), min(end, begin + stop)
        if a < b:
            yield a, b
        start, stop = start - (end - begin), stop - (end - begin)
