"""Forward, backward and the one small collective of a step."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from math import ceil
from typing import TYPE_CHECKING, cast

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch.distributed.fsdp import FSDPModule

    from stormjib_checkpoint.order import Micro
    from stormjib_trainer.model import Llama


@dataclass(frozen=True)
class Agreed:
    """What all ranks know after a step, equal on every one of them to the bit."""

    loss: float
    """Mean over the bytes of the whole batch."""
    grad_norm: float
    stop: bool
    """Some rank was asked to stop."""
    save: bool
    """Some rank was asked to save."""
    hold: bool
    """Some rank is not ready to save yet."""
    busy: bool
    """Some rank has no room to stage a step that is not saved."""
    told: tuple[float, ...] = ()
    """What the ranks wanted to tell each other beside, summed."""


@dataclass(frozen=True)
class Pass:
    """Micro-batches that a rank takes through the model at once."""

    numbers: range
    """None where this rank has no more, and others have: it takes one empty text, weighted by nothing."""
    windows: Tensor

    @property
    def weight(self) -> float:
        """Of its loss."""
        return 1.0 if self.numbers else 0.0


@dataclass(frozen=True)
class Share:
    """What one rank takes of the numbered micro-batches of a step: every world-th, so that ranks differ by one at most."""

    lmb: Micro
    rank: int
    world: int

    @property
    def numbers(self) -> range:
        """Of its micro-batches."""
        return range(self.rank, self.lmb.per_step, self.world)

    @property
    def sequences(self) -> int:
        """How many it takes in a step."""
        return len(self.numbers) * self.lmb.size

    def passes(self, windows: Tensor, most: int) -> Iterator[Pass]:
        """Cut the windows of its micro-batches into passes of at most `most` of them.

        Every forward and backward gathers weights from all ranks, so all must make the same number of them: as many as
        the largest share needs.
        """
        count, size = ceil(ceil(self.lmb.per_step / self.world) / most), self.lmb.size
        ends = [len(self.numbers) * i // count for i in range(count + 1)]
        for begin, end in pairwise(ends):
            taken = windows[begin * size : end * size]
            yield Pass(
                self.numbers[begin:end], taken if begin < end else windows.new_zeros(1, windows.shape[1])
            )


Keys = Callable[[range], Tensor]
"""The dropout keys of the sequences of some micro-batches."""


def summed_loss(model: Llama, windows: Tensor, keys: Tensor | None = None) -> Tensor:
    """Cross entropy in nats, summed over all bytes of these windows; with dropout where there are keys."""
    logits = model(windows[:, :-1], keys)
    return F.cross_entropy(logits.flatten(0, 1).float(), windows[:, 1:].flatten(), reduction="sum")


def backward(model: Llama, windows: Tensor, share: Share, most: int, keys: Keys | None = None) -> Tensor:
    """Gradients of the mean loss over the whole batch, summed over ranks. Returns this rank's part of that loss."""
    sharded = cast("FSDPModule", model)
    passes = [*share.passes(windows, most)]
    loss = torch.zeros((), dtype=torch.float64, device=windows.device)
    scale = 1.0 / (share.lmb.batch * (windows.shape[1] - 1))
    for i, one in enumerate(passes):
        sharded.set_requires_gradient_sync(i == len(passes) - 1)
        drawn = keys(one.numbers) if keys else None
        part = summed_loss(model, one.windows, drawn) * (one.weight * scale)
        torch.autograd.backward(part)
        loss += part.detach()
    return loss


def agree(
    loss: Tensor,
    grads: list[Tensor],
    *,
    stop: bool,
    save: bool,
    hold: bool,
    busy: bool,
    replicas: int = 1,
    told: Tensor | None = None,
) -> Agreed:
    """One collective for all that the ranks must agree on: loss, gradient norm, what they wish, and what they want to tell beside.

    Each shard of the gradient is on `replicas` ranks, and so counted as often.
    """
    norms = torch.stack(torch._foreach_norm(grads)).double()
    own = torch.stack((loss, norms.dot(norms)))
    flags = torch.tensor((stop, save, hold, busy), dtype=torch.float64, device=loss.device)
    whole = torch.cat((own, flags) if told is None else (own, flags, told))
    dist.all_reduce(whole)
    mean, squares, stops, saves, holds, busies, *rest = whole.tolist()
    norm = (squares / replicas) ** 0.5
    return Agreed(mean, norm, stops > 0, saves > 0, holds > 0, busies > 0, tuple(rest))


def clip(grads: list[Tensor], norm: float, most: float) -> None:
    """Scale the gradients so that their norm over all ranks is at most `most`."""
    if norm > most:
        torch._foreach_mul_(grads, most / norm)
