"""How often to save where nobody has said: one save after the other while that costs next to nothing, and never for more than it is worth.

A save costs the seconds that training stood still for it. Saving at the rate that keeps this below `BUDGET` is always right; more often is
right where failures come so often that the work they take back costs more: every sqrt(2 x cost x mean time between failures) seconds
(Young 1974; Daly 2006). Pure.
"""

from __future__ import annotations

from math import sqrt

BUDGET = 0.005
"""Share of the training time that may be lost to saving."""
RANK_HOURS = 50_000.0
"""Between failures of one accelerator: 419 interruptions in 54 days of 16,384 (Llama 3, arXiv 2407.21783). Counts for as much as one
failure that was seen."""


def seconds_between(cost_s: float, ranks: int, trained_s: float = 0.0, failures: int = 0) -> float:
    """The time from one save to the next. `cost_s`: what a save has cost; the rest: what this job has lived through."""
    mean_s = (RANK_HOURS * 3600 / ranks + trained_s) / (1 + failures)
    return min(cost_s / BUDGET, sqrt(2 * cost_s * mean_s))
