"""What the world outside asks of this rank and may know of it: the agent's page, and SIGTERM.

One rank may learn of a wish a step before another. So nobody acts alone: `stop` and `save` are what this rank was
asked for, and the collective of the step makes one answer of all of them (`step.agree`).
"""

from __future__ import annotations

import signal
from typing import TYPE_CHECKING

from stormjib_health import probe
from stormjib_health.wire import Phase

if TYPE_CHECKING:
    from types import FrameType

    from stormjib_runtime.page import Page
    from stormjib_runtime.wire import RankPhase, Saving


class Control:
    """The page, where an agent runs this rank; SIGTERM is heard in any case."""

    def __init__(self, page: Page | None) -> None:
        self._page = page
        self._terminated = False
        self._saved = 0

    def listen(self) -> None:
        """Tell the agent that its wishes are read, and take SIGTERM as a wish to stop after the step in progress."""
        if self._page:
            self._page.owns_clock = True
            self._page.listens = True
        signal.signal(signal.SIGTERM, self._on_sigterm)

    def _on_sigterm(self, number: int, frame: FrameType | None) -> None:
        self._terminated = True

    def phase(self, phase: RankPhase) -> None:
        """What this rank is doing from now on."""
        probe.enter(Phase[phase.name])
        if self._page:
            self._page.phase = phase

    def finished(self, step: int, loss: float) -> None:
        """A step is done."""
        if self._page:
            self._page.loss = loss  # first: whoever sees the step may want its loss
            self._page.step = step

    def saving(self, step: int) -> None:
        """This rank's part of a step is on its way."""
        self._saved = step

    def saved(self, step: int) -> None:
        """This rank's part of a step is on the storage. From any thread."""
        if self._page:
            self._page.saved = max(self._page.saved, step)

    def told(self, saving: Saving) -> None:
        """What saving has cost so far. From any thread."""
        if self._page:
            self._page.saving = saving

    def stop(self, step: int) -> bool:
        """Whether this rank was asked to stop after `step` or an earlier one."""
        return self._terminated or (self._page is not None and 0 < self._page.stop_after <= step)

    def save(self, step: int) -> bool:
        """Whether this rank was asked to save after `step`, or after an earlier one and has not."""
        return self._page is not None and self._saved < self._page.save_at <= step
