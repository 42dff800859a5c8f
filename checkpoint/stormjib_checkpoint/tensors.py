"""What this rank holds of each tensor, in the coordinates of the whole one: torch on one side, plain boxes on the other."""

from __future__ import annotations

import zlib
from dataclasses import dataclass
from typing import TYPE_CHECKING, cast

import torch
from torch.distributed.tensor import DTensor, Replicate, Shard

from stormjib_checkpoint.boxes import Box, part, whole
from stormjib_checkpoint.errors import UnsupportedState
from stormjib_checkpoint.records import Json

if TYPE_CHECKING:
    from collections.abc import Mapping

Value = torch.Tensor | Json
"""A state is a mapping of names to tensors (also DTensors) and JSON scalars."""

TAGS: Mapping[torch.dtype, str] = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
    torch.complex64: "C64",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint64: "U64",
    torch.uint32: "U32",
    torch.uint16: "U16",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
DTYPES: Mapping[str, torch.dtype] = {tag: dtype for dtype, tag in TAGS.items()}


@dataclass(frozen=True)
class Held:
    """One tensor as this rank has it: its box of the whole, the local memory, and whether its copy is the primary."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    box: Box
    local: torch.Tensor
    primary: bool


def held(name: str, tensor: torch.Tensor, rank: int, world: int) -> Held:
    """What this rank holds of `tensor`. Raises UnsupportedState, which names it."""
    if tensor.dtype not in TAGS:
        raise UnsupportedState(f"{name} has dtype {tensor.dtype}, which the format cannot hold; convert it")
    if isinstance(tensor, DTensor):
        return _held_shard(name, tensor)
    local = _plain_memory(name, tensor.detach())
    shape = tuple(tensor.shape)
    # Every rank has the same plain tensor (a replica): one of them writes it, chosen by name, so that all agree.
    primary = zlib.crc32(name.encode()) % world == rank
    return Held(name, TAGS[tensor.dtype], shape, whole(shape), local, primary)


def _held_shard(name: str, tensor: DTensor) -> Held:
    shape = tuple(tensor.shape)
    box, primary = whole(shape), True
    coordinate = tensor.device_mesh.get_coordinate()
    if coordinate is None:
        raise UnsupportedState(
            f"{name} lives on a mesh that this rank is no part of; leave it out of its state"
        )
    for placement, parts, index in zip(tensor.placements, tensor.device_mesh.shape, coordinate, strict=True):
        if type(placement) is Shard:
            box = part(box, placement.dim % len(shape), parts, index)
        elif isinstance(placement, Replicate):
            primary = primary and index == 0
        else:
            raise UnsupportedState(f"{name} is placed as {placement}; only Shard and Replicate can be saved")
    local = _plain_memory(name, tensor.to_local().detach())
    if tuple(local.shape) != box.shape:
        raise UnsupportedState(
            f"{name}: the local shard has shape {list(local.shape)}; placements {tensor.placements} say {list(box.shape)}"
        )
    return Held(name, TAGS[tensor.dtype], shape, box, local, primary)


def local_of(tensor: torch.Tensor) -> torch.Tensor:
    """This rank's part of a tensor; to be called where no gradients are recorded."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def _plain_memory(name: str, local: torch.Tensor) -> torch.Tensor:
    if local.layout is not torch.strided or local.is_quantized or local.device.type == "meta":
        raise UnsupportedState(
            f"{name} is {local.layout} on {local.device}; only dense tensors with memory can be saved"
        )
    return local


def memory(tensor: torch.Tensor) -> memoryview:
    """The bytes of a contiguous CPU tensor, shared and not copied."""
    return memoryview(cast("memoryview", tensor.reshape(-1).view(torch.uint8).numpy()))


def on_host(local: torch.Tensor) -> torch.Tensor:
    """The same values as a contiguous CPU tensor: itself where it is one."""
    return local.to("cpu").contiguous().resolve_conj().resolve_neg()


def is_direct(local: torch.Tensor) -> bool:
    """Whether bytes can be put straight into its memory."""
    return local.device.type == "cpu" and local.is_contiguous() and not local.is_conj() and not local.is_neg()
