"""The step clock of a script that knows nothing of us: torch's own hook after each optimizer step writes the page."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

    from stormjib_runtime.page import Page


class StepClock:
    """Counts the steps of the first optimizer that steps: with several (GAN, RL) one of them is clock enough."""

    def __init__(self, page: Page) -> None:
        self._page = page
        self._optimizer: int | None = None
        self._steps = 0

    def __call__(
        self, optimizer: torch.optim.Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> None:
        if self._optimizer is None:
            self._optimizer = id(optimizer)
        if id(optimizer) != self._optimizer or self._page.owns_clock:
            return
        self._steps += 1
        self._page.step = self._steps


def install(page: Page) -> None:
    """Write `page` after every optimizer step of this process from now on."""
    from torch.optim.optimizer import register_optimizer_step_post_hook  # here: only ranks hold torch

    register_optimizer_step_post_hook(StepClock(page))
