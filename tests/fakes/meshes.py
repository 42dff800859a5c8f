"""Layouts without process groups: which box of an atom each rank of a mesh holds, as DTensor would cut it."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import product
from math import prod
from typing import TYPE_CHECKING

import torch
from hypothesis import strategies as st

from stormjib_checkpoint.boxes import Box, part, whole
from stormjib_checkpoint.tensors import TAGS, Held, copyable, memory, on_host

if TYPE_CHECKING:
    from collections.abc import Iterator

shapes = st.lists(st.integers(0, 7), max_size=3).map(tuple)
dtypes = st.sampled_from(sorted(TAGS, key=str))


@dataclass(frozen=True)
class Mesh:
    """Sizes of the mesh's dimensions, and for each the tensor dimension it cuts, or None where it replicates."""

    sizes: tuple[int, ...]
    cuts: tuple[int | None, ...]

    @property
    def world(self) -> int:
        return prod(self.sizes)

    def copies(self, shape: tuple[int, ...]) -> int:
        """How many ranks hold each element."""
        pairs = zip(self.sizes, self.cuts, strict=True)
        return prod(size for size, cut in pairs if cut is None or not shape)

    def boxes(self, shape: tuple[int, ...]) -> Iterator[tuple[Box, bool]]:
        """Each rank's box, and whether its copy is the primary one."""
        for coordinate in product(*(range(size) for size in self.sizes)):
            box, primary = whole(shape), True
            for size, cut, index in zip(self.sizes, self.cuts, coordinate, strict=True):
                if cut is None or not shape:
                    primary = primary and index == 0
                else:
                    box = part(box, cut % len(shape), size, index)
            yield box, primary


meshes = st.lists(st.tuples(st.integers(1, 4), st.none() | st.integers(0, 2)), min_size=1, max_size=2).map(
    lambda dims: Mesh(tuple(size for size, _ in dims), tuple(cut for _, cut in dims))
)


def held(name: str, atom: torch.Tensor, box: Box, primary: bool, copies: int = 1) -> Held:
    """The part of `atom` that lies in `box`, with memory of its own."""
    local = (
        copyable(atom)[tuple(slice(o, e) for o, e in zip(box.offset, box.end, strict=True))]
        .clone()
        .view(atom.dtype)
    )
    return Held(name, TAGS[atom.dtype], tuple(atom.shape), box, local, primary, copies)


def filled(shape: tuple[int, ...], dtype: torch.dtype, seed: int) -> torch.Tensor:
    """A tensor of bytes that differ from element to element."""
    generator = torch.Generator().manual_seed(seed)
    size = prod(shape) * dtype.itemsize
    most = 2 if dtype is torch.bool else 256
    return torch.randint(0, most, (size,), dtype=torch.uint8, generator=generator).view(dtype).reshape(shape)


def zeros(shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    """Of any type, also those that torch can hold and not fill."""
    return torch.zeros(prod(shape) * dtype.itemsize, dtype=torch.uint8).view(dtype).reshape(shape)


def raw(tensor: torch.Tensor) -> bytes:
    """The bytes of a tensor: NaNs compare equal to themselves this way."""
    return bytes(memory(on_host(tensor.detach())))
