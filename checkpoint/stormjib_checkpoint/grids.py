"""Grids: atoms that are cut straight through along their axes, and the ranks that hold the cells. Pure.

A grid is written in runs, and asked by arithmetic: nothing that is done with it takes longer because it has more cells than were asked for.
"""

from __future__ import annotations

from bisect import bisect_right
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate, product
from math import prod
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from stormjib_checkpoint.boxes import Box

MAX_CELLS = 2**20
"""No grid has more cells: a file that says so is refused before anybody goes through them."""


class Cell(NamedTuple):
    """A cell of a grid that lies on an atom: its number (row-major), the rank that holds it, and its place in the atom."""

    number: int
    rank: int
    """Counted from the lowest rank that holds a cell."""
    offset: tuple[int, ...]
    shape: tuple[int, ...]


@dataclass(frozen=True)
class Grid:
    """A way of cutting atoms, and who holds the cells."""

    cuts: tuple[tuple[tuple[int, ...], ...], ...]
    """By dimension, the lengths of its parts from 0 on, as runs (length, count). Empty where a dimension is not cut; such dimensions are
    left out at the end, so that atoms of any shape that lie on one rank share a grid."""
    ranks: tuple[tuple[int, ...], ...]
    """The rank of each cell, row-major, as runs (rank, count, step), counted from the lowest rank that holds a cell of the atom."""

    def __post_init__(self) -> None:
        for length, count in (_of(2, run) for cut in self.cuts for run in cut):
            if length < 1 or count < 1:
                raise ValueError(f"{count} parts of length {length}")
        if any(count < 1 for _, count, _ in (_of(3, run) for run in self.ranks)):
            raise ValueError("a run of no ranks")
        if self.cells != sum(run[1] for run in self.ranks) or self.cells > MAX_CELLS:
            raise ValueError(f"{self.cells} cells on {sum(run[1] for run in self.ranks)} ranks")

    @cached_property
    def cells(self) -> int:
        """How many there are."""
        return prod(sum(run[1] for run in cut) for cut in self.cuts if cut)

    @cached_property
    def top(self) -> int:
        """The highest rank that holds a cell, counted from the lowest."""
        return max(rank + (count - 1) * step for rank, count, step in self.ranks)

    def fits(self, shape: Sequence[int]) -> bool:
        """Whether an atom of this shape can be cut so. It then is tiled: every element lies in one cell, and no cell is empty."""
        lengths = self._lengths
        if len(lengths) > len(shape) or 0 in shape:
            return False
        return all(length in (0, side) for length, side in zip(lengths, shape, strict=False))

    def meeting(self, shape: Sequence[int], box: Box) -> Iterator[Cell]:
        """The cells that share elements with `box`, of an atom of this shape, in the order of their numbers."""
        spans = []
        for axis, length, offset, size in zip(
            self._axes(len(shape)), shape, box.offset, box.shape, strict=True
        ):
            begin, end = max(offset, 0), min(offset + size, length)
            if begin >= end:
                return
            spans.append(((0, 0, length),) if axis is None else axis.parts(begin, end))
        for parts in product(*spans):
            number = sum([part[0] for part in parts])
            yield Cell(number, self._rank(number), tuple([p[1] for p in parts]), tuple([p[2] for p in parts]))

    def cell(self, shape: Sequence[int], number: int) -> Cell:
        """One cell of an atom of this shape."""
        offset, sizes = [], []
        for axis, length in zip(self._axes(len(shape)), shape, strict=True):
            begin, size = (0, length) if axis is None else axis.part(number // axis.stride % axis.count)
            offset.append(begin)
            sizes.append(size)
        return Cell(number, self._rank(number), tuple(offset), tuple(sizes))

    def held_by(self, rank: int) -> tuple[int, ...]:
        """The numbers of a rank's cells, lowest first; the rank is counted from the lowest that holds a cell."""
        found = self._held.get(rank)
        if found is None:
            found = self._held[rank] = tuple(self._numbers_of(rank))
        return found

    def holders(self) -> Iterator[int]:
        """The rank of each cell, in the order of their numbers."""
        return (first + at * step for first, count, step in self.ranks for at in range(count))

    def _numbers_of(self, rank: int) -> Iterator[int]:
        for at, (first, count, step) in zip(self._firsts, self.ranks, strict=True):
            if step == 0:
                if first == rank:
                    yield from range(at, at + count)
            elif 0 <= rank - first < count * step and (rank - first) % step == 0:
                yield at + (rank - first) // step

    @cached_property
    def _held(self) -> dict[int, tuple[int, ...]]:
        return {}

    def _rank(self, number: int) -> int:
        run = bisect_right(self._firsts, number) - 1
        first, _, step = self.ranks[run]
        return first + (number - self._firsts[run]) * step

    @cached_property
    def _firsts(self) -> list[int]:
        """The number of the first cell of each run of ranks."""
        return [0, *accumulate(run[1] for run in self.ranks[:-1])]

    @cached_property
    def _lengths(self) -> tuple[int, ...]:
        """By dimension the length that is cut; 0 where any length goes uncut."""
        return tuple(sum(length * count for length, count in cut) for cut in self.cuts)

    def _axes(self, dimensions: int) -> tuple[_Axis | None, ...]:
        return self._cut_axes + (None,) * (dimensions - len(self.cuts))

    @cached_property
    def _cut_axes(self) -> tuple[_Axis | None, ...]:
        axes: list[_Axis | None] = []
        stride = 1
        for cut in reversed(self.cuts):
            axes.append(_Axis(cut, stride) if cut else None)
            stride *= sum(run[1] for run in cut) or 1
        return tuple(reversed(axes))


class _Axis:
    """One dimension that is cut. `stride` is how far apart the numbers are of cells that lie beside each other along it."""

    def __init__(self, cut: Sequence[Sequence[int]], stride: int) -> None:
        self.stride = stride
        self.count = sum(count for _, count in cut)
        self._lengths = [length for length, _ in cut]
        self._firsts = [0, *accumulate(count for _, count in cut[:-1])]
        self._begins = [0, *accumulate(length * count for length, count in cut[:-1])]

    def part(self, index: int) -> tuple[int, int]:
        """Where a part begins, and its length."""
        run = bisect_right(self._firsts, index) - 1
        length = self._lengths[run]
        return self._begins[run] + (index - self._firsts[run]) * length, length

    def parts(self, begin: int, end: int) -> list[tuple[int, int, int]]:
        """What the parts that meet [begin, end) add to the number of their cell, where they begin, and their lengths."""
        return [(i * self.stride, *self.part(i)) for i in range(self._at(begin), self._at(end - 1) + 1)]

    def _at(self, point: int) -> int:
        run = bisect_right(self._begins, point) - 1
        return self._firsts[run] + (point - self._begins[run]) // self._lengths[run]


def _of(count: int, run: tuple[int, ...]) -> tuple[int, ...]:
    if len(run) != count:
        raise ValueError(f"a run of {len(run)} numbers; wanted {count}")
    return run


class Held(NamedTuple):
    """A box of an atom and the rank that holds it."""

    rank: int
    offset: tuple[int, ...]
    shape: tuple[int, ...]


def fit(shape: Sequence[int], boxes: Sequence[Held]) -> tuple[Grid, int] | None:
    """The grid whose cells on an atom of this shape are exactly `boxes`, and the lowest rank of them. None where there is none: then the
    boxes may tile the atom all the same."""
    cuts = []
    for dim, length in enumerate(shape):
        lengths = _parts({(box.offset[dim], box.shape[dim]) for box in boxes}, length)
        if lengths is None:
            return None
        cuts.append(lengths)
    ordered = sorted(boxes, key=lambda box: box.offset)
    if not prod(map(len, cuts)) == len(boxes) == len({box.offset for box in boxes}) <= MAX_CELLS:
        return None
    while cuts and len(cuts[-1]) == 1:
        cuts.pop()
    lowest = min(box.rank for box in boxes)
    runs = tuple(equal_runs(cut) if len(cut) > 1 else () for cut in cuts)
    return Grid(runs, _stepping_runs([box.rank - lowest for box in ordered])), lowest


def _parts(sides: set[tuple[int, int]], length: int) -> list[int] | None:
    """Lengths of the parts of one dimension; None where they do not lie one after the other from 0 to its end."""
    end, lengths = 0, []
    for offset, size in sorted(sides):
        if offset != end or size < 1:
            return None
        end += size
        lengths.append(size)
    return lengths if end == length and lengths else None


def equal_runs(values: Sequence[int]) -> tuple[tuple[int, int], ...]:
    """Values as runs (value, count)."""
    runs: list[tuple[int, int]] = []
    for value in values:
        if runs and runs[-1][0] == value:
            runs[-1] = (value, runs[-1][1] + 1)
        else:
            runs.append((value, 1))
    return tuple(runs)


def _stepping_runs(values: Sequence[int]) -> tuple[tuple[int, int, int], ...]:
    """Values as runs (first, count, step): as many as go on with a step that is not negative; a run of one has step 0."""
    runs: list[tuple[int, int, int]] = []
    for value in values:
        if runs:
            first, count, step = runs[-1]
            wanted = value - first if count == 1 else step
            if wanted >= 0 and value == first + count * wanted:
                runs[-1] = (first, count + 1, wanted)
                continue
        runs.append((value, 1, 0))
    return tuple(runs)
