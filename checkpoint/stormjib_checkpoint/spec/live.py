"""A rank's own tensors as the boxes of atoms that a layout says they hold. The only file here that knows torch."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch
from torch.distributed.tensor import DTensor

from stormjib_checkpoint.boxes import Box
from stormjib_checkpoint.errors import SpecError, StateMismatch, UnsupportedState
from stormjib_checkpoint.tensors import TAGS, Cut, Held, held, plain_memory

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

    from stormjib_checkpoint.spec.layout import Layout, Local, Patch
    from stormjib_checkpoint.tensors import Value


class Here(NamedTuple):
    """What a layout says of one rank."""

    locals: Mapping[str, Local]
    shapes: Mapping[str, Sequence[int]]
    """Of all atoms."""
    rule_of: Callable[[str], str]
    """The rule of an atom or a tensor."""

    def says(self, name: str, value: Value) -> bool:
        """Whether it says how this lies. What a DTensor says itself counts."""
        return name in self.locals and isinstance(value, torch.Tensor) and not isinstance(value, DTensor)


NOTHING = Here({}, {}, lambda _: "no layout")
"""Where there is no layout."""


def here(layout: Layout, rank: int, world: int) -> Here:
    """Raises SpecError, also where it is the layout of another number of ranks."""
    if layout.world != world:
        raise SpecError(
            f"the layout is on a mesh of {dict(layout.laid.mesh)}, which is {layout.world} ranks, and there are {world}; "
            "put the spec on a mesh of as many"
        )
    return Here(layout.rank(rank), layout.atoms, layout.rule_of)


def held_by(told: Here, state: Mapping[str, Value]) -> list[Held]:
    """The boxes that a rank's plain tensors hold, of those that its layout speaks of. Raises UnsupportedState, which names the tensor."""
    return [
        part
        for name, value in sorted(state.items())
        if told.says(name, value)
        for part in parts_of(told, name, value)
    ]


def parts_of(told: Here, name: str, tensor: torch.Tensor) -> Iterator[Held]:
    """The boxes that one of them holds, as views of its memory. Raises UnsupportedState."""
    local, memory = told.locals[name], _memory(told, name, tensor)
    for patch in local.patches:
        yield _held(name, patch, local, memory, tuple(told.shapes[patch.atom]))


def _memory(told: Here, name: str, tensor: torch.Tensor) -> torch.Tensor:
    """Raises UnsupportedState where the tensor is not what the layout says."""
    local, memory = told.locals[name], held(name, tensor, 0, 1).local
    if tuple(memory.shape) != local.shape:
        raise UnsupportedState(
            f"{name} has shape {list(memory.shape)}, and the layout says {list(local.shape)} ({told.rule_of(name)}); "
            "mend the spec, or the mesh"
        )
    if local.dtype is not None and TAGS[memory.dtype] != local.dtype:
        raise UnsupportedState(
            f"{name} is {TAGS[memory.dtype]}, and the spec casts it to {local.dtype}; mend one of the two"
        )
    if not memory.is_contiguous():
        raise UnsupportedState(
            f"{name} is not contiguous, so the layout does not know where its elements lie; make it so"
        )
    return memory


def _held(name: str, patch: Patch, local: Local, memory: torch.Tensor, shape: tuple[int, ...]) -> Held:
    cut = Cut(name, local.shape, patch.start, patch.strides)
    view = cut.of(memory, patch.box.shape)
    return Held(patch.atom, TAGS[memory.dtype], shape, patch.box, view, patch.primary, patch.copies, cut)


class Laid:
    """What a rank's tensors want of a checkpoint: `parts` are to be filled, and then `finish` called."""

    def __init__(self, told: Here, state: Mapping[str, Value], stored: Mapping[str, Sequence[int]]) -> None:
        """`stored` are the shapes of the checkpoint's atoms. Raises UnsupportedState, StateMismatch."""
        self._told, self._state = (
            told,
            {name: value for name, value in state.items() if told.says(name, value)},
        )
        self._means: list[tuple[Held, Held]] = []
        self.parts = [self._part(part, stored) for part in held_by(told, self._state)]

    def finish(self) -> None:
        """After the parts are filled: means are taken, and pads are zero."""
        with torch.no_grad():
            for part, slices in self._means:
                part.local.copy_(slices.local.double().mean(0, keepdim=True))
            for name, tensor in self._state.items():
                _zero_pads(self._told.locals[name], plain_memory(name, tensor.detach()))

    def _part(self, part: Held, stored: Mapping[str, Sequence[int]]) -> Held:
        """The part itself; where its atom has other slices than this layout, all of them, to take their mean."""
        ranks = self._told.locals[part.tensor].mean
        shape = tuple(stored.get(part.name, part.shape))
        if not ranks or shape == part.shape:
            return part
        if shape[1:] != part.shape[1:] or not part.local.is_floating_point():
            raise StateMismatch(
                f"{part.name} is {list(shape)} in the checkpoint and {list(part.shape)} in the layout: slices of other shapes, or of a "
                "type that has no mean"
            )
        box = Box((0, *part.box.offset[1:]), (shape[0], *part.box.shape[1:]))
        memory = torch.empty(box.shape, dtype=part.local.dtype)
        slices = Held(part.name, part.dtype, shape, box, memory, part.primary, part.copies)
        self._means.append((part, slices))
        return slices


def _zero_pads(local: Local, memory: torch.Tensor) -> None:
    """What no patch covers."""
    if sum(patch.box.volume for patch in local.patches) >= memory.numel():
        return
    pads = torch.ones(local.shape, dtype=torch.bool)
    for patch in local.patches:
        pads.as_strided(patch.box.shape, patch.strides, patch.start).fill_(False)
    memory.masked_fill_(pads.to(memory.device), 0)
