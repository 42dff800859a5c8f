"""One tensor on one rank: put together of its atoms, padded, cut, as its rule says. Pure."""

from __future__ import annotations

from contextlib import contextmanager
from dataclasses import dataclass
from math import prod
from typing import TYPE_CHECKING, NamedTuple

from stormjib_checkpoint.errors import SpecError
from stormjib_checkpoint.spec import region as regions
from stormjib_checkpoint.spec.naming import product
from stormjib_checkpoint.spec.region import Region, atom_region
from stormjib_checkpoint.spec.rules import PARTS
from stormjib_checkpoint.spec.shares import Span, spans, stretch

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from stormjib_checkpoint.spec.laying import Laid, Tensor
    from stormjib_checkpoint.spec.rules import Cut, Size, View


@dataclass(frozen=True)
class Coordinate:
    """A rank's place on a mesh."""

    mesh: Mapping[str, int]
    numbers: Mapping[str, int]
    at: Mapping[str, int]
    stage: int
    stage_axis: str

    @classmethod
    def of(cls, laid: Laid, rank: int) -> Coordinate:
        """The last axis of the mesh is the fastest."""
        found = {}
        for axis, size in reversed([*laid.mesh.items()]):
            rank, found[axis] = divmod(rank, size)
        return cls(laid.mesh, laid.numbers, found, found.get(laid.stage_axis, 0), laid.stage_axis)

    def size(self, axes: Sequence[str]) -> int:
        """How many ranks some axes have together."""
        return prod(self.mesh[axis] for axis in axes)

    def index(self, axes: Sequence[str]) -> int:
        """The place along some axes, taken as one: the last is the fastest."""
        index = 0
        for axis in axes:
            index = index * self.mesh[axis] + self.at[axis]
        return index

    def product(self, size: Size) -> int:
        """A size in numbers."""
        return product(size, self.numbers)


class Form(NamedTuple):
    """What tensors have in common on a rank that are made and cut alike."""

    region: Region
    copies: int
    """Ranks of each stage that hold the same."""
    copy: int
    """Which of them this is."""


def cut_form(tensor: Tensor, here: Sequence[int], at: Coordinate) -> Form:
    """A rank's part of a tensor, of whose atoms the rank's stage has those `here`. Raises SpecError, which names rule and tensor."""
    with _told(tensor):
        atoms = [atom_region(number, tensor.shapes[number]) for number in here]
        if tensor.kind == "scalar":
            return _form(_alike(atoms), (), at)
        region, over = _viewed(tensor, atoms, at), list[str]()
        if tensor.kind == "like":
            region, over = _cut(tensor, region, at)
        if tensor.is_partial:
            region = region.as_slice(at.at[tensor.rule.partial])
            over.append(tensor.rule.partial)
        if tensor.then is not None and (tensor.kind == "matrix" or tensor.then.kind == "zero"):
            over += tensor.then.over
        return _form(region, over, at)


def _form(region: Region, cut_over: Sequence[str], at: Coordinate) -> Form:
    free = [axis for axis in at.mesh if axis != at.stage_axis and axis not in cut_over]
    return Form(region, at.size(free), at.index(free))


def _viewed(tensor: Tensor, atoms: list[Region], at: Coordinate) -> Region:
    view, number = tensor.source.view, tensor.source.number
    if view is None:
        return atoms[0]
    if number is not None:
        return regions.unstacked(atoms[0], number)
    if view.rope is not None and not tensor.reduced(0):
        atoms = [regions.turned(atom, at.product(view.rope)) for atom in atoms]
    if view.dim is None:
        return regions.stacked(atoms) if view.counted else atoms[0]
    return _joined(tensor, view, view.dim, atoms, at)


def _joined(tensor: Tensor, view: View, dim: int, atoms: list[Region], at: Coordinate) -> Region:
    if tensor.reduced(dim):
        raise ValueError(f"the state has one element along dimension {dim}, which the view joins")
    if view.groups is None:
        return regions.joined(atoms, dim)
    return regions.interleaved(atoms, dim, at.product(view.groups))


def _cut(tensor: Tensor, region: Region, at: Coordinate) -> tuple[Region, list[str]]:
    """After pad and cuts, and the axes that have cut it."""
    rule, then, full, over = tensor.rule, tensor.then, region.shape, list[str]()
    if rule.pad is not None and _is_cut_along(tensor, full, rule.pad.dim):
        to = at.product(rule.pad.to)
        region = region.padded(rule.pad.dim, -(-full[rule.pad.dim] // to) * to)
    for cut in rule.cuts:
        dim = rule.parts.dim if rule.parts is not None and cut.dim == PARTS else int(cut.dim)
        if _is_cut_along(tensor, full, dim):
            region = region.taken(dim, _spans(tensor, cut, region.shape[dim], at))
            over.append(cut.over)
    if then is not None and then.kind == "fsdp" and _is_cut_along(tensor, full, then.dim):
        mine = stretch(region.shape[then.dim], at.size(then.over), at.index(then.over), "ceil")
        region = region.taken(then.dim, [Span(*mine)])
        over += then.over
    return region, over


def _is_cut_along(tensor: Tensor, shape: Sequence[int], dim: int) -> bool:
    """Whether a tensor of this shape is, where its rule says so: not where a factored state has one element. Raises ValueError."""
    if dim >= len(shape):
        raise ValueError(f"it has no dimension {dim} to cut")
    view, own = tensor.source.view, dim
    if view is not None and tensor.source.number is not None:
        own += 1  # the atom has the slices' dimension in front
    elif view is not None and view.dim is None and view.counted:
        own -= 1
    return own < 0 or not tensor.reduced(own)


def _spans(tensor: Tensor, cut: Cut, length: int, at: Coordinate) -> list[Span]:
    ranks, index = at.mesh[cut.over], at.at[cut.over]
    cover = at.product(cut.cover) if cut.cover is not None else None
    if cut.dim != PARTS or tensor.rule.parts is None:
        return spans(length, at.product(cut.unit), ranks, index, cut.uneven, cover)
    parts, found, begin = tensor.rule.parts, list[Span](), 0
    for size, unit in zip(_lengths([*map(at.product, parts.of)], length), parts.unit, strict=True):
        own = spans(size, at.product(unit), ranks, index, cut.uneven, cover)
        found += [span.moved(begin) for span in own]
        begin += size
    return found


def _lengths(of: Sequence[int], length: int) -> list[int]:
    if length % sum(of):
        raise ValueError(f"{length} elements are no parts that compare as {list(of)}")
    return [length // sum(of) * size for size in of]


def _alike(atoms: Sequence[Region]) -> Region:
    """Several atoms of one value in one place."""
    return Region(atoms[0].shape, tuple(piece for atom in atoms for piece in atom.pieces))


@contextmanager
def _told(tensor: Tensor) -> Iterator[None]:
    """What does not fit, as SpecError."""
    try:
        yield
    except ValueError as error:
        raise SpecError(f"{tensor.shown}: {error}; mend the rule, or the sizes of the spec") from error
