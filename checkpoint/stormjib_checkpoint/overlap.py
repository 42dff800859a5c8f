"""Tensors to fill that share memory, with others or with themselves: what is loaded must be equal wherever they meet.

Decided before anything is filled: their values are read apart, put in the same order into memory of the same form, and compared.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from stormjib_checkpoint.tensors import copyable, on_host

if TYPE_CHECKING:
    from collections.abc import Sequence

    from stormjib_checkpoint.tensors import Held

ALIGNMENT = 16
"""Of the widest element."""


def shared(parts: Sequence[Held]) -> list[list[Held]]:
    """Those whose memory may be that of another, or is used twice, in groups that must be looked at together."""
    ordered = sorted(parts, key=lambda part: (str(part.local.device), part.local.data_ptr()))
    groups: list[list[Held]] = []
    device, reached = None, 0
    for part in ordered:
        start, end = _extent(part.local)
        if part.local.device == device and start < reached:
            groups[-1].append(part)
        else:
            groups.append([part])
            device, reached = part.local.device, end
        reached = max(reached, end)
    return [
        group
        for group in groups
        if not _is_one_tensors(group) and (len(group) > 1 or _may_meet_itself(group[0].local))
    ]


def _is_one_tensors(group: Sequence[Held]) -> bool:
    """Boxes of one tensor, as a layout cuts it: they may lie between each other, and share no element."""
    return all(part.cut is not None and part.tensor == group[0].tensor for part in group)


def clash(group: Sequence[Held], values: Sequence[torch.Tensor]) -> str | None:
    """The first of the group that would not hold its value once all are filled; None where the values are equal where they meet."""
    first = min(_extent(part.local)[0] for part in group) // ALIGNMENT * ALIGNMENT
    last = max(_extent(part.local)[1] for part in group)
    memory = torch.zeros(-(-(last - first) // ALIGNMENT) * ALIGNMENT, dtype=torch.uint8)
    copies = [_like(part.local, memory, first) for part in group]
    for copy, value in zip(copies, values, strict=True):
        put(copy, value)
    for part, copy, value in zip(group, copies, values, strict=True):
        if not torch.equal(_bytes(copy), _bytes(value)):
            return part.name
    return None


def put(target: torch.Tensor, value: torch.Tensor) -> None:
    """Fill a tensor of any form. Of elements that are one in memory, the first counts."""
    for dim, stride in enumerate(target.stride()):
        if stride == 0:
            target, value = target.narrow(dim, 0, 1), value.narrow(dim, 0, 1)
    copyable(target).copy_(copyable(value))


def _extent(local: torch.Tensor) -> tuple[int, int]:
    """Addresses of the first byte and behind the last one."""
    reach = sum((size - 1) * stride for size, stride in zip(local.shape, local.stride(), strict=True))
    return local.data_ptr(), local.data_ptr() + (reach + 1) * local.element_size()


def _may_meet_itself(local: torch.Tensor) -> bool:
    """Whether two of its elements may be one: each dimension must step over all that lies in the narrower ones."""
    reach = 0
    for stride, size in sorted(zip(local.stride(), local.shape, strict=True)):
        if size > 1:
            if stride <= reach:
                return True
            reach += (size - 1) * stride
    return False


def _like(local: torch.Tensor, memory: torch.Tensor, first: int) -> torch.Tensor:
    """The same form in other memory, which begins where `first` was."""
    offset = (local.data_ptr() - first) // local.element_size()
    copy = memory.view(local.dtype).as_strided(local.shape, local.stride(), offset)
    copy = copy.conj() if local.is_conj() else copy
    return copy._neg_view() if local.is_neg() else copy


def _bytes(tensor: torch.Tensor) -> torch.Tensor:
    return on_host(tensor).reshape(-1).view(torch.uint8)
