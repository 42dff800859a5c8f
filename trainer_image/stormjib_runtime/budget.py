"""What restarts cost: how many are left, and how long the next one waits."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from stormjib_runtime.wire import Bounds, HistoryEntry


def restarts_left(bounds: Bounds, history: tuple[HistoryEntry, ...]) -> int:
    """The bounds' budget less what this coordinator has spent of it since they were written."""
    spent = sum(entry.counted and entry.generation.id > bounds.counted_above for entry in history)
    return bounds.restarts_left - spent


def delay(bounds: Bounds, barren: int) -> float:
    """Seconds before the next counted generation, after `barren` in a row that finished no step."""
    if barren == 0:
        return 0.0
    doublings = min(barren - 1, 32)  # bounded: 2**1024 is no float
    return min(bounds.backoff_initial_s * 2.0**doublings, bounds.backoff_max_s)
