"""What a state is made of, found out once and kept for as long as it stays so."""

from __future__ import annotations

from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from operator import attrgetter, eq, is_
from typing import TYPE_CHECKING

import torch

from stormjib_checkpoint.image import Image, image_of
from stormjib_checkpoint.tensors import are_one, empty, local_of
from stormjib_checkpoint.writer import split

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping, Sequence

    from stormjib_checkpoint.tensors import Value

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
    """Names of the tensors that are in the file, in its order."""
    shapes: list[torch.Size]
    """Of the parts, unsharded."""
    volatile: frozenset[str]
    """Tensors that training changes at any time."""

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
        return all(are_one(state[name], state[first]) for name, first in self.image.ties.items())

    def locals_of(self, tensors: Sequence[torch.Tensor]) -> list[torch.Tensor] | None:
        """This rank's parts of the tensors; None where one is of another type, or cut otherwise, than was planned."""
        with torch.no_grad():
            found = [local_of(tensor) for tensor in tensors]
        fits = (
            (local.shape, local.dtype) == (part.local.shape, part.local.dtype)
            for local, part in zip(found, self.image.parts, strict=True)
        )
        return found if all(fits) else None


def plan(
    state: Mapping[str, Value], rank: int, world: int, patterns: Collection[str], buffers: Collection[int]
) -> Plan:
    """Plan a state. `patterns` and `buffers` (addresses) say which of its tensors are volatile. Raises UnsupportedState."""
    contents = split(state, rank, world)
    names = {part.name: [part.name] for part in contents.parts}
    for name, first in contents.ties.items():
        names[first].append(name)
    volatile = {
        part.name
        for part in contents.parts
        if part.local.untyped_storage().data_ptr() in buffers
        or any(fnmatchcase(name, pattern) for pattern in patterns for name in names[part.name])
    }
    # The plan outlives the save, so it must not keep a model's memory alive: types and shapes are enough.
    bare = [replace(part, local=empty(part.local.shape, part.local.dtype, "meta")) for part in contents.parts]
    file = image_of(bare, rank, contents.ties)
    parts = [part.name for part in file.parts]
    shapes = [state[name].shape for name in parts]
    plain = [name for name, value in state.items() if not isinstance(value, torch.Tensor)]
    return Plan(
        list(state),
        list(map(type, state.values())),
        plain,
        file,
        parts,
        shapes,
        frozenset(volatile.intersection(parts)),
    )
