"""What this rank holds of each tensor, in the coordinates of the whole one: torch on one side, plain boxes on the other."""

from __future__ import annotations

import sys
import zlib
from dataclasses import dataclass
from math import prod
from typing import TYPE_CHECKING, NamedTuple, cast

import torch
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor.placement_types import _StridedShard
from torch.nn.parameter import is_lazy
from torch.utils._python_dispatch import is_traceable_wrapper_subclass_type

from stormjib_checkpoint.boxes import Box, whole
from stormjib_checkpoint.errors import UnsupportedState
from stormjib_checkpoint.format import SUB_BYTE
from stormjib_checkpoint.records import Json
from stormjib_checkpoint.spec.shares import dealt

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from torch.distributed.tensor.placement_types import Placement

Value = torch.Tensor | Json
"""A state is a mapping of names to tensors (also DTensors), `ABSENT`, and other values that `objects` can write."""

ABSENT = ...
"""Value of a name whose state is not there: neither lost nor zero. An optimizer makes it in a parameter's first step."""

_NAMES: Mapping[str, str] = {
    "F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16", "BOOL": "bool",
    "F8_E4M3": "float8_e4m3fn", "F8_E5M2": "float8_e5m2", "F8_E8M0": "float8_e8m0fnu",
    "F8_E4M3FNUZ": "float8_e4m3fnuz", "F8_E5M2FNUZ": "float8_e5m2fnuz", "F4_E2M1_X2": "float4_e2m1fn_x2",
    "C32": "complex32", "C64": "complex64", "C128": "complex128", "BC32": "bcomplex32",
    "BITS8": "bits8", "BITS16": "bits16", "BITS1X8": "bits1x8", "BITS2X4": "bits2x4", "BITS4X2": "bits4x2",
    **{f"I{bits}": f"int{bits}" for bits in (*range(1, 8), 8, 16, 32, 64)},
    **{f"U{bits}": f"uint{bits}" for bits in (*range(1, 8), 8, 16, 32, 64)},
}  # fmt: skip
DTYPES: Mapping[str, torch.dtype] = {
    tag: getattr(torch, name) for tag, name in _NAMES.items() if hasattr(torch, name)
}
"""What this torch can hold, by tag; older ones lack some."""
TAGS: Mapping[torch.dtype, str] = {dtype: tag for tag, dtype in DTYPES.items()}
_BARE = frozenset(dtype for tag, dtype in DTYPES.items() if tag in SUB_BYTE)
"""Types that torch can hold and not copy."""


class Cut(NamedTuple):
    """Where a box lies in a tensor of the state that holds more than it, or lies otherwise."""

    tensor: str
    """Its name in the state."""
    shape: tuple[int, ...]
    start: int
    """Of the box's first element, in elements of the tensor's own memory."""
    strides: tuple[int, ...]

    def of(self, local: torch.Tensor, shape: tuple[int, ...]) -> torch.Tensor:
        """The box, of this shape, in the tensor's memory."""
        return local.as_strided(shape, self.strides, local.storage_offset() + self.start)


@dataclass(frozen=True)
class Held:
    """A box of a whole tensor as this rank has it: the local memory, whether its copy is the primary, and on how many ranks there is one.

    A rank may have several boxes of one tensor.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    box: Box
    local: torch.Tensor
    primary: bool
    copies: int
    """On how many ranks each element of it is held."""
    cut: Cut | None = None
    """None where `local` is the tensor that the state has under this name."""

    @property
    def tensor(self) -> str:
        """Name of the state's tensor."""
        return self.cut.tensor if self.cut is not None else self.name

    @property
    def identity(self) -> tuple[object, ...]:
        """Equal for two names of one tensor: same memory, same geometry, same part of the same whole."""
        return (self.shape, self.box, *place(self.local))


def held(name: str, tensor: torch.Tensor, rank: int, world: int) -> Held:
    """What this rank holds of `tensor`. Raises UnsupportedState, which names it."""
    _refuse_unknown(name, tensor)
    if isinstance(tensor, DTensor):
        return _held_shard(name, tensor)
    local = plain_memory(name, tensor.detach())
    shape = tuple(tensor.shape)
    # Every rank has the same plain tensor (a replica): one of them writes it, chosen by name, so that all agree.
    primary = zlib.crc32(name.encode()) % world == rank
    return Held(name, TAGS[tensor.dtype], shape, whole(shape), local, primary, world)


def _refuse_unknown(name: str, tensor: torch.Tensor) -> None:
    if is_lazy(tensor):
        raise UnsupportedState(f"{name} has no shape yet; let its lazy module run once")
    if tensor.dtype not in TAGS:
        raise UnsupportedState(f"{name} has dtype {tensor.dtype}, which the format cannot hold; convert it")
    if sys.byteorder != "little":
        raise UnsupportedState(f"{name}: this machine is big-endian, and the format is little-endian only")


