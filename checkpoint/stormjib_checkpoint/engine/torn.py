"""Whether a tensor was changed while it was copied. Asked while the gate is still shut.

What only optimizers behind the gate change is trusted, and a sample of it compared. Everything else is compared whole. A change that was over
before its tensor was copied shows in torch's version counter only, which `.data`, numpy and fused optimizers leave as it is.
"""

from __future__ import annotations

import random
from typing import TYPE_CHECKING, NamedTuple

from stormjib_checkpoint.engine import memory
from stormjib_checkpoint.tensors import is_direct, on_host

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    import torch

SAMPLED = 64
"""Trusted tensors that are compared after each save, in `SAMPLE_BYTES`."""
SAMPLE_BYTES = 4096


class Copied(NamedTuple):
    """One tensor and where its bytes were put."""

    name: str
    tensor: torch.Tensor
    """As it was given: its version counter is the one that moves."""
    version: int
    """At the time of the call."""
    local: torch.Tensor
    address: int
    trusted: bool


def changed(copied: Sequence[Copied], seed: int) -> str | None:
    """The first tensor found that is not what was copied; None where there is none."""
    for one, version in zip(copied, versions([one.tensor for one in copied]), strict=True):
        if version != one.version:
            return one.name
    for one, start, size in _compared(copied, random.Random(seed)):
        if _differs(one, start, size):
            return one.name
    return None


def versions(tensors: Sequence[torch.Tensor]) -> list[int]:
    """How often torch has seen each tensor change; 0 where it does not count (inference mode)."""
    try:
        return [tensor._version for tensor in tensors]
    except RuntimeError:
        return [0 if tensor.is_inference() else tensor._version for tensor in tensors]


def _compared(copied: Sequence[Copied], chance: random.Random) -> Iterator[tuple[Copied, int, int]]:
    trusted = [one for one in copied if one.trusted]
    for one in chance.sample(trusted, min(SAMPLED, len(trusted))):
        size = _size(one)
        part = min(size, SAMPLE_BYTES)
        yield one, chance.randrange(size - part + 1), part
    for one in copied:
        if not one.trusted:
            yield one, 0, _size(one)


def _size(one: Copied) -> int:
    return one.local.numel() * one.local.element_size()


def _differs(one: Copied, start: int, size: int) -> bool:
    if not is_direct(one.local) and one.trusted:
        return False  # a sample of it would cost a copy of the whole
    now = on_host(one.local)
    return memory.differ(one.address + start, now.data_ptr() + start, size)
