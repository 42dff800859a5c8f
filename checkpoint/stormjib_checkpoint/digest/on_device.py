"""Partial digests of tensors where they lie: on a GPU in one pass over its memory, else with plain operations of torch, block by block."""

from __future__ import annotations

import functools
import logging
import subprocess
from typing import TYPE_CHECKING

import torch

from stormjib_checkpoint.digest.definition import BLOCK, FAR, FIRST, GOLDEN, MASK, SECOND, Words, words
from stormjib_checkpoint.digest.geometry import Geometry

if TYPE_CHECKING:
    from collections.abc import Callable

    Sum = Callable[[torch.Tensor, Words, Geometry, int], torch.Tensor]

AT_ONCE = 1 << 22
"""Words; each takes some 50 bytes on the way."""

_log = logging.getLogger(__name__)


def partial_on_device(elements: torch.Tensor, dtype: str, box: Geometry, first: int) -> int:
    """The partial digest of a contiguous tensor of bytes: elements of a box, from its element number `first` on. Waits for the device."""
    made_of = words(dtype)
    total = _sum(elements.device.type)(elements, made_of, box, first)
    return int(total.item()) & MASK


@functools.cache
def _sum(kind: str) -> Sum:
    """What sums up on this kind of device."""
    if kind != "cuda":
        return blockwise
    try:
        from stormjib_checkpoint.digest import fused

        _check(fused.total, kind)
    except (ImportError, RuntimeError, OSError, subprocess.CalledProcessError) as error:
        _log.warning("digests on the GPU take several passes over its memory: %s", error)
        return blockwise
    return fused.total


def _check(total: Sum, kind: str) -> None:
    """Have it compiled, which needs what may not be there. Raises RuntimeError where it is wrong."""
    elements, box = torch.arange(64, dtype=torch.uint8, device=kind), Geometry((2, 8), (9000, 1), 2**32)
    if total(elements, words("F32"), box, 0) != blockwise(elements, words("F32"), box, 0):
        raise RuntimeError("the compiled kernel computes something else")


def blockwise(elements: torch.Tensor, made_of: Words, box: Geometry, first: int) -> torch.Tensor:
    """The sum as one 64-bit number on the device, by plain operations: what they make on the way is bounded."""
    data = typed(elements, made_of)
    total = torch.zeros((), dtype=torch.int64, device=data.device)
    at_once = AT_ONCE // made_of.per_element
    for start in range(0, len(data) // made_of.per_element, at_once):
        part = data[start * made_of.per_element : (start + at_once) * made_of.per_element]
        total += _sum_of(part, made_of, box, first + start)
    return total


def typed(elements: torch.Tensor, made_of: Words) -> torch.Tensor:
    """Bytes as words; torch knows little of unsigned ones, so these have signs."""
    return elements.view({1: torch.uint8, 2: torch.int16, 4: torch.int32}[made_of.width])


def _sum_of(data: torch.Tensor, made_of: Words, box: Geometry, first: int) -> torch.Tensor:
    unsigned = data.to(torch.int64) & (1 << 8 * made_of.width) - 1
    position = _positions(data, made_of, box, first)
    weights = _odd(position % BLOCK) * _odd(position // BLOCK + _signed(FAR))
    return (unsigned * weights).sum()


def _positions(data: torch.Tensor, made_of: Words, box: Geometry, first: int) -> torch.Tensor:
    word = torch.arange(len(data), device=data.device)
    number = word // made_of.per_element + first
    index = torch.full_like(word, box.base)
    for size, stride in zip(reversed(box.sizes), reversed(box.strides), strict=True):
        index += number % size * stride
        number //= size
    return index * made_of.per_element + word % made_of.per_element


def _odd(z: torch.Tensor) -> torch.Tensor:
    z = z * _signed(GOLDEN)
    z = (z ^ _shifted(z, 30)) * _signed(FIRST)
    z = (z ^ _shifted(z, 27)) * _signed(SECOND)
    return z ^ _shifted(z, 31) | 1


def _shifted(z: torch.Tensor, bits: int) -> torch.Tensor:
    """To the right, as an unsigned number."""
    return z >> bits & (1 << 64 - bits) - 1


def _signed(number: int) -> int:
    return number - 2**64 if number >= 2**63 else number
