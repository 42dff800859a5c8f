"""What is normal: medians, MAD, and when a series has left it."""

from __future__ import annotations

import math
from collections import deque
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

NORMAL = 1.4826
"""MAD times this is the standard deviation, where the noise is normal."""


LEARNED = 8
"""Values below which a mean says nothing."""
FORGET = 0.05
OUTLIER = 5.0


def median(values: Iterable[float]) -> float:
    """The middle one, or between the two middle ones; 0 of nothing."""
    ordered = sorted(values)
    if not ordered:
        return 0.0
    half = len(ordered) // 2
    return ordered[half] if len(ordered) % 2 else (ordered[half - 1] + ordered[half]) / 2


def mad(values: Sequence[float], centre: float) -> float:
    """Median of the distances from `centre`, scaled to a standard deviation."""
    return NORMAL * median(abs(value - centre) for value in values)


class Baseline:
    """Median and MAD over the newest healthy values, the first few left out."""

    def __init__(self, warm_up: int, needed: int, keep: int) -> None:
        self._skip = warm_up
        self._needed = needed
        self._values: deque[float] = deque(maxlen=keep)
        self._stale = False
        self._centre = 0.0
        self._spread = 0.0

    def add(self, value: float) -> None:
        """One more healthy value."""
        if self._skip > 0:
            self._skip -= 1
            return
        self._values.append(value)
        self._stale = True

    def restart(self, values: Iterable[float]) -> None:
        """Forget everything but these."""
        self._values.clear()
        self._values.extend(values)
        self._stale = True

    def forget_oldest(self) -> None:
        """Keep only as many as are needed: what is normal has changed, and half of them will show it soon."""
        while len(self._values) > self._needed:
            self._values.popleft()
        self._stale = True

    def __len__(self) -> int:
        return len(self._values)

    @property
    def ready(self) -> bool:
        """Enough values to judge by."""
        return len(self._values) >= self._needed

    @property
    def warm(self) -> bool:
        """The warm-up is over."""
        return self._skip <= 0

    @property
    def centre(self) -> float:
        """The median; 0 of nothing."""
        self._refresh()
        return self._centre

    @property
    def spread(self) -> float:
        """The scaled MAD; 0 of nothing."""
        self._refresh()
        return self._spread

    @property
    def top(self) -> float:
        """The greatest value kept; 0 of nothing."""
        return max(self._values, default=0.0)

    def _refresh(self) -> None:
        if self._stale:
            self._centre = median(self._values)
            self._spread = mad(self._values, self._centre)
            self._stale = False


class Mean:
    """What is usual: a mean that forgets slowly."""

    __slots__ = ("count", "value")

    def __init__(self) -> None:
        self.value = 0.0
        self.count = 0

    def add(self, value: float) -> None:
        """One more healthy value. A pause (a stopped machine) counts at most a few times the mean."""
        self.count += 1
        if self.count > LEARNED:
            value = min(value, OUTLIER * self.value + 0.01)
        self.value += max(FORGET, 1 / self.count) * (value - self.value)


class Cusum:
    """Two-sided cumulative sum: many small steps in one direction add up, a single large one does not."""

    def __init__(self, slack: float, limit: float, clip: float) -> None:
        self._slack, self._limit, self._clip = slack, limit, clip
        self.up = 0.0
        self.down = 0.0

    def add(self, ratio: float, noise: float) -> None:
        """`ratio` to the baseline, above 0; `noise` is the relative spread of healthy values."""
        slack = max(self._slack, 0.75 * noise)
        value = max(-self._clip, min(self._clip, math.log(ratio)))
        self.up = max(0.0, self.up + value - slack)
        self.down = max(0.0, self.down - value - slack)

    def reset(self) -> None:
        """Begin again at nothing."""
        self.up = self.down = 0.0

    @property
    def rising(self) -> bool:
        """The series has gone up for good."""
        return self.up > self._limit

    @property
    def falling(self) -> bool:
        """The series has gone down for good."""
        return self.down > self._limit


def chance(hits: int, of: int, choices: int) -> float:
    """How likely one of `choices`, drawn anew each time, is drawn `hits` times or more `of` times; at most 1."""
    p = 1 / max(1, choices)
    tail = sum(math.comb(of, k) * p**k * (1 - p) ** (of - k) for k in range(hits, of + 1))
    return min(1.0, choices * tail)