def _held_shard(name: str, tensor: DTensor) -> Held:
    shape, mesh = tuple(tensor.shape), tensor.device_mesh
    coordinate = mesh.get_coordinate()
    if coordinate is None:
        raise UnsupportedState(
            f"{name} lives on a mesh that this rank is no part of; leave it out of its state"
        )
    local = plain_memory(name, tensor.to_local().detach())
    box, primary, copies = placed(name, shape, tensor.placements, mesh.shape, coordinate)
    if tuple(local.shape) != box.shape:
        # FSDP cuts what tensor parallelism has left, and what it then says of uneven lengths is not always true.
        inner_first = [Shard(p.dim) if isinstance(p, _StridedShard) else p for p in tensor.placements[::-1]]
        box, primary, copies = placed(name, shape, inner_first, mesh.shape[::-1], coordinate[::-1])
    if tuple(local.shape) != box.shape:
        raise UnsupportedState(
            f"{name}: the local shard has shape {list(local.shape)}; placements {tensor.placements} say {list(box.shape)}"
        )
    return Held(name, TAGS[tensor.dtype], shape, box, local, primary, copies)


def placed(
    name: str,
    shape: Sequence[int],
    placements: Sequence[Placement],
    mesh: Sequence[int],
    coordinate: Sequence[int],
) -> tuple[Box, bool, int]:
    """What a rank of a mesh has of a DTensor: its box, whether it is the primary copy, and how many copies there are.

    Raises UnsupportedState, which names the tensor.
    """
    along = [[(0, length)] for length in shape]
    primary, copies = True, 1
    for placement, parts, index in zip(placements, mesh, coordinate, strict=True):
        if isinstance(placement, Replicate):
            primary, copies = primary and index == 0, copies * parts
        elif isinstance(placement, (Shard, _StridedShard)):
            factor = int(placement.split_factor) if isinstance(placement, _StridedShard) else 1
            dim = placement.dim % len(shape)
            along[dim] = dealt(along[dim], factor, parts, index)
        else:
            raise UnsupportedState(
                f"{name} is placed as {placement!r}; only Shard and Replicate can be saved"
            )
    if any(len(stretches) > 1 for stretches in along):
        raise UnsupportedState(
            f"{name}: placements {placements} leave this rank stretches that do not lie together; shard it otherwise"
        )
    ends = [stretches[0] if stretches else (0, 0) for stretches in along]
    box = Box(tuple(start for start, _ in ends), tuple(end - start for start, end in ends))
    return box, primary, copies


def local_of(tensor: torch.Tensor) -> torch.Tensor:
    """This rank's part of a tensor; to be called where no gradients are recorded."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def plain_memory(name: str, local: torch.Tensor) -> torch.Tensor:
    """The tensor itself. Raises UnsupportedState where it has no memory of its own that could be saved."""
    if local.layout is not torch.strided or local.is_quantized or local.device.type == "meta":
        raise UnsupportedState(
            f"{name} is {local.layout} on {local.device}; only dense tensors with memory can be saved"
        )
    if is_traceable_wrapper_subclass_type(type(local)):
        raise UnsupportedState(
            f"{name} is a {type(local).__name__}, which wraps other tensors; save those, under names of their own"
        )
    return local


def memory(tensor: torch.Tensor) -> memoryview:
    """The bytes of a contiguous CPU tensor, shared and not copied."""
    return memoryview(cast("memoryview", tensor.reshape(-1).view(torch.uint8).numpy()))


def copyable(local: torch.Tensor) -> torch.Tensor:
    """The same memory under a type that torch can copy."""
    return local.view(torch.uint8) if local.dtype in _BARE else local


def empty(shape: Sequence[int], dtype: torch.dtype, device: str = "cpu") -> torch.Tensor:
    """A tensor that is yet to be filled. From bytes: torch warns of types that it can do little with when it is asked for them."""
    return (
        torch.empty(prod(shape) * dtype.itemsize, dtype=torch.uint8, device=device).view(dtype).reshape(shape)
    )


def on_host(local: torch.Tensor) -> torch.Tensor:
    """The same bytes as a contiguous CPU tensor: itself where it is one."""
    return copyable(local).to("cpu").contiguous().resolve_conj().resolve_neg()


def is_direct(local: torch.Tensor) -> bool:
    """Whether bytes can be put straight into its memory."""
    return local.device.type == "cpu" and local.is_contiguous() and not local.is_conj() and not local.is_neg()


def place(local: torch.Tensor) -> tuple[object, ...]:
    """Where a tensor's elements lie and how they are read: equal for two names of one memory. Of no use where there are no elements."""
    form = (local.shape, local.stride(), local.dtype, local.is_conj(), local.is_neg())
    return (local.device, local.data_ptr(), *form)


def are_one(one: Value, other: Value) -> bool:
    """Whether two names still are those of one tensor."""
    if one is other:
        return True
    if not (isinstance(one, torch.Tensor) and isinstance(other, torch.Tensor)):
        return False
    with torch.no_grad():
        return one.shape == other.shape and place(local_of(one)) == place(local_of(other))
