"""Box algebra in the coordinates of an atom (the whole, unsharded tensor). Pure; knows no tensors and no files."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import product
from math import prod
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence


@dataclass(frozen=True, order=True)
class Box:
    """A rectangular part of an atom: where it begins and how far it reaches, one number per dimension."""

    offset: tuple[int, ...]
    shape: tuple[int, ...]

    @property
    def volume(self) -> int:
        """Elements in the box; 1 for a 0-d atom."""
        return prod(self.shape)

    @property
    def end(self) -> tuple[int, ...]:
        return tuple(o + s for o, s in zip(self.offset, self.shape, strict=True))


def whole(shape: Sequence[int]) -> Box:
    """The box that is the atom itself."""
    return Box((0,) * len(shape), tuple(shape))


def part(box: Box, dim: int, parts: int, index: int) -> Box:
    """Part `index` of `parts` along `dim`, cut as torch.chunk and DTensor's Shard cut: ceil, late parts short or empty."""
    length = box.shape[dim]
    size = -(-length // parts)
    begin = min(size * index, length)
    end = min(size * (index + 1), length)
    offset = (*box.offset[:dim], box.offset[dim] + begin, *box.offset[dim + 1 :])
    return Box(offset, (*box.shape[:dim], end - begin, *box.shape[dim + 1 :]))


def intersect(a: Box, b: Box) -> Box | None:
    """What two boxes share; None where that is nothing."""
    offset = tuple(max(x, y) for x, y in zip(a.offset, b.offset, strict=True))
    end = tuple(min(x, y) for x, y in zip(a.end, b.end, strict=True))
    shape = tuple(e - o for o, e in zip(offset, end, strict=True))
    return None if any(s <= 0 for s in shape) else Box(offset, shape)


class Run(NamedTuple):
    """`length` elements that lie one after the other in both boxes (row-major), from these element indices on."""

    source: int
    target: int
    length: int


def runs(source: Box, target: Box) -> Iterator[Run]:
    """The shared elements of two boxes as the fewest contiguous runs, in growing order of the source."""
    shared = intersect(source, target)
    if shared is None:
        return
    cut = contiguous_from(shared, source, target)
    length = prod(shared.shape[cut:])
    tail = shared.offset[cut:]
    for head in product(
        *(range(o, o + s) for o, s in zip(shared.offset[:cut], shared.shape[:cut], strict=True))
    ):
        point = (*head, *tail)
        yield Run(_index(source, point), _index(target, point), length)


def contiguous_from(shared: Box, source: Box, target: Box) -> int:
    """First dimension of a run of what two boxes share: every dimension behind it is whole in both."""
    cut = len(shared.shape)
    while cut > 0:
        cut -= 1
        if not shared.shape[cut] == source.shape[cut] == target.shape[cut]:
            break
    return cut


def _index(box: Box, point: Sequence[int]) -> int:
    index = 0
    for size, offset, at in zip(box.shape, box.offset, point, strict=True):
        index = index * size + (at - offset)
    return index


def slabs(box: Box, most: int) -> Iterator[Box]:
    """The box in slices along its first dimensions, of at most `most` elements each, in row-major order."""
    if box.volume <= most:
        yield box
        return
    rest = prod(box.shape[1:])
    step = max(1, most // rest)
    for at in range(0, box.shape[0], step):
        size = min(step, box.shape[0] - at)
        piece = Box((box.offset[0] + at, *box.offset[1:]), (size, *box.shape[1:]))
        if rest <= most:
            yield piece
            continue
        inner = Box(piece.offset[1:], piece.shape[1:])
        for one in slabs(inner, most):
            yield Box((piece.offset[0], *one.offset), (1, *one.shape))


def flaw(shape: Sequence[int], boxes: Sequence[Box]) -> str | None:
    """Why the boxes do not tile an atom of this shape exactly once; None where they do."""
    atom = whole(shape)
    if list(boxes) == [atom]:
        return None  # nearly all tensors of a job that replicates them
    for box in boxes:
        if len(box.shape) != len(atom.shape) or (box.volume and intersect(box, atom) != box):
            return f"box {_show(box)} reaches outside shape {list(shape)}"
    overlap = _overlap(sorted(box for box in boxes if box.volume))
    if overlap is not None:
        return f"boxes {_show(overlap[0])} and {_show(overlap[1])} overlap"
    held = sum(box.volume for box in boxes)
    return None if held == atom.volume else f"{held} of {atom.volume} elements are there"


def _overlap(ordered: Sequence[Box]) -> tuple[Box, Box] | None:
    """Sweep along the first dimension: only boxes that are still open there can meet the next one."""
    open_boxes: list[Box] = []
    for box in ordered:
        if box.shape:
            open_boxes = [o for o in open_boxes if o.end[0] > box.offset[0]]
        for other in open_boxes:
            if intersect(other, box) is not None:
                return other, box
        open_boxes.append(box)
    return None


def _show(box: Box) -> str:
    return "x".join(f"[{o}:{e}]" for o, e in zip(box.offset, box.end, strict=True)) or "[scalar]"
