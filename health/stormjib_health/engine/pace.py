"""How fast the job steps. A few ranks tell for all, because in synchronous training all steps last alike."""

from __future__ import annotations

import math
from collections import deque
from typing import TYPE_CHECKING

from stormjib_health.engine.baseline import Baseline, Cusum, median

if TYPE_CHECKING:
    from stormjib_health.engine.book import Book
    from stormjib_health.wire import RankSample

PACERS = 16
AHEAD = 64
"""A step number this far from the newest is forgotten, or not believed."""
RECENT = 4


class Pace:
    """The series of step times, its baseline, and whether it has left it."""

    def __init__(self, book: Book) -> None:
        limits = book.limits
        self._book, self._limits = book, limits
        ranks = sorted(book.ranks)
        every = max(1, len(ranks) // PACERS)
        self._pacers = frozenset(ranks[::every][:PACERS])
        self._need = (len(self._pacers) + 1) // 2
        self._open: dict[int, list[float]] = {}
        self._last = -1
        self._window: deque[float] = deque(maxlen=RECENT)
        self._calm = 0
        self._cusum = Cusum(limits.cusum_slack, limits.cusum_limit, limits.cusum_clip)
        self.steps = Baseline(limits.warm_up_steps, limits.baseline_steps, limits.keep_steps)
        self.peaks = Baseline(limits.warm_up_steps, limits.baseline_steps, limits.keep_steps)
        """The longest wait of each step: what the patience of the hang rule is made of."""
        self.since: float | None = None
        """Since when the steps are slow or begin to be."""
        self.steps_since = 0
        self.slow = False

    def take(self, seen: RankSample, now: float) -> None:
        """The steps that one rank has finished."""
        if seen.rank not in self._pacers:
            return
        for back, seconds in enumerate(reversed(seen.steps_s)):
            step = seen.steps_to - back
            if self._last < step <= max(self._last, self._book.top_step) + AHEAD and step >= 0:
                self._open.setdefault(step, []).append(seconds)
        for step in sorted(self._open):
            if len(self._open[step]) < self._need and step > self._book.top_step - AHEAD // 8:
                break
            self._finish(step, median(self._open.pop(step)), now)

    def _finish(self, step: int, seconds: float, now: float) -> None:
        self._last = step
        long = now - self._book.long_at < 1.0 + 2 * seconds
        peak, self._book.peak = self._book.peak, 0.0
        if long or seconds <= 0:
            return
        self._window.append(seconds)
        if not self.slow:
            self.peaks.add(peak)
        if self.steps.ready:
            self._watch(seconds, now)
        elif self.since is None:
            self.steps.add(seconds)

    def _watch(self, seconds: float, now: float) -> None:
        centre = self.steps.centre
        self._cusum.add(seconds / centre, self.steps.spread / centre)
        if self._cusum.falling:
            self._end()
            self.steps.forget_oldest()
            self.steps.add(seconds)
            return
        rising = self._cusum.up > 0
        self.since = (self.since if self.since is not None else now) if rising or self.slow else None
        self.steps_since = self.steps_since + 1 if self.since is not None else 0
        if not self.slow:
            self.slow = self._cusum.rising and self.above
        else:
            self._look_for_end()
        if not self.slow and self._cusum.up < self._limits.cusum_limit / 2:
            self.steps.add(seconds)

    @property
    def above(self) -> bool:
        """The newest steps are slower than noise explains."""
        return self.recent > self._gate()

    def _gate(self) -> float:
        noise = self._limits.slow_mads * self.steps.spread / math.sqrt(RECENT)
        return max(self._limits.slow_ratio * self.steps.centre, self.steps.centre + noise)

    def _look_for_end(self) -> None:
        self._calm = self._calm + 1 if self.calm else 0
        if self._calm >= self._limits.ended_steps:
            self._end()

    def _end(self) -> None:
        self.slow, self.since, self.steps_since, self._calm = False, None, 0, 0
        self._cusum.reset()

    @property
    def uneasy(self) -> bool:
        """Half-way to slow, or slow: what is seen now is not learned as normal."""
        return self.slow or self._cusum.up > self._limits.cusum_limit / 2

    @property
    def calm(self) -> bool:
        """The newest steps last about as long as they did."""
        limit = max(self._limits.ended_ratio * self.steps.centre, self.steps.centre + self.steps.spread)
        return self.recent < limit

    def give_up(self) -> None:
        """What was slow is how the job runs now."""
        self._begin_again()

    def _begin_again(self) -> None:
        self._end()
        self.steps.restart(self._window)

    @property
    def recent(self) -> float:
        """Median of the newest four steps; 0 before four."""
        return median(self._window) if len(self._window) == RECENT else 0.0

    @property
    def excess(self) -> float:
        """Seconds that a step lasts longer now than it did."""
        return max(0.0, self.recent - self.steps.centre)

    @property
    def severity(self) -> float:
        """Step time now over step time before; 1 where nothing is known."""
        return self.recent / self.steps.centre if self.steps.ready and self.steps.centre > 0 else 1.0
