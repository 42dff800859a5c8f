"""One rank's gradient before it is mixed with the others': the last moment at which a wrong one has an owner."""

from __future__ import annotations

import math
from statistics import median
from typing import TYPE_CHECKING, NamedTuple

from stormjib_health.wire import Doubt

if TYPE_CHECKING:
    from collections.abc import Sequence

FACTOR = math.log(4.0)
"""A norm this far from the median, up or down, as a difference of logarithms, is suspicious ..."""
MADS = 8.0
"""... where it is also this many median absolute deviations away: healthy ranks differ by their data."""
LEAST = 3
"""Of fewer ranks nobody can say which one is wrong."""


class Suspect(NamedTuple):
    """A rank whose gradient is doubted. `value` and `typical` are norms per sequence, 0 where they are no numbers."""

    rank: int
    kind: Doubt
    value: float
    typical: float


def suspects(norms: Sequence[float], shares: Sequence[int]) -> tuple[Suspect, ...]:
    """The ranks whose gradient norm is not finite, or far from the others'.

    `norms` are the L2 norms of each rank's own gradient; `shares` say how many sequences each of them took, since a
    rank with twice as many has up to twice the gradient. A rank without any has no norm to compare.
    """
    per = {rank: norm / share for rank, (norm, share) in enumerate(zip(norms, shares, strict=True)) if share}
    good = [norm for norm in per.values() if math.isfinite(norm)]
    typical = median(good) if good else 0.0
    bad = [
        Suspect(rank, Doubt.NOT_FINITE, 0.0, typical)
        for rank, norm in enumerate(norms)
        if not math.isfinite(norm)
    ]
    return (*bad, *_far({rank: norm for rank, norm in per.items() if math.isfinite(norm)}))


def _far(norms: dict[int, float]) -> list[Suspect]:
    if len(norms) < LEAST or not any(norms.values()):
        return []
    logs = {rank: math.log(max(norm, _SMALLEST)) for rank, norm in norms.items()}
    middle = median(logs.values())
    spread = median(abs(log - middle) for log in logs.values())
    return [
        Suspect(rank, Doubt.NORM, norms[rank], math.exp(middle))
        for rank, log in logs.items()
        if abs(log - middle) > max(FACTOR, MADS * spread)
    ]


_SMALLEST = 1e-300  # a gradient of nothing but zeros is far from any other, and has no logarithm
