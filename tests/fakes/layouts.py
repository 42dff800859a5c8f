"""Full arrays cut into the ranks' tensors by a layout, and gathered again: with numpy, so that it has nothing in common with the product."""

from __future__ import annotations

from math import prod
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from stormjib_checkpoint.boxes import Box
    from stormjib_checkpoint.spec.layout import Layout, Patch

Array = np.ndarray[Any, np.dtype[Any]]
PADDING = -1


def numbered(atoms: Mapping[str, tuple[int, ...]], begin: int = 1) -> dict[str, Array]:
    """Every element of every atom has a number of its own; scalars have one together, as the steps of an optimizer have."""
    found = {}
    for name, shape in atoms.items():
        found[name] = np.arange(begin, begin + prod(shape)).reshape(shape) if shape else np.array(0)
        begin += prod(shape)
    return found


def cut(layout: Layout, rank: int, full: Mapping[str, Array]) -> dict[str, Array]:
    """A rank's tensors, filled."""
    found = {}
    for name, local in layout.rank(rank).items():
        found[name] = np.full(local.shape, PADDING)
        for patch in local.patches:
            _view(found[name], patch)[...] = full[patch.atom][slices(patch.box)]
    return found


def gathered(layout: Layout, ranks: Sequence[Mapping[str, Array]]) -> dict[str, Array]:
    """The atoms, from the copies that are stored."""
    found = {name: np.full(shape, PADDING) for name, shape in layout.atoms.items()}
    for rank, tensors in enumerate(ranks):
        for name, local in layout.rank(rank).items():
            for patch in (patch for patch in local.patches if patch.primary):
                found[patch.atom][slices(patch.box)] = _view(tensors[name], patch)
    return found


def slices(box: Box) -> tuple[slice, ...]:
    return tuple(slice(o, e) for o, e in zip(box.offset, box.end, strict=True))


def _view(tensor: Array, patch: Patch) -> Array:
    memory = tensor.reshape(-1)[patch.start :]
    steps = tuple(step * tensor.itemsize for step in patch.strides)
    return np.lib.stride_tricks.as_strided(memory, patch.box.shape, steps)
