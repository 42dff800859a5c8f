"""Which elements of which atoms each rank of a layout holds, and where in its own tensors they lie. Pure.

A rank's tensor is cut in this order: put together of atoms (views), padded, cut over mesh axes, and last shared out again (ZeRO, FSDP).
"""

from __future__ import annotations

import zlib
from contextlib import contextmanager
from dataclasses import dataclass, field
from math import prod
from typing import TYPE_CHECKING, NamedTuple

from stormjib_checkpoint.boxes import Box
from stormjib_checkpoint.errors import SpecError
from stormjib_checkpoint.spec import region as regions
from stormjib_checkpoint.spec.laying import is_partial, stages_of
from stormjib_checkpoint.spec.naming import product
from stormjib_checkpoint.spec.region import Region, atom_region
from stormjib_checkpoint.spec.rules import PARTS
from stormjib_checkpoint.spec.shares import Span, spans, stretches

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from stormjib_checkpoint.spec.laying import Laid, Tensor
    from stormjib_checkpoint.spec.naming import Shape
    from stormjib_checkpoint.spec.rules import Cut, View


class Patch(NamedTuple):
    """A box of an atom inside a rank's tensor: element c of the box lies in the tensor's memory, row-major and counted in elements, at
    `start + sum((c_d - offset_d) * strides_d)`."""

    atom: str
    box: Box
    start: int
    strides: tuple[int, ...]
    primary: bool
    """This rank's copy is the one that is stored."""
    copies: int
    """On how many ranks each element of it is."""


@dataclass(frozen=True)
class Local:
    """A rank's tensor. What no patch covers is padding."""

    shape: tuple[int, ...]
    dtype: str | None
    """Where the spec says one."""
    patches: tuple[Patch, ...]
    mean: bool = False
    """Its atoms have a slice for each rank, and one more rank has the mean of them."""
    tie: str = ""
    """The atom that it is another name of."""


@dataclass(frozen=True)
class Layout:
    """A spec on a mesh."""

    laid: Laid

    @property
    def world(self) -> int:
        return prod(self.laid.mesh.values())

    @property
    def atoms(self) -> Mapping[str, Shape]:
        """Every atom and its shape as it is stored."""
        return self.laid.atoms

    def rank(self, rank: int) -> dict[str, Local]:
        """The tensors of a rank by their names. Raises SpecError, which names rule and tensor."""
        return _Rank(self.laid, _coordinate(self.laid.mesh, rank)).locals()


def _coordinate(mesh: Mapping[str, int], rank: int) -> dict[str, int]:
    found = {}
    for axis, size in reversed([*mesh.items()]):
        rank, found[axis] = divmod(rank, size)
    return found


class _Whole(NamedTuple):
    """A tensor as far as it is cut, and the axes that have had a hand in that."""

    tensor: Tensor
    region: Region
    cut_over: tuple[str, ...]


