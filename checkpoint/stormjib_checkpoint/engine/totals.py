"""What all saves of an engine have cost so far, for whoever watches."""

from __future__ import annotations

import threading
import time
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING

from stormjib_checkpoint.engine.saving import Figures

if TYPE_CHECKING:
    from concurrent.futures import Future

    from stormjib_checkpoint.engine.saving import Save


@dataclass(frozen=True)
class Sums:
    """This rank's saves at one moment."""

    saves: int
    """Parts of steps that have become durable."""
    failures: int
    in_flight: int
    lost_s: float
    """That training waited, in calls and before optimizers, in all of them."""
    bytes: int
    """Of all parts that have become durable."""
    last: Figures
    """Of the newest durable one; zeros before it."""
    age_s: float | None
    """Since the newest became durable; None before it."""


class Totals:
    """Counts saves as they end. From any thread."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._in_flight = self._saves = self._failures = self._bytes = 0
        self._lost_s = 0.0
        self._last: Save | None = None
        self._durable_at: float | None = None
        self._ended: Save | None = None
        """The save that ended last: an optimizer that waited for it may still be adding the time."""

    def begun(self, save: Save) -> None:
        """A save is on its way."""
        with self._lock:
            self._in_flight += 1
        save.upload_completion.add_done_callback(partial(self._end, save))

    def now(self) -> Sums:
        """All of it."""
        with self._lock:
            last = replace(self._last.figures) if self._last is not None else Figures()
            age = time.monotonic() - self._durable_at if self._durable_at is not None else None
            lost = self._lost_s + _lost(self._ended)
            return Sums(self._saves, self._failures, self._in_flight, lost, self._bytes, last, age)

    def _end(self, save: Save, how: Future[None]) -> None:
        with self._lock:
            self._in_flight -= 1
            self._lost_s += _lost(self._ended)
            self._ended = save
            if how.exception() is not None:
                self._failures += 1
                return
            if not save.to_storage:
                return
            self._saves += 1
            self._bytes += save.figures.bytes
            self._last, self._durable_at = save, time.monotonic()


def _lost(save: Save | None) -> float:
    return save.figures.call_s + save.figures.waited_s if save is not None else 0.0
