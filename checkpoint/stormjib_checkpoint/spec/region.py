"""A tensor of a layout as pieces of atoms, and what can be done to it: joined, stacked, turned, padded, cut, flattened. Pure.

Every operator makes a region of a region. Each piece still says which box of which atom it is, so the way back needs no code of its own.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from math import prod
from typing import TYPE_CHECKING

from stormjib_checkpoint.boxes import Box, whole

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from stormjib_checkpoint.spec.shares import Span


@dataclass(frozen=True)
class Piece:
    """A box of an atom, and where it lies in a region: one after the other along `dims`, from `at` on."""

    atom: int
    """Its number among those that the tensor is made of."""
    box: Box
    at: tuple[int, ...]
    dims: tuple[int | None, ...]
    """For each dimension of the atom the region's; None where the box has one element and the region no dimension for it."""
    copies: int = 1
    primary: bool = True

    def reach(self, dim: int) -> int:
        """How many elements of the region's dimension it covers."""
        return self.box.shape[self.dims.index(dim)] if dim in self.dims else 1

    def moved(self, dim: int, by: int) -> Piece:
        """The same piece elsewhere in the region."""
        return replace(self, at=(*self.at[:dim], self.at[dim] + by, *self.at[dim + 1 :]))

    def clipped(self, dim: int, start: int, end: int) -> Piece | None:
        """What lies between two places along one of the region's dimensions; None where that is nothing."""
        first, last = max(start, self.at[dim]), min(end, self.at[dim] + self.reach(dim))
        if first >= last:
            return None
        if (first, last) == (self.at[dim], self.at[dim] + self.reach(dim)):
            return self
        own, cut = self.dims.index(dim), first - self.at[dim]
        offset, shape = list(self.box.offset), list(self.box.shape)
        offset[own], shape[own] = offset[own] + cut, last - first
        return replace(self.moved(dim, cut), box=Box(tuple(offset), tuple(shape)))


@dataclass(frozen=True)
class Region:
    """A tensor of this shape, row-major, made of pieces that do not overlap; what no piece covers is padding."""

    shape: tuple[int, ...]
    pieces: tuple[Piece, ...]

    @property
    def volume(self) -> int:
        return prod(self.shape)

    def padded(self, dim: int, length: int) -> Region:
        """Longer along a dimension: with padding behind."""
        return replace(self, shape=_with(self.shape, dim, length))

    def taken(self, dim: int, spans: Sequence[Span]) -> Region:
        """These stretches along a dimension, one after the other."""
        found, length = [], 0
        for span in spans:
            for piece in self.pieces:
                part = piece.clipped(dim, span.start, span.end)
                if part is not None:
                    held = replace(
                        part, copies=part.copies * span.copies, primary=part.primary and span.primary
                    )
                    found.append(held.moved(dim, length - span.start))
            length += span.end - span.start
        return Region(_with(self.shape, dim, length), tuple(found))

    def flat(self, begin: int, end: int) -> Region:
        """The same region, without what is not between two places of its row-major order."""
        found: list[Piece] = []
        for box in flat_boxes(self.shape, begin, end):
            parts: list[Piece | None] = list(self.pieces)
            for dim, (start, stop) in enumerate(zip(box.offset, box.end, strict=True)):
                parts = [part.clipped(dim, start, stop) for part in parts if part is not None]
            found.extend(part for part in parts if part is not None)
        return replace(self, pieces=tuple(found))

    def as_slice(self, number: int) -> Region:
        """Its atoms have one dimension more in front, of which this is one slice."""
        return replace(
            self,
            pieces=tuple(
                replace(
                    piece,
                    box=Box((number, *piece.box.offset), (1, *piece.box.shape)),
                    dims=(None, *piece.dims),
                )
                for piece in self.pieces
            ),
        )


def atom_region(number: int, shape: Sequence[int]) -> Region:
    """An atom as it is."""
    size = tuple(shape)
    piece = Piece(number, whole(size), (0,) * len(size), tuple(range(len(size))))
    return Region(size, (piece,) if prod(size) else ())


