"""Which elements of which atoms each rank of a layout holds, and where in its own tensors they lie. Pure.

A rank's tensor is cut in this order: put together of atoms (views), padded, cut over mesh axes, and last shared out again (ZeRO, FSDP).
"""

from __future__ import annotations

import zlib
from dataclasses import dataclass, field
from math import prod
from typing import TYPE_CHECKING, NamedTuple

from stormjib_checkpoint.boxes import Box
from stormjib_checkpoint.spec.cutting import Coordinate, Form, cut_form
from stormjib_checkpoint.spec.region import strides

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from stormjib_checkpoint.spec.laying import Laid, Tensor
    from stormjib_checkpoint.spec.naming import Shape
    from stormjib_checkpoint.spec.region import Region


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

    def rule_of(self, name: str) -> str:
        """The rule of an atom or of a rank's tensor, as errors name it."""
        rules = (t.rule.match for t in self.laid.tensors if name in (t.name, t.buffer, *t.atoms))
        match = next(rules, "")
        return f"rule {match!r}" if match else "no rule"

    def rank(self, rank: int) -> dict[str, Local]:
        """The tensors of a rank by their names. Raises SpecError, which names rule and tensor."""
        return _Rank(self.laid, Coordinate.of(self.laid, rank)).locals()


class _Whole(NamedTuple):
    """A tensor as far as it is cut."""

    tensor: Tensor
    form: Form


@dataclass
class _Rank:
    """One rank of a layout."""

    laid: Laid
    at: Coordinate
    forms: dict[tuple[int, tuple[int, ...]], Form] = field(default_factory=dict)
    """A model has few, and many tensors of each."""
    seen: set[tuple[str, Box]] = field(default_factory=set)
    """What a tensor of this rank has already: of two names, one is stored."""

    def locals(self) -> dict[str, Local]:
        found: dict[str, Local] = {}
        buffers: dict[str, list[_Whole]] = {}
        for tensor in self.laid.tensors:
            form = self._form(tensor)
            if form is not None and tensor.buffer:
                buffers.setdefault(tensor.buffer, []).append(_Whole(tensor, form))
            elif form is not None:
                found[tensor.name] = self._local(_Whole(tensor, form))
        return found | {name: self._flat(wholes) for name, wholes in buffers.items()}

    def _form(self, tensor: Tensor) -> Form | None:
        """None where this rank has nothing of the tensor."""
        here = tuple(i for i, stages in enumerate(tensor.stages) if self.at.stage in stages)
        if not here or (tensor.kind == "matrix" and not self._is_dealt(tensor)):
            return None
        key = (tensor.form, here)
        if key not in self.forms:
            self.forms[key] = cut_form(tensor, here, self.at)
        return self.forms[key]

    def _is_dealt(self, tensor: Tensor) -> bool:
        over = tensor.then.over if tensor.then is not None else ()
        return tensor.turn % self.at.size(over) == self.at.index(over)

    def _local(self, whole: _Whole) -> Local:
        tensor, then = whole.tensor, whole.tensor.then
        tie = tensor.atoms[0] if tensor.source.tie and tensor.source.view is None else ""
        dtype = tensor.rule.cast if not tensor.is_state else None
        if then is not None and then.kind == "zero" and tensor.kind != "matrix":
            flat = self._flat([whole])
            return Local(flat.shape, dtype, flat.patches, flat.mean, tie)
        region = whole.form.region
        return Local(region.shape, dtype, tuple(self._patches(whole, region, 0)), tensor.is_partial, tie)

    def _flat(self, wholes: Sequence[_Whole]) -> Local:
        """This rank's part of tensors that lie flat one behind the other; all ranks' are as long, the last ones padded."""
        then = wholes[0].tensor.then
        over = then.over if then is not None else ()
        size = -(-sum(whole.form.region.volume for whole in wholes) // self.at.size(over))
        begin = -size * self.at.index(over)
        patches: list[Patch] = []
        for whole in wholes:
            region = whole.form.region
            mine = region.flat(max(0, -begin), min(region.volume, size - begin))
            patches += self._patches(whole, mine, begin)
            begin += region.volume
        return Local((size,), None, tuple(patches), any(whole.tensor.is_partial for whole in wholes))

    def _patches(self, whole: _Whole, region: Region, begin: int) -> Iterator[Patch]:
        """`region` is in memory from `begin` on."""
        tensor, steps = whole.tensor, strides(region.shape)
        for atom, shape in zip(tensor.atoms, tensor.shapes, strict=True):
            if 0 in shape:  # without elements, and not to be lost
                yield Patch(atom, Box((0,) * len(shape), shape), 0, (0,) * len(shape), False, 1)
        for piece in region.pieces:
            atom = tensor.atoms[piece.atom]
            copies, primary = self._copies(tensor, atom, whole.form)
            yield Patch(
                atom,
                piece.box,
                begin + sum(at * step for at, step in zip(piece.at, steps, strict=True)),
                tuple(0 if dim is None else steps[dim] for dim in piece.dims),
                piece.primary and primary and self._is_first(atom, piece.box),
                piece.copies * copies,
            )

    def _copies(self, tensor: Tensor, atom: str, form: Form) -> tuple[int, bool]:
        """On how many ranks, and whether it is this one that stores it: chosen by name, so that all have some to store."""
        stages = self.laid.holders[atom, tensor.slice]
        copies = len(stages) * form.copies
        chosen = zlib.crc32(atom.encode()) % copies
        return copies, chosen == stages.index(self.at.stage) * form.copies + form.copy

    def _is_first(self, atom: str, box: Box) -> bool:
        if atom not in self.laid.shared:
            return True
        first = (atom, box) not in self.seen
        self.seen.add((atom, box))
        return first
