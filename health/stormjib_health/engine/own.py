"""Each rank's own work, step by step: known without any other rank's help, so nobody else's slowness is in it.

What is known is the time from an end that was taken to the rank's next call; most steps have a few of these, and the first call's is
among them. A pipeline, where everybody waits alike for the slow stage, shows in nothing else whose stage it is.
"""

from __future__ import annotations

import math
from collections import Counter, deque
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple

from stormjib_health.engine.baseline import LEARNED, Mean

if TYPE_CHECKING:
    from stormjib_health.engine.book import Book
    from stormjib_health.wire import RankSample

KEEP = 16
"""Steps of each rank that are looked back on; what is older becomes baseline."""


class _Step(NamedTuple):
    at: float
    step: int
    seconds: float


class _Rank:
    __slots__ = ("newest", "off", "told", "usual")

    def __init__(self) -> None:
        self.newest = -1
        self.told: deque[_Step] = deque()
        self.usual = Mean()
        self.off = Mean()
        """How far a step is from what is usual."""

    def learn(self, seconds: float) -> None:
        self.usual.add(seconds)
        if self.usual.count > LEARNED:
            self.off.add(abs(seconds - self.usual.value))


@dataclass
class Growth:
    """How much longer ranks work than they did."""

    more: dict[int, float] = field(default_factory=dict)
    """Seconds a step, of each rank."""
    ratio: dict[int, float] = field(default_factory=dict)
    """Own work of each rank over what it was."""
    noise: dict[int, float] = field(default_factory=dict)
    """Seconds by which so many healthy steps would be off, typically."""
    most: Counter[int] = field(default_factory=Counter)
    """How often each rank's had grown most, of the steps in which somebody's had grown at all."""
    longest: float = 0.0
    """Seconds a step by which the most grown rank of each step had grown, whoever it was."""


class Own:
    """The own work of all ranks."""

    def __init__(self, book: Book) -> None:
        self._book = book
        self._ranks = {rank: _Rank() for rank in book.ranks}
        self.frozen = False
        """While something is suspicious, nothing is learned as normal."""

    def take(self, seen: RankSample, now: float) -> None:
        """The steps that one rank has finished. A long phase (checkpoint, evaluation) is nobody's slowness."""
        rank = self._ranks[seen.rank]
        for back in range(len(seen.own_s) - 1, -1, -1):
            step, seconds, lasted = seen.steps_to - back, seen.own_s[-1 - back], seen.steps_s[-1 - back]
            if step <= rank.newest or now - self._book.long_at < 1.0 + 2 * lasted:
                continue
            rank.newest = step
            rank.told.append(_Step(now, step, seconds))
            if len(rank.told) > KEEP:
                old = rank.told.popleft()
                if not self.frozen:
                    rank.learn(old.seconds)

    def growth(self, since: float, least: float) -> Growth:
        """Of the steps told after `since`; linear in what is kept. `least`: seconds by which a step's most grown rank must have grown."""
        found = Growth()
        steps: dict[int, tuple[float, int]] = {}
        for number, rank in self._ranks.items():
            told = [step for step in rank.told if step.at >= since]
            usual = rank.usual.value
            if rank.usual.count < LEARNED or not told or usual <= 0:
                continue
            mean = sum(step.seconds for step in told) / len(told)
            found.more[number], found.ratio[number] = mean - usual, mean / usual
            found.noise[number] = rank.off.value / math.sqrt(len(told))
            for step in told:
                steps[step.step] = max(steps.get(step.step, (least, -1)), (step.seconds - usual, number))
        grown = [(seconds, rank) for seconds, rank in steps.values() if rank >= 0]
        found.most.update(rank for _, rank in grown)
        found.longest = sum(seconds for seconds, _ in grown) / max(1, len(steps))
        return found
