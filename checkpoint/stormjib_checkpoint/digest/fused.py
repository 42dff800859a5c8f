"""The sum of `on_device` as one kernel, so that memory is read once. Needs triton, which torch brings along for GPUs, and a C compiler."""

# Annotations are read by triton, and constants of other modules are not: they are handed over.
# mypy: ignore-errors
import torch
import triton
import triton.language as tl

from stormjib_checkpoint.digest.definition import BLOCK, FAR, FIRST, GOLDEN, SECOND, Words
from stormjib_checkpoint.digest.geometry import Geometry
from stormjib_checkpoint.digest.on_device import typed

TILE, TILES = 2048, 16
"""Words that a program takes at a time, and how often."""


@triton.jit
def _odd(z, GOLDEN: tl.constexpr, FIRST: tl.constexpr, SECOND: tl.constexpr):
    z = z * tl.full((), GOLDEN, tl.uint64)
    z = (z ^ (z >> 30)) * tl.full((), FIRST, tl.uint64)
    z = (z ^ (z >> 27)) * tl.full((), SECOND, tl.uint64)
    return z ^ (z >> 31) | 1


@triton.jit(do_not_specialize=["base", "first", "count"])
def _sums(
    data, sums, sizes, strides, base, first, count,
    SIDES: tl.constexpr, WIDTH: tl.constexpr, PER_ELEMENT: tl.constexpr, TILE: tl.constexpr, TILES: tl.constexpr,
    BLOCK: tl.constexpr, FAR: tl.constexpr, GOLDEN: tl.constexpr, FIRST: tl.constexpr, SECOND: tl.constexpr,
):  # fmt: skip
    start = tl.program_id(0).to(tl.int64) * (TILE * TILES)
    total = tl.zeros((TILE,), tl.uint64)
    for tile in range(TILES):
        word = start + tile * TILE + tl.arange(0, TILE)
        found = tl.load(data + word, mask=word < count, other=0).to(tl.int64) & ((1 << (8 * WIDTH)) - 1)
        number = word // PER_ELEMENT + first
        index = base + tl.zeros((TILE,), tl.int64)
        for side in tl.static_range(SIDES - 1, 0, -1):
            size = tl.load(sizes + side)
            index += number % size * tl.load(strides + side)
            number = number // size
        index += number * tl.load(strides)
        position = (index * PER_ELEMENT + word % PER_ELEMENT).to(tl.uint64)
        near = _odd(position % BLOCK, GOLDEN, FIRST, SECOND)
        far = _odd(position // BLOCK + tl.full((), FAR, tl.uint64), GOLDEN, FIRST, SECOND)
        total += found.to(tl.uint64) * (near * far)
    tl.store(sums + tl.program_id(0), tl.sum(total, 0).to(tl.int64))


def total(elements: torch.Tensor, made_of: Words, box: Geometry, first: int) -> torch.Tensor:
    """As `on_device.blockwise`."""
    data = typed(elements, made_of)
    programs = max(1, -(-len(data) // (TILE * TILES)))
    sums = torch.empty(programs, dtype=torch.int64, device=data.device)
    sizes, strides = torch.tensor([box.sizes, box.strides], device=data.device)
    _sums[(programs,)](
        data, sums, sizes, strides, box.base, first, len(data),
        len(box.sizes), *made_of, TILE, TILES, BLOCK, FAR, GOLDEN, FIRST, SECOND,
    )  # fmt: skip
    return sums.sum()
