"""Whether the loss or the gradient norm of the whole job has jumped, measured by what it was in the steps before."""

from __future__ import annotations

import math
from collections import deque
from statistics import median
from typing import NamedTuple

WINDOW = 200
"""Steps that a step is compared with."""
LEAST = 50
"""Of fewer steps no spread can be told."""
SIGMAS = 6.0
NORM_FACTOR = 10.0
FLOOR = 0.01
"""The spread of the loss counts as at least this share of it: a loss that hardly varies may still move a little."""
_SIGMA_OF_MAD = 1.4826


class Spike(NamedTuple):
    """A jump upwards: of the loss, or else of the norm. `typical` is the median of the steps before."""

    value: float
    typical: float


class Window:
    """Loss and gradient norm of the last steps that were applied."""

    def __init__(self) -> None:
        self._losses: deque[float] = deque(maxlen=WINDOW)
        self._norms: deque[float] = deque(maxlen=WINDOW)

    def add(self, loss: float, norm: float) -> None:
        """A step that was applied. Numbers that are not finite are no measure for others."""
        if math.isfinite(loss) and math.isfinite(norm):
            self._losses.append(loss)
            self._norms.append(norm)

    def spike(self, loss: float, norm: float) -> Spike | None:
        """Whether these finite numbers stand out of the window; None while it is too short to tell."""
        if len(self._losses) < LEAST:
            return None
        usual, usual_norm = median(self._losses), median(self._norms)
        spread = _SIGMA_OF_MAD * median(abs(each - usual) for each in self._losses)
        if loss - usual > SIGMAS * max(spread, FLOOR * abs(usual)):
            return Spike(loss, usual)
        return Spike(norm, usual_norm) if norm > NORM_FACTOR * usual_norm else None
