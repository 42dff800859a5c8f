"""The numbers of a step that a rank can vouch for: its own gradient's norm before mixing, digests of its state's bits."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, cast

import torch
import torch.distributed as dist

from stormjib_health.integrity.slices import SLICES, parts

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from torch import Tensor

DIGEST_HALVES = 4
"""Numbers that a digest takes in a vector of doubles."""
_COLUMNS = 1024
_WORD = 8
_HALF = 1 << 32
ReduceScatter = Callable[..., "dist.Work | None"]
"""(output, input, group, op, async_op), as FSDP2 calls it."""


class LocalNorm:
    """The L2 norm of this rank's own gradient, taken where it is last its own: at the entrance of the reduction.

    For FSDP2 it is the custom reduce-scatter of every unit (`attach`), for DDP a communication hook (`attach_ddp`).
    Nothing is waited for: on a GPU the norm is one more kernel on the stream of the reduction.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._norms: list[Tensor] = []
        self._filled: Tensor | None = None

    def start(self) -> None:
        """Before the backward pass of a step."""
        self._norms, self._filled = [], None

    def value(self) -> Tensor:
        """After the backward pass: a double on the device, not waited for; infinite or NaN where a gradient is."""
        if not self._norms:
            return torch.zeros((), dtype=torch.float64, device=self._device)
        norms = torch.stack(self._norms).double()
        return norms.dot(norms).sqrt()

    def take(self, gradient: Tensor) -> None:
        """One more gradient that is about to be mixed."""
        self._norms.append(torch.linalg.vector_norm(gradient, dtype=torch.float32))

    # --- FSDP2 ----------------------------------------------------------------------------------------------------------

    def attach(self, model: torch.nn.Module, folds: Mapping[torch.nn.Module, ReduceScatter]) -> None:
        """Stand before the reduce-scatter of every FSDP2 unit of `model`: before the one in `folds`, where there is one. A unit
        that is reduced more than once in a step counts as if its gradients stood at right angles."""
        from torch.distributed.fsdp import FSDPModule

        for module in model.modules():
            if isinstance(module, FSDPModule):
                entrance = _Entrance(self, folds.get(module, _reduce_scatter))
                module.set_custom_reduce_scatter(cast("Any", entrance))  # its base class is private to torch

    def allocate(self, size: Sequence[int], *, dtype: torch.dtype, device: torch.device) -> Tensor:
        """Memory for the input of a reduce-scatter, then for its output. Where a shard has one rank (all ranks are
        replicas) the reduce-scatter is never called, so there the norm is taken when the output is asked for: the
        input is full by then. The two are told apart by size only where there is more than one."""
        buffer = torch.empty(*size, dtype=dtype, device=device)
        if self._filled is None:
            self._filled = buffer
        else:
            filled, self._filled = self._filled, None
            if filled.numel() == buffer.numel():
                self.take(filled)
        return buffer

    # --- DDP ------------------------------------------------------------------------------------------------------------

    def attach_ddp(self, model: torch.nn.parallel.DistributedDataParallel) -> None:
        """Stand in for the all-reduce of every bucket of `model`."""
        from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook

        def hook(group: dist.ProcessGroup, bucket: Any) -> torch.futures.Future[Tensor]:
            self.take(bucket.buffer())
            return allreduce_hook(group, bucket)

        hook.__annotations__.clear()  # DDP compares them with classes, and here they are texts
        model.register_comm_hook(dist.group.WORLD, hook)


class _Entrance:
    """Stands before the reduction of one FSDP2 unit."""

    def __init__(self, norm: LocalNorm, reduce: ReduceScatter) -> None:
        self.allocate, self._take, self._reduce = norm.allocate, norm.take, reduce

    def __call__(
        self,
        output_tensor: Tensor,
        input_tensor: Tensor,
        group: dist.ProcessGroup,
        op: Any,
        async_op: bool = False,
    ) -> dist.Work | None:
        """Reduce and scatter, after a look at what goes in."""
        self._take(input_tensor)
        return self._reduce(output_tensor, input_tensor, group, op, async_op)


def _reduce_scatter(
    output_tensor: Tensor, input_tensor: Tensor, group: dist.ProcessGroup, op: Any, async_op: bool = False
) -> dist.Work | None:
    """As FSDP2 does by default."""
    return dist.reduce_scatter_tensor(output_tensor, input_tensor, op, group, async_op)


class Digests:
    """Digests of the raw bits of some tensors, a slice at a time, without a copy.

    A digest is two sums of 8-byte words that wrap at 64 bits: plain, and each word times a weight of its column. One
    flipped bit always changes both; two that cancel in the plain sum cancel in the other only where they are in the
    same column. (A sum and an xor of all words cost four times as much, and both are blind to words that change
    places.) One pass over the memory, and no floating point: the same bits give the same digest everywhere.
    """

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        """`tensors` are read where they are, each time; all on one device, contiguous."""
        self._bytes = [tensor.detach().reshape(-1).view(torch.uint8) for tensor in tensors]
        words = [-(-each.numel() // _WORD) for each in self._bytes]
        self._parts = [parts(words, index) for index in range(SLICES)]
        self._device = tensors[0].device if tensors else torch.device("cpu")
        self._weights = _weights().to(self._device)

    @torch.no_grad()
    def of(self, index: int) -> Tensor:
        """The digest of slice `index` % SLICES: int64 of shape (2,), on the device, not waited for."""
        columns = torch.zeros(_COLUMNS, dtype=torch.int64, device=self._device)
        for part in self._parts[index % SLICES]:
            _add(columns, self._bytes[part.tensor][part.begin * _WORD : part.end * _WORD])
        return torch.stack((columns.sum(), (columns * self._weights).sum()))

    def whole(self) -> Tensor:
        """One digest of all slices, as `of` gives it."""
        slices = torch.stack([self.of(index) for index in range(SLICES)])
        return (slices * self._weights[:SLICES, None]).sum(0)


def _add(columns: Tensor, data: Tensor) -> None:
    """Add the words of these bytes to the columns that they stand in."""
    words = _words(data)
    rows = words.numel() // _COLUMNS
    if rows:
        columns += words[: rows * _COLUMNS].view(rows, _COLUMNS).sum(0)
    rest = words[rows * _COLUMNS :]
    columns[: rest.numel()] += rest


def _words(data: Tensor) -> Tensor:
    """Bytes as words of 8, the last one filled up with zeros; a view where that is possible."""
    short = -data.numel() % _WORD
    if short:
        data = torch.nn.functional.pad(data, (0, short))
    elif data.storage_offset() % _WORD:
        data = data.clone()
    return data.view(torch.int64)


def _weights() -> Tensor:
    """Odd, so that no bit of a word is lost by the product; the multiples of the golden ratio are well spread."""
    step = 0x9E3779B97F4A7C15
    return torch.tensor([_signed((2 * column + 1) * step) for column in range(_COLUMNS)], dtype=torch.int64)


def _signed(value: int) -> int:
    return ((value + (1 << 63)) & ((1 << 64) - 1)) - (1 << 63)


def halves(digest: Tensor) -> Tensor:
    """A digest as DIGEST_HALVES doubles of 32 bits each, which a sum with zeros keeps exactly: so digests may travel
    in an all-reduce of doubles, each rank's in a place of its own."""
    return torch.cat((digest & (_HALF - 1), (digest >> 32) & (_HALF - 1))).double()