@dataclass
class _Rank:
    """One rank of a layout, by its coordinate."""

    laid: Laid
    at: Mapping[str, int]
    seen: set[tuple[str, Box]] = field(default_factory=set)
    """What a tensor of this rank has already: of two names, one is stored."""

    def locals(self) -> dict[str, Local]:
        wholes = [whole for tensor in self.laid.tensors if (whole := self._whole(tensor)) is not None]
        found: dict[str, Local] = {}
        buffers: dict[str, list[_Whole]] = {}
        for whole in wholes:
            if buffer := _buffer(whole.tensor):
                buffers.setdefault(buffer, []).append(whole)
            else:
                found[whole.tensor.name] = self._local(whole)
        found |= {name: self._flat(group) for name, group in buffers.items()}
        return found

    def _whole(self, tensor: Tensor) -> _Whole | None:
        stage = self.at[self.laid.stage_axis] if self.laid.stage_axis else 0
        here = [
            atom_region(tensor.family.name(bare), shape)
            for bare, shape in zip(tensor.source.of, tensor.shapes, strict=True)
            if stage in stages_of(self.laid.stages, tensor.source, bare)
        ]
        if not here or (
            tensor.source.tie and _once(tensor) and stage in self.laid.stages.of(tensor.source.tie)
        ):
            return None
        with _told(tensor):
            if tensor.kind == "scalar":
                return _Whole(tensor, _alike(here), ())
            return self._cut(tensor, self._viewed(tensor, here))

    def _viewed(self, tensor: Tensor, here: list[Region]) -> Region:
        view, number = tensor.source.view, tensor.source.number
        if view is None:
            return here[0]
        if number is not None:
            return regions.unstacked(here[0], number)
        if view.rope is not None and not _reduced(tensor, 0):
            heads = product(view.rope, self.laid.numbers)
            here = [regions.turned(region, heads) for region in here]
        return self._together(tensor, view, here)

    def _together(self, tensor: Tensor, view: View, here: list[Region]) -> Region:
        if view.dim is None:
            return regions.stacked(here) if view.counted else here[0]
        if _reduced(tensor, view.dim):
            raise ValueError(f"the state has one element along dimension {view.dim}, which the view joins")
        if view.groups is None:
            return regions.joined(here, view.dim)
        return regions.interleaved(here, view.dim, product(view.groups, self.laid.numbers))

    def _cut(self, tensor: Tensor, region: Region) -> _Whole | None:
        """After pads and cuts; None where another rank has the whole of what is never cut."""
        rule = tensor.rule
        over = [rule.partial] if rule.partial else []
        if tensor.kind == "matrix":
            if tensor.then is not None:
                over += tensor.then.over
                if tensor.turn % self._size(tensor.then.over) != self._index(tensor.then.over):
                    return None
            return _Whole(tensor, region, tuple(over))
        full = region.shape
        if rule.pad is not None and not _flat_along(tensor, full, rule.pad.dim):
            to = product(rule.pad.to, self.laid.numbers)
            region = region.padded(rule.pad.dim, -(-full[rule.pad.dim] // to) * to)
        for cut in rule.cuts:
            dim = rule.parts.dim if rule.parts is not None and cut.dim == PARTS else int(cut.dim)
            if not _flat_along(tensor, full, dim):
                region = region.taken(dim, self._spans(tensor, cut, region.shape[dim]))
                over.append(cut.over)
        then = tensor.then
        if then is not None and then.kind == "fsdp" and not _flat_along(tensor, full, then.dim):
            start, end = stretches(region.shape[then.dim], self._size(then.over), "ceil")[
                self._index(then.over)
            ]
            region = region.taken(then.dim, [Span(start, end)])
            over += then.over
        if then is not None and then.kind == "zero":
            over += then.over
        return _Whole(tensor, region, tuple(over))

    def _spans(self, tensor: Tensor, cut: Cut, length: int) -> list[Span]:
        ranks, index, numbers = self.laid.mesh[cut.over], self.at[cut.over], self.laid.numbers
        cover = product(cut.cover, numbers) if cut.cover is not None else None
        if cut.dim != PARTS or tensor.rule.parts is None:
            return spans(length, product(cut.unit, numbers), ranks, cut.uneven, cover)[index]
        parts = tensor.rule.parts
        found, begin = [], 0
        for size, unit in zip(_lengths(parts.of, numbers, length), parts.unit, strict=True):
            own = spans(size, product(unit, numbers), ranks, cut.uneven, cover)[index]
            found += [span.moved(begin) for span in own]
            begin += size
        return found

    def _local(self, whole: _Whole) -> Local:
        tensor, then = whole.tensor, whole.tensor.then
        tie = whole.tensor.atoms[0] if tensor.source.tie and tensor.source.view is None else ""
        dtype = tensor.rule.cast if not tensor.family.is_state else None
        if then is not None and then.kind == "zero" and tensor.kind != "matrix":
            flat = self._flat([whole])
            return Local(flat.shape, dtype, flat.patches, flat.mean, tie)
        patches = tuple(self._patches(whole, whole.region, 0))
        return Local(whole.region.shape, dtype, patches, is_partial(tensor), tie)

    def _flat(self, wholes: Sequence[_Whole]) -> Local:
        """This rank's part of tensors that lie flat one behind the other; all ranks' are as long, the last ones padded."""
        then = wholes[0].tensor.then
        over = then.over if then is not None else ()
        size = -(-sum(whole.region.volume for whole in wholes) // self._size(over))
        begin = -size * self._index(over)
        patches: list[Patch] = []
        for whole in wholes:
            region = whole.region
            mine = region.flat(max(0, -begin), min(region.volume, size - begin))
            patches += self._patches(whole, mine, begin)
            begin += region.volume
        return Local((size,), None, tuple(patches), any(is_partial(whole.tensor) for whole in wholes))

    def _patches(self, whole: _Whole, region: Region, begin: int) -> Iterator[Patch]:
        """`region` is in memory from `begin` on."""
        if is_partial(whole.tensor):
            region = region.as_slice(self.at[whole.tensor.rule.partial])
        for atom, shape in zip(whole.tensor.atoms, whole.tensor.shapes, strict=True):
            if not prod(shape):  # without elements, and not to be lost
                yield Patch(atom, Box((0,) * len(shape), shape), 0, (0,) * len(shape), False, 1)
        steps = regions.strides(region.shape)
        free = [axis for axis in self.laid.mesh if axis not in (*whole.cut_over, self.laid.stage_axis)]
        for piece in region.pieces:
            copies, primary = self._copies(whole.tensor, piece.atom, free)
            first = (piece.atom, piece.box) not in self.seen
            self.seen.add((piece.atom, piece.box))
            yield Patch(
                piece.atom,
                piece.box,
                begin + sum(at * step for at, step in zip(piece.at, steps, strict=True)),
                tuple(0 if dim is None else steps[dim] for dim in piece.dims),
                piece.primary and primary and first,
                piece.copies * copies,
            )

    def _copies(self, tensor: Tensor, atom: str, free: Sequence[str]) -> tuple[int, bool]:
        """On how many ranks, and whether it is this one that stores it: chosen by name, so that all have some to store."""
        stages = self.laid.holders[atom, tensor.slice]
        stage = stages.index(self.at[self.laid.stage_axis]) if self.laid.stage_axis else 0
        copies = len(stages) * self._size(free)
        return copies, zlib.crc32(atom.encode()) % copies == stage * self._size(free) + self._index(free)

    def _size(self, axes: Sequence[str]) -> int:
        return prod(self.laid.mesh[axis] for axis in axes)

    def _index(self, axes: Sequence[str]) -> int:
        index = 0
        for axis in axes:
            index = index * self.laid.mesh[axis] + self.at[axis]
        return index


def _buffer(tensor: Tensor) -> str:
    named = tensor.then.buffer if tensor.then is not None and tensor.kind == "like" else ""
    return tensor.family.name(named) if named else ""


def _once(tensor: Tensor) -> bool:
    """Whether two names on one rank make no two tensors: an optimizer has one state, a buffer one place."""
    return tensor.family.is_state or bool(_buffer(tensor))


def _reduced(tensor: Tensor, dim: int) -> bool:
    """Whether the state has one element along a dimension of the atoms, and the parameter more."""
    return any(
        dim < len(shape) and shape[dim] == 1 and weight[dim] != 1
        for shape, weight in zip(tensor.shapes, tensor.weights, strict=True)
    )


def _flat_along(tensor: Tensor, shape: Sequence[int], dim: int) -> bool:
    """The same along a dimension of the tensor. Raises ValueError where it has no such dimension."""
    if dim >= len(shape):
        raise ValueError(f"it has no dimension {dim} to cut")
    view, own = tensor.source.view, dim
    if view is not None and tensor.source.number is not None:
        own += 1  # the atom has the slices' dimension in front
    elif view is not None and view.dim is None and view.counted:
        own -= 1
    return own >= 0 and _reduced(tensor, own)


def _alike(here: Sequence[Region]) -> Region:
    """Several atoms of one value in one place."""
    return Region(here[0].shape, tuple(piece for region in here for piece in region.pieces))


def _lengths(of: Sequence[tuple[int | str, ...]], numbers: Mapping[str, int], length: int) -> list[int]:
    sizes = [product(size, numbers) for size in of]
    if length % sum(sizes):
        raise ValueError(f"{length} elements are no parts that compare as {sizes}")
    return [length // sum(sizes) * size for size in sizes]


@contextmanager
def _told(tensor: Tensor) -> Iterator[None]:
    """What does not fit, as SpecError."""
    try:
        yield
    except ValueError as error:
        raise SpecError(f"{tensor.shown}: {error}; mend the rule, or the sizes of the spec") from error
