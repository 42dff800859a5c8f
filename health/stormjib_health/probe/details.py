"""What a call is, from torch's own words: its kind, how many bytes, and a signature that is equal on all its ranks."""

from __future__ import annotations

import struct
import zlib
from functools import cache
from typing import TYPE_CHECKING

from stormjib_health.wire import Kind

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    import torch

KINDS: Mapping[str, Kind] = {
    "ALLREDUCE": Kind.ALL_REDUCE,
    "ALLREDUCE_COALESCED": Kind.ALL_REDUCE,
    "ALLGATHER": Kind.ALL_GATHER,
    "ALLGATHER_BASE": Kind.ALL_GATHER,
    "ALLGATHER_COALESCED": Kind.ALL_GATHER,
    "ALLGATHER_INTO_TENSOR_COALESCED": Kind.ALL_GATHER,
    "REDUCE_SCATTER": Kind.REDUCE_SCATTER,
    "REDUCE_SCATTER_BASE": Kind.REDUCE_SCATTER,
    "REDUCE_SCATTER_TENSOR_COALESCED": Kind.REDUCE_SCATTER,
    "BROADCAST": Kind.BROADCAST,
    "REDUCE": Kind.REDUCE,
    "GATHER": Kind.GATHER,
    "SCATTER": Kind.SCATTER,
    "ALLTOALL": Kind.ALL_TO_ALL,
    "ALLTOALL_BASE": Kind.ALL_TO_ALL,
    "BARRIER": Kind.BARRIER,
    "SEND": Kind.SEND,
    "RECV": Kind.RECV,
}
"""Names of torch's HookOpName. What is not here (a split, a window) is `Kind.OTHER`."""

_OUTPUTS = (Kind.ALL_GATHER, Kind.SCATTER, Kind.RECV)
"""Their outputs are of the same size on every rank, their inputs may not be."""
_UNEVEN = (Kind.ALL_TO_ALL, Kind.BARRIER, Kind.OTHER)
"""Ranks may bring different sizes, or none."""


def of_tensors(
    kind: Kind, inputs: Sequence[torch.Tensor], outputs: Sequence[torch.Tensor]
) -> tuple[int, int]:
    """(bytes, signature) of one call; the signature is never 0."""
    tensors = (outputs or inputs) if kind in _OUTPUTS else (inputs or outputs)
    if not tensors:
        return 0, _signature(kind, 0, 0)
    elements = sum(tensor.numel() for tensor in tensors)
    size = sum(tensor.numel() * tensor.element_size() for tensor in tensors)
    return size, _signature(kind, _dtype(tensors[0].dtype), 0 if kind in _UNEVEN else elements)


def _signature(kind: Kind, dtype: int, elements: int) -> int:
    return zlib.crc32(struct.pack("<BIQ", kind, dtype, elements)) or 1


@cache
def _dtype(dtype: torch.dtype) -> int:
    return zlib.crc32(str(dtype).encode())
