"""What a rank takes of a step, and the one small collective of it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
import torch.nn.functional as F

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from torch import Tensor

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

    def scale(self, windows: Tensor) -> float:
        """What makes sums of losses over bytes a mean over all bytes of the step."""
        return 1.0 / (self.lmb.batch * (windows.shape[1] - 1))

    def passes(self, windows: Tensor, most: int) -> Iterator[Pass]:
        """Cut the windows of its micro-batches into passes of at most `most` of them.

        Every forward and backward gathers weights from all ranks, so all must make the same number of them: as many as
        rank 0, which has the most. Who has none in the last pass takes one empty text.
        """
        size = self.lmb.size
        for begin in range(0, len(range(0, self.lmb.per_step, self.world)), most):
            numbers = self.numbers[begin : begin + most]
            taken = windows[begin * size : (begin + len(numbers)) * size]
            yield Pass(numbers, taken if numbers else windows.new_zeros(1, windows.shape[1]))


def summed_loss(model: Llama, windows: Tensor, keys: Tensor | None = None) -> Tensor:
    """Cross entropy in nats, summed over all bytes of these windows; with dropout where there are keys."""
    logits = model(windows[:, :-1], keys)
    return F.cross_entropy(logits.flatten(0, 1).float(), windows[:, 1:].flatten(), reduction="sum")


def agree(
    numbers: Tensor,
    read: Callable[[Tensor], tuple[float, float]],
    *,
    stop: bool,
    save: bool,
    hold: bool,
    busy: bool,
    told: Tensor | None = None,
) -> Agreed:
    """One collective for all that the ranks must agree on: loss and gradient norm (which `read` reads from the sum of their
    `numbers`, float64), what they wish, and what they want to tell beside."""
    flags = torch.tensor((stop, save, hold, busy), dtype=torch.float64, device=numbers.device)
    whole = torch.cat((numbers, flags) if told is None else (numbers, flags, told))
    dist.all_reduce(whole)
    whole = whole.cpu()  # waits for the device, once
    loss, norm = read(whole[: len(numbers)])
    stops, saves, holds, busies, *rest = whole[len(numbers) :].tolist()
    return Agreed(loss, norm, stops > 0, saves > 0, holds > 0, busies > 0, tuple(rest))


def clip(grads: list[Tensor], norm: float, most: float) -> None:
    """Scale the gradients so that their norm over all ranks is at most `most`."""
    if norm > most:
        torch._foreach_mul_(grads, most / norm)
