"""Who comes late to the calls, told without a clock: whoever comes last waits least.

`late` of a rank in one call is the longest wait of all its members less the rank's own. A rank that is late in one group because it
waited in another is not to blame: so what it waited more than usual is taken off again.
"""

from __future__ import annotations

from collections import Counter, deque
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple

from stormjib_health.engine.baseline import LEARNED, Mean

if TYPE_CHECKING:
    from collections.abc import Iterable

    from stormjib_health.engine.book import Book
    from stormjib_health.wire import Timing

KEEP = 16
"""Calls of each group that are looked back on; what is older becomes baseline."""
OPEN = 64
"""Calls whose ends are awaited, as agents of a large job are heard seconds apart; of an older one that half of the
members have told, the half is taken."""


class Told(NamedTuple):
    """One call with all its ends."""

    at: float
    longest: float
    last: int
    """Rank that was later than usual by most."""
    excess: float
    """By how much."""
    timings: dict[int, Timing]


class _Usual:
    """Means of one rank in one group."""

    __slots__ = ("late", "off", "wait")

    def __init__(self) -> None:
        self.late, self.wait, self.off = Mean(), Mean(), Mean()

    def add(self, late: float, wait: float) -> None:
        self.late.add(late)
        self.wait.add(wait)
        if self.late.count > LEARNED:
            self.off.add(abs(late - self.late.value) + abs(wait - self.wait.value))


class _Group:
    def __init__(self, size: int) -> None:
        self.size = size
        self.open: dict[int, dict[int, Timing]] = {}
        self.told: deque[Told] = deque()
        self.usual: dict[int, _Usual] = {}
        self.learned = 0
        self.newest = 0
        self.closed = 0
        self.first_step = -1


@dataclass
class Blame:
    """What the calls since some moment say."""

    late: dict[int, float] = field(default_factory=dict)
    """Seconds a step, more than usual, that the others waited for each rank, less what it waited itself."""
    noise: dict[int, float] = field(default_factory=dict)
    """Of the seconds a step by which healthy calls would typically make each of them late: the square."""
    last: dict[int, Counter[int]] = field(default_factory=dict)
    """By group: how often each rank was last, of the calls in which somebody was late at all."""
    longest: float = 0.0
    """Seconds a step that the latest rank of each call was late, whoever it was."""


class Late:
    """The timed calls of all groups."""

    def __init__(self, book: Book) -> None:
        self._book = book
        self._groups: dict[int, _Group] = {}
        self.frozen = False

    def take(self, rank: int, timings: Iterable[Timing], now: float) -> None:
        """Ends that one rank has taken."""
        groups, known = self._groups, self._book.groups
        for timing in timings:
            group = groups.get(timing.group)
            if group is None:
                if timing.group not in known or known[timing.group].size < 2:
                    continue
                group = groups[timing.group] = _Group(known[timing.group].size)
            ends = group.open.get(timing.number)
            if ends is None:
                if timing.number <= group.newest - OPEN:
                    continue
                ends = group.open[timing.number] = {}
            ends[rank] = timing
            if len(ends) == group.size:
                self._close(group, timing.number, now)
            elif len(group.open) > OPEN:
                self._close_oldest(group, now)

    def _close_oldest(self, group: _Group, now: float) -> None:
        number = min(group.open)
        if 2 * len(group.open[number]) >= group.size and len(group.open[number]) > 1:
            self._close(group, number, now)
        else:
            del group.open[number]

    def _close(self, group: _Group, number: int, now: float) -> None:
        timings = group.open.pop(number)
        group.newest = max(group.newest, number)
        group.closed += 1
        group.first_step = self._book.top_step if group.first_step < 0 else group.first_step
        longest = max(timing.wait_s for timing in timings.values())
        last, excess = -1, -1.0
        for rank, timing in timings.items():
            usual = group.usual.get(rank)
            late = longest - timing.wait_s - (usual.late.value if usual else 0.0)
            if late > excess:
                last, excess = rank, late
        group.told.append(Told(now, longest, last, excess, timings))
        if len(group.told) > KEEP:
            self._learn(group, group.told.popleft())

    def _learn(self, group: _Group, told: Told) -> None:
        if self.frozen:
            return
        group.learned += 1
        for rank, timing in told.timings.items():
            usual = group.usual.get(rank)
            if usual is None:
                usual = group.usual[rank] = _Usual()
            usual.add(told.longest - timing.wait_s, timing.wait_s)

    def blame(self, since: float, least: float) -> Blame:
        """What the calls that were told after `since` say, per step; linear in what is kept.

        `least`: seconds by which the last one must be late for its call to tell who is last.
        """
        blame = Blame()
        for key, group in self._groups.items():
            told = [call for call in group.told if call.at >= since]
            if group.learned >= LEARNED and told:
                steps = max(1.0, len(told) / self._calls_a_step(group))
                for call in told:
                    _weigh(group, call, blame, steps)
                late = [call for call in told if call.excess >= least]
                blame.last[key] = Counter(call.last for call in late)
                blame.longest += sum(call.excess for call in late) / steps
        return blame

    def _calls_a_step(self, group: _Group) -> float:
        steps = self._book.top_step - group.first_step
        return max(group.closed / steps, 1e-3) if steps > 0 else 1.0


def _weigh(group: _Group, told: Told, blame: Blame, steps: float) -> None:
    """Add one call."""
    for rank, timing in told.timings.items():
        usual = group.usual.get(rank)
        if usual is not None:
            late = (told.longest - timing.wait_s - usual.late.value) - (timing.wait_s - usual.wait.value)
            blame.late[rank] = blame.late.get(rank, 0.0) + late / steps
            blame.noise[rank] = blame.noise.get(rank, 0.0) + (usual.off.value / steps) ** 2
