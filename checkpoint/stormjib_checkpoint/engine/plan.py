"""What a state is made of, found out once and kept for as long as it stays so."""

from __future__ import annotations

from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from operator import attrgetter, eq, is_
from typing import TYPE_CHECKING

import torch

from stormjib_checkpoint.image import Image, image_of
from stormjib_checkpoint.tensors import are_one, copyable, empty, local_of
from stormjib_checkpoint.writer import split

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping, Sequence

    from stormjib_checkpoint.spec.layout import Layout
    from stormjib_checkpoint.tensors import Held, Value
    from stormjib_checkpoint.writer import Contents

_shape = attrgetter("shape")


@dataclass(frozen=True)
class Plan:
    """Where the tensors of a state go."""

    names: list[str]
    """Of the whole state, in its own order."""
    types: list[type]
    """Of its values."""
    plain: list[str]
    """Names of all that is no tensor."""
    image: Image
    parts: list[str]
    """Of each part in the file, in its order: the name of its tensor in the state."""
    shapes: list[torch.Size]
    """Of those tensors, unsharded."""
    volatile: frozenset[str]
    """Parts, by their keys in the file, that training changes at any time."""

    def tensors(self, state: Mapping[str, Value]) -> list[torch.Tensor]:
        """The tensors of the parts, in the order of the file."""
        return list(map(state.__getitem__, self.parts))

    def others(self, state: Mapping[str, Value]) -> dict[str, Value]:
        """All that is no tensor."""
        return {name: state[name] for name in self.plain}

    def seems_to_fit(self, state: Mapping[str, Value]) -> bool:
        """Whether names, types and shapes are those of the plan: what can be told in a fraction of a millisecond.

        Nothing that is made here outlives the line that makes it: thousands of new objects would start a garbage collection, which
        takes longer than all else in a save.
        """
        if list(state) != self.names:
            return False
        if not all(map(is_, map(type, state.values()), self.types)):
            return False
        if not all(map(eq, map(_shape, self.tensors(state)), self.shapes)):
            return False
        ties = ((name, first) for name, first in self.image.ties.items() if first in state)
        return all(are_one(state[name], state[first]) for name, first in ties)

    def locals_of(self, tensors: Sequence[torch.Tensor]) -> list[torch.Tensor] | None:
        """What each part is in the memory of its tensor; None where one is of another type, or cut otherwise, than was planned."""
        with torch.no_grad():
            found = [local_of(tensor) for tensor in tensors]
            if not all(map(_fits, found, self.image.parts)):
                return None
            return list(map(_in_memory, found, self.image.parts))

    def clones(self, state: Mapping[str, Value]) -> dict[str, torch.Tensor]:
        """The volatile parts as they are now. Of tensors that are cut otherwise than was planned, none: the copying finds that out."""
        mine = [
            (part, state[name])
            for part, name in zip(self.image.parts, self.parts, strict=True)
            if part.name in self.volatile
        ]
        with torch.no_grad():
            found = [(part, local_of(tensor)) for part, tensor in mine if isinstance(tensor, torch.Tensor)]
            return {
                part.name: copyable(_in_memory(local, part)).clone()
                for part, local in found
                if _fits(local, part)
            }


def _fits(local: torch.Tensor, part: Held) -> bool:
    shape = part.cut.shape if part.cut is not None else part.local.shape
    return (local.shape, local.dtype) == (shape, part.local.dtype) and (
        part.cut is None or local.is_contiguous()
    )


def _in_memory(local: torch.Tensor, part: Held) -> torch.Tensor:
    return local if part.cut is None else part.cut.of(local, part.box.shape)


def plan(
    state: Mapping[str, Value],
    rank: int,
    world: int,
    patterns: Collection[str],
    buffers: Collection[int],
    layout: Layout | None,
) -> Plan:
    """Plan a state. `patterns` and `buffers` (addresses) say which of its tensors are volatile. Raises UnsupportedState, SpecError."""
    contents = split(state, rank, world, layout)
    names = _names(contents)
    volatile = {
        part.tensor
        for part in contents.parts
        if part.local.untyped_storage().data_ptr() in buffers
        or any(fnmatchcase(name, pattern) for pattern in patterns for name in names[part.tensor])
    }
    # The plan outlives the save, so it must not keep a model's memory alive: types and shapes are enough.
    bare = [replace(part, local=empty(part.local.shape, part.local.dtype, "meta")) for part in contents.parts]
    file = image_of(bare, rank, contents.ties)
    parts = [part.tensor for part in file.parts]
    shapes = [state[name].shape for name in parts]
    plain = [name for name, value in state.items() if not isinstance(value, torch.Tensor)]
    return Plan(
        list(state),
        list(map(type, state.values())),
        plain,
        file,
        parts,
        shapes,
        frozenset(part.name for part in file.parts if part.tensor in volatile),
    )


def _names(contents: Contents) -> dict[str, set[str]]:
    """What each tensor of the state may be called: by its name, and by those of its atoms."""
    of_atoms: dict[str, set[str]] = {}
    for name, atom in contents.ties.items():
        of_atoms.setdefault(atom, set()).add(name)
    found: dict[str, set[str]] = {}
    for part in contents.parts:
        found.setdefault(part.tensor, {part.tensor}).update({part.name}, of_atoms.get(part.name, ()))
    return found
