"""The gate before the optimizer: whatever torch optimizer wants to step, in whatever script, waits until the step is staged.

Through torch's global hook, so the script needs no change. Optimizers that are not torch's do not pass it: what they hold is compared.
"""

from __future__ import annotations

import time
import weakref
from concurrent.futures import wait
from typing import TYPE_CHECKING, Any

import torch
from torch.optim.optimizer import register_optimizer_step_pre_hook

from stormjib_checkpoint.tensors import local_of

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch.optim import Optimizer

    from stormjib_checkpoint.engine.saving import Figures
    from stormjib_checkpoint.engine.workers import Job


class Staging:
    """A job that copies. Whoever waits for it does it, if nobody has begun."""

    def __init__(self, job: Job[None]) -> None:
        self.job = job

    @property
    def done(self) -> bool:
        """It is over, one way or the other."""
        return self.job.future.done()

    def hurry(self) -> None:
        """Return when it is done."""
        self.job.do()
        wait([self.job.future])


class Gate:
    """Shut while a step is being copied. Knows the optimizers that have passed it, or were named."""

    def __init__(self) -> None:
        self._copying: list[tuple[Staging, Figures]] = []
        self._optimizers: weakref.WeakSet[Optimizer] = weakref.WeakSet()
        self._hook = register_optimizer_step_pre_hook(self._before_step)

    def know(self, optimizer: Optimizer) -> None:
        """Trust that this optimizer passes the gate, where torch has hooked its `step`."""
        if getattr(type(optimizer).step, "hooked", False):
            self._optimizers.add(optimizer)

    def shut(self, staging: Staging, figures: Figures) -> None:
        """Until this is done, and what it was shut for before. Whoever waits for it says so in `figures`."""
        self._copying = [one for one in self._copying if not one[0].done] + [(staging, figures)]

    def wait(self) -> None:
        """Before anything that changes the state: until what is being copied is staged."""
        for (
            staging,
            figures,
        ) in self._copying:  # in their order: a later one may need the room of an earlier one
            if staging.done:
                continue
            began = time.perf_counter()
            staging.hurry()
            figures.waited_s += time.perf_counter() - began

    def guarded(self) -> set[int]:
        """Addresses of the memory that only optimizers behind this gate change."""
        held = (tensor for optimizer in list(self._optimizers) for tensor in _held_by(optimizer))
        with torch.no_grad():
            return {local_of(tensor).untyped_storage().data_ptr() for tensor in held} - {0}

    def close(self) -> None:
        """Take the hook away."""
        self._hook.remove()

    def _before_step(self, optimizer: Optimizer, _args: Any, _kwargs: Any) -> None:
        self._optimizers.add(optimizer)
        self.wait()


def _held_by(optimizer: Optimizer) -> Iterator[torch.Tensor]:
    for group in optimizer.param_groups:
        yield from group["params"]
    for state in list(optimizer.state.values()):
        yield from (value for value in list(state.values()) if isinstance(value, torch.Tensor))
