"""How gradients of micro-batches become the gradient of a step: as fast as can be (`Fast`), or in their order (`exact.Exact`)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Protocol, cast

import torch
from torch import Tensor, nn

from stormjib_trainer.step import summed_loss

if TYPE_CHECKING:
    from torch.distributed.fsdp import FSDPModule

    from stormjib_health.probe.numbers import ReduceScatter
    from stormjib_trainer.model import Llama
    from stormjib_trainer.step import Share

Keys = Callable[[range], Tensor]
"""The dropout keys of the sequences of some micro-batches."""


class Reduction(Protocol):
    """What the loop needs of either."""

    @property
    def folds(self) -> Mapping[nn.Module, ReduceScatter]:
        """What reduces the gradients of a unit of the model, where it is not FSDP2 itself."""

    def backward(self, windows: Tensor, keys: Keys | None) -> Tensor:
        """Gradients of the mean loss over the whole batch, summed over ranks, from the windows of this rank's micro-batches.
        Returns this rank's part of that loss, float64."""

    def numbers(self, loss: Tensor, gradients: list[Tensor]) -> Tensor:
        """This rank's part of loss and gradient norm, float64; the sum over ranks is what `read` reads."""

    def read(self, summed: Tensor) -> tuple[float, float]:
        """Loss and norm of the whole gradient, of all ranks: equal on all of them to the bit."""


class Fast:
    """Each rank adds up what it has, and FSDP2 adds up the ranks: what comes out depends on the number of ranks in its last bits."""

    def __init__(self, model: Llama, share: Share, most: int, replicas: int = 1) -> None:
        """`most` micro-batches go through the model at once. Each shard of the gradient is on `replicas` ranks."""
        self._model, self._share, self._most, self._replicas = model, share, most, replicas
        self.folds: Mapping[nn.Module, ReduceScatter] = {}

    def backward(self, windows: Tensor, keys: Keys | None) -> Tensor:
        sharded = cast("FSDPModule", self._model)
        passes = [*self._share.passes(windows, self._most)]
        loss = torch.zeros(1, dtype=torch.float64, device=windows.device)
        for i, one in enumerate(passes):
            sharded.set_requires_gradient_sync(i == len(passes) - 1)
            part = summed_loss(self._model, one.windows, keys and keys(one.numbers))
            part = part * (one.weight * self._share.scale(windows))
            torch.autograd.backward(part)
            loss += part.detach()
        return loss

    def numbers(self, loss: Tensor, gradients: list[Tensor]) -> Tensor:
        norms = torch.stack(torch._foreach_norm(gradients)).double()
        return torch.cat((loss, norms.dot(norms).reshape(1)))

    def read(self, summed: Tensor) -> tuple[float, float]:
        loss, squares = summed.tolist()
        return loss, (squares / self._replicas) ** 0.5