def joined(regions: Sequence[Region], dim: int) -> Region:
    """One behind the other along a dimension. Raises ValueError where they do not fit."""
    first, length = regions[0], 0
    pieces: list[Piece] = []
    for region in regions:
        if dim >= len(region.shape) or _with(region.shape, dim, 0) != _with(first.shape, dim, 0):
            raise ValueError(
                f"shapes {list(first.shape)} and {list(region.shape)} cannot be joined along {dim}"
            )
        pieces.extend(piece.moved(dim, length) for piece in region.pieces)
        length += region.shape[dim]
    return Region(_with(first.shape, dim, length), tuple(pieces))


def interleaved(regions: Sequence[Region], dim: int, groups: int) -> Region:
    """Joined group by group: the first of `groups` equal parts of each region, then the second of each. Raises ValueError."""
    if any(dim >= len(region.shape) or region.shape[dim] % groups for region in regions):
        raise ValueError(
            f"shapes {[list(region.shape) for region in regions]} have no {groups} groups along {dim}"
        )
    return joined([part for group in range(groups) for part in _group(regions, dim, groups, group)], dim)


def _group(regions: Sequence[Region], dim: int, groups: int, group: int) -> Iterator[Region]:
    for region in regions:
        size = region.shape[dim] // groups
        yield _row(region, dim, group * size, size)


def stacked(regions: Sequence[Region]) -> Region:
    """On a new dimension in front. Raises ValueError where they do not fit."""
    raised = [
        Region(
            (1, *region.shape),
            tuple(
                replace(
                    piece,
                    at=(0, *piece.at),
                    dims=tuple(None if d is None else d + 1 for d in piece.dims),
                )
                for piece in region.pieces
            ),
        )
        for region in regions
    ]
    return joined(raised, 0)


def unstacked(region: Region, number: int) -> Region:
    """One slice of the first dimension, without that dimension."""
    row = _row(region, 0, number, 1)
    lowered = tuple(
        replace(
            piece,
            at=piece.at[1:],
            dims=tuple(None if not d else d - 1 for d in piece.dims),
        )
        for piece in row.pieces
    )
    return Region(row.shape[1:], lowered)


def turned(region: Region, heads: int) -> Region:
    """Rows of each head from pairs that lie side by side (2i, 2i + 1) to halves (i, i + half). Raises ValueError."""
    rows = region.shape[0] if region.shape else 0
    if rows % (2 * heads):
        raise ValueError(f"{rows} rows are no {heads} heads of pairs")
    size = rows // heads
    order = [head * size + 2 * i + odd for head in range(heads) for odd in (0, 1) for i in range(size // 2)]
    return joined([_row(region, 0, row, 1) for row in order], 0)


def _row(region: Region, dim: int, start: int, count: int) -> Region:
    parts = (piece.clipped(dim, start, start + count) for piece in region.pieces)
    found = tuple(part.moved(dim, -start) for part in parts if part is not None)
    return Region(_with(region.shape, dim, count), found)


def flat_boxes(shape: Sequence[int], begin: int, end: int) -> Iterator[Box]:
    """What lies between two places of a tensor's row-major order, as at most 2n - 1 boxes of n dimensions, in that order."""
    if begin >= end:
        return
    if not shape:
        yield Box((), ())
        return
    inner = tuple(shape[1:])
    (first, head), (last, tail) = divmod(begin, prod(inner)), divmod(end, prod(inner))
    if first == last:
        yield from _in_row(first, flat_boxes(inner, head, tail))
        return
    if head:
        yield from _in_row(first, flat_boxes(inner, head, prod(inner)))
        first += 1
    if first < last:
        yield Box((first, *(0 for _ in inner)), (last - first, *inner))
    yield from _in_row(last, flat_boxes(inner, 0, tail))


def _in_row(row: int, boxes: Iterator[Box]) -> Iterator[Box]:
    return (Box((row, *box.offset), (1, *box.shape)) for box in boxes)


def strides(shape: Sequence[int]) -> tuple[int, ...]:
    """Of a row-major tensor, in elements."""
    return tuple(prod(shape[dim + 1 :]) for dim in range(len(shape)))


def _with(shape: Sequence[int], dim: int, length: int) -> tuple[int, ...]:
    return (*shape[:dim], length, *shape[dim + 1 :])
