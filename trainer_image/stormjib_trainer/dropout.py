"""Dropout whose mask is a function of (seed, step, layer, logical micro-batch, position) alone, and of no generator.

So a mask does not depend on which rank draws it, on what was drawn before, or on the device; there is no state to save.
Each sequence has a 64-bit key; a layer mixes its number into it, and then word i of its mask is splitmix64's i-th output
from there, four elements from each word. That is integer arithmetic of torch, which wraps at 64 bits everywhere.

It costs some 5 ns per element on one core of a CPU, where `torch.nn.functional.dropout` costs 6.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from stormjib_checkpoint.order import mix

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

RNG = "splitmix64-16"
"""Names this way of drawing in a checkpoint: another one would go on with other masks."""
PER_WORD = 4
_STEPS = 1 << 16
_MASK = (1 << 64) - 1
_GOLDEN = 0x9E3779B97F4A7C15


def keys(seed: int, step: int, numbers: Sequence[int], size: int, device: torch.device) -> Tensor:
    """The key of each sequence of these micro-batches, `size` of each: int64 of shape (sequences,). Of no micro-batch, one that
    nobody else has: a rank takes one empty text through the model where it has none."""
    base = mix(mix(seed & _MASK) + step & _MASK)
    lmbs = [mix(base + _GOLDEN * (number + 1) & _MASK) for number in numbers]
    found = [mix(lmb + _GOLDEN * (row + 1) & _MASK) for lmb in lmbs for row in range(size)] or [base]
    return torch.tensor([_signed(key) for key in found], device=device)


def dropout(x: Tensor, keys: Tensor, layer: int, p: float) -> Tensor:
    """Zero each element of x (sequences, ...) with probability p, to one part in 65,536, and scale up the others."""
    threshold = min(round(p * _STEPS), _STEPS - 1)
    kept = draw(keys, layer, x[0].numel()).ge(threshold - _STEPS // 2).view_as(x)
    return torch.where(kept, x * (_STEPS / (_STEPS - threshold)), 0)


def draw(keys: Tensor, layer: int, count: int) -> Tensor:
    """Numbers that are spread evenly over [-32768, 32768), `count` for each key: int16 of shape (keys, count)."""
    words = torch.arange(1, -(-count // PER_WORD) + 1, device=keys.device).mul_(_signed(_GOLDEN))
    started = _mix(keys + _signed(_GOLDEN * (layer + 1)))
    return _mix(started[:, None] + words).view(torch.int16)[:, :count]


def _mix(z: Tensor) -> Tensor:
    """`order.mix` of each element, in place."""
    z ^= _right(z, 30)
    z *= _signed(0xBF58476D1CE4E5B9)
    z ^= _right(z, 27)
    z *= _signed(0x94D049BB133111EB)
    z ^= _right(z, 31)
    return z


def _right(z: Tensor, by: int) -> Tensor:
    """Shifted right with zeros coming in: torch's own shift brings in the sign."""
    return (z >> by).bitwise_and_((1 << (64 - by)) - 1)


def _signed(value: int) -> int:
    return ((value + (1 << 63)) & _MASK) - (1 << 63)
