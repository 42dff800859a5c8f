"""Exact mode: the same bits on any number of ranks.

Floating point addition is not associative, so whatever is summed over ranks is summed here in an order that does not know
them. Gradients: of one micro-batch after the other, in the order of their numbers, whoever owns them. Rank r owns the
micro-batches r, r + N, r + 2N, …; so each pass of all ranks holds N that follow each other. After each pass every rank
sends every other one its part of its gradient (an all-to-all, the bytes of a reduce-scatter), and adds what it receives to
the sum of the passes before, one rank after the other. The loss: of each micro-batch in a place of its own. The gradient's
norm: each row of each matrix is summed on the one rank that holds it (shards are cut between rows), in a place of its own.

What it costs beside `Fast`: a reduction in each pass, where that has one in each step, and small passes.
"""

from __future__ import annotations

from itertools import accumulate
from typing import TYPE_CHECKING, Any, cast

import torch
import torch.distributed as dist
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from stormjib_trainer.step import summed_loss

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor, nn

    from stormjib_trainer.model import Llama
    from stormjib_trainer.reduction import Keys
    from stormjib_trainer.step import Share


class Fold:
    """Reduces the gradients of one FSDP2 unit, pass after pass of a step; what it gives back is the sum of all passes so far."""

    def __init__(self, micro_batches: int) -> None:
        self._micro_batches = micro_batches
        self.start()

    def start(self) -> None:
        """Before the first pass of a step."""
        self._sum: Tensor | None = None
        self._left = self._micro_batches

    def allocate(self, size: Sequence[int], *, dtype: torch.dtype, device: torch.device) -> Tensor:
        """Memory for the input of a reduction, then for its output."""
        return torch.empty(*size, dtype=dtype, device=device)

    def __call__(
        self,
        output_tensor: Tensor,
        input_tensor: Tensor,
        group: dist.ProcessGroup,
        op: Any,
        async_op: bool = False,
    ) -> None:
        """As FSDP2 calls its reduce-scatter. The parts of ranks that had no micro-batch in this pass are left out."""
        received = torch.empty_like(input_tensor)
        dist.all_to_all_single(received, input_tensor, group=group)
        parts = [*received.view(group.size(), -1)[: self._left]]
        self._left -= len(parts)
        output_tensor.copy_(parts.pop(0) if self._sum is None else self._sum)
        for part in parts:
            output_tensor += part
        self._sum = output_tensor


class Exact:
    """The `Reduction` of exact mode, for a model that is sharded over all ranks."""

    def __init__(self, model: Llama, share: Share) -> None:
        self._model, self._share = model, share
        self.folds: dict[nn.Module, Fold] = {
            unit: Fold(share.lmb.per_step) for unit in model.modules() if isinstance(unit, FSDPModule)
        }
        for unit, fold in self.folds.items():
            cast("FSDPModule", unit).set_custom_reduce_scatter(
                cast("Any", fold)
            )  # its base class is private to torch
        self._rows = _Rows([p for p in model.parameters() if isinstance(p, DTensor)])

    def backward(self, windows: Tensor, keys: Keys | None) -> Tensor:
        """Returns a place for the loss of each micro-batch; those of other ranks are 0."""
        losses = torch.zeros(self._share.lmb.per_step, dtype=torch.float64, device=windows.device)
        for fold in self.folds.values():
            fold.start()
        for i, one in enumerate(self._share.passes(windows, most=1)):
            if i and self._share.world > 1:  # one rank alone reduces nothing: FSDP2 adds its passes up itself
                self._forget()
            part = summed_loss(self._model, one.windows, keys and keys(one.numbers))
            part = part * (one.weight * self._share.scale(windows))
            torch.autograd.backward(part)
            losses[one.numbers] = part.detach().double()
        return losses

    def _forget(self) -> None:
        """The gradients of the passes so far: the folds have them, and FSDP2 would add them a second time."""
        for parameter in self._model.parameters():
            parameter.grad = None

    def numbers(self, loss: Tensor, gradients: list[Tensor]) -> Tensor:
        return torch.cat((loss, self._rows.squares(gradients)))

    def read(self, summed: Tensor) -> tuple[float, float]:
        count = self._share.lmb.per_step
        return float(summed[:count].sum()), float(summed[count:].sum().sqrt())


class _Rows:
    """All rows of all parameters, in their order: the same list on any number of ranks."""

    def __init__(self, parameters: Sequence[DTensor]) -> None:
        ends = [*accumulate((len(p) for p in parameters), initial=0)]
        self._count = ends.pop()
        self._places = [
            start + compute_local_shape_and_global_offset(p.shape, p.device_mesh, p.placements)[1][0]
            for start, p in zip(ends, parameters, strict=True)
        ]

    def squares(self, gradients: Sequence[Tensor]) -> Tensor:
        """The sum of squares of each row, float64; 0 for the rows of other ranks."""
        whole = torch.zeros(self._count, dtype=torch.float64, device=gradients[0].device)
        for place, gradient in zip(self._places, gradients, strict=True):
            whole[place : place + len(gradient)] = row_squares(gradient)
        return whole


def row_squares(gradient: Tensor) -> Tensor:
    """Sum of squares of each row, float64. A row's sum does not depend on how many rows there are beside it: torch gives whole
    rows to its threads, but one row alone it cuts, so that has itself for company."""
    squares = gradient.double().square()
    if squares.ndim == 1:
        return squares
    rows = squares.flatten(1)
    return rows.expand(2, -1).contiguous().sum(1)[:1] if len(rows) == 1 else rows.sum(1)
