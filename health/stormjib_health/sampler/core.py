"""From readings to samples: what an agent says of its ranks, and when it says it at once. Pure: the clock is a parameter.

Everything is told as a change since the last sample that the coordinator has taken, so a lost one costs nothing.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from stormjib_health.records.ring import Batch
from stormjib_health.sampler.calls import Calls
from stormjib_health.sampler.edges import Edges
from stormjib_health.sampler.proc import UNSEEN, Activity, Watch
from stormjib_health.wire import Phase, RankSample, Sample

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from stormjib_health.sampler.proc import Stat
    from stormjib_health.sampler.sockets import Socket
    from stormjib_health.wire import Group

DEVICE_S = 1.0
"""A wait for a device (state D) is suspicious from this age on."""
MAX_SPANS = 1 << 11
"""Of all groups in one sample, about: the others come with the next."""
MAX_TIMINGS, MIN_TIMINGS = 32, 4
"""In one sample, shared by its ranks; and of each rank, however many there are."""
QUEUED_S = 0.001
"""Every rank waits a little for a processor each time that it wakes: less than this is not told, until it comes to so much."""
GONE = "X"
"""As the kernel calls the state of a process that is no more."""

Suspicion = tuple[int, str]
"""(rank, what about it)."""


@dataclass(frozen=True)
class RankReading:
    """What was read of one rank."""

    stat: Stat | None
    """None: the process is gone."""
    batch: Batch = field(default_factory=Batch)
    groups: Sequence[Group | None] = ()
    """Groups of its ring that are new, in the order of their index; None for one that is unreadable."""
    step: int = -1
    step_ns: int = 0
    """The rank's step clock, where there is one beside the ring, and when it was written; 0 for never."""
    throttled_s: float = 0.0
    """Refused to its cgroup so far."""
    queued_s: float = 0.0
    """Waited by its main thread for a processor so far."""
    wchan: str = ""


@dataclass(frozen=True)
class Reading:
    """One look at everything."""

    now_ns: int
    """CLOCK_MONOTONIC, in which the rings count too."""
    ranks: Mapping[int, RankReading]
    sockets: Sequence[tuple[int, Socket]] = ()
    """(rank, connection)."""

    @property
    def now(self) -> float:
        return self.now_ns / 1e9


@dataclass
class _Rank:
    """One rank, over all readings."""

    calls: Calls
    last: RankReading
    watch: Watch = field(default_factory=Watch)
    activity: Activity = UNSEEN
    throttled_told: float = 0.0
    queued_told: float = 0.0


class Core:
    """All ranks of one agent in one generation."""

    def __init__(self, blank: Sample, world_size: int) -> None:
        """`blank` says who samples what; its number is that of the sample before the first."""
        self.suspicions: frozenset[Suspicion] = frozenset()
        self._blank = blank
        self._world_size = world_size
        self._ranks: dict[int, _Rank] = {}
        self._edges = Edges()
        self._groups: dict[int, Group] = {}
        self._known: set[int] = set()
        """Keys of groups that the coordinator has."""
        self._now_ns = 0
        self._told_ns = 0
        self._flight = blank

    def take(self, reading: Reading) -> bool:
        """Take one more reading. Whether the coordinator should hear at once: a suspicion has begun or ended."""
        self._now_ns = reading.now_ns
        self._told_ns = self._told_ns or reading.now_ns
        self._edges.take(reading.now, reading.sockets)
        for number, one in reading.ranks.items():
            self._take_rank(number, one, len(reading.ranks), reading.now)
        before, self.suspicions = self.suspicions, frozenset(self._suspect())
        return before != self.suspicions

    def sample(self) -> Sample:
        """What to tell now."""
        over_s = (self._now_ns - self._told_ns) / 1e9
        self._flight = replace(
            self._blank,
            number=self._flight.number + 1,
            over_s=over_s,
            ranks=tuple(self._rank(number, rank) for number, rank in self._ranks.items()),
            edges=self._edges.edges(self._now_ns / 1e9, over_s),
            groups=self._new_groups(),
            findings=tuple(finding for rank in self._ranks.values() for finding in rank.calls.findings),
        )
        return self._flight

    def accepted(self) -> None:
        """The coordinator has taken what `sample` gave last."""
        sample = self._flight
        self._told_ns += round(sample.over_s * 1e9)
        self._edges.told()
        self._known.update(group.key for group in sample.groups)
        for said in sample.ranks:
            rank = self._ranks[said.rank]
            rank.calls.told(said, sample.findings)
            rank.throttled_told += said.throttled_s
            rank.queued_told += said.queued_s

    @property
    def number(self) -> int:
        """Of the newest sample."""
        return self._flight.number

    def describe(self, number: int) -> str:
        """What stands for the stacks of a rank that cannot write them."""
        rank = self._ranks.get(number)
        if rank is None:
            return "not looked at yet"
        said = self._rank(number, rank)
        where = f", sleeps in {said.wchan}" if said.wchan else ""
        return (
            f"process state {said.process} for {said.process_age_s:.1f} s{where}; "
            f"phase {Phase(said.phase).name.lower()} for {said.phase_age_s:.1f} s after step {said.step}"
        )

    def forget(self) -> None:
        """The coordinator is another one: it knows no group and no call."""
        self._known.clear()
        for rank in self._ranks.values():
            rank.calls.forget()

    # --- in ---------------------------------------------------------------------------------------------------------

    def _take_rank(self, number: int, one: RankReading, ranks: int, now: float) -> None:
        if number not in self._ranks:
            calls = Calls(number, self._world_size, max(MIN_TIMINGS, MAX_TIMINGS // ranks))
            self._ranks[number] = _Rank(calls, one, throttled_told=one.throttled_s, queued_told=one.queued_s)
        rank = self._ranks[number]
        rank.last = one
        known = len(rank.calls.groups)
        rank.calls.take(one.batch, one.groups, one.step)
        self._groups.update((group.key, group) for group in rank.calls.groups[known:] if group is not None)
        if one.stat is not None:
            rank.activity = rank.watch.sample(now, one.stat)

    def _suspect(self) -> Iterator[Suspicion]:
        for number, rank in self._ranks.items():
            activity = rank.activity
            if rank.last.stat is None:
                yield number, "gone"
            elif activity.state in "TtZ" or (activity.state == "D" and activity.state_age_s >= DEVICE_S):
                yield number, activity.state
            if self._edges.unread[number]:
                yield number, "unread"
            if number in self._edges.backing_off:
                yield number, "backoff"
            if rank.calls.waits(self._now_ns):
                yield number, "waits"
            if rank.calls.findings:
                yield number, "finding"

    # --- out --------------------------------------------------------------------------------------------------------

    def _rank(self, number: int, rank: _Rank) -> RankSample:
        calls, activity, last = rank.calls, rank.activity, rank.last
        return RankSample(
            rank=number,
            step=calls.step,
            step_age_s=self._age_s(max(last.step_ns, calls.state.step_ns)),
            steps_s=tuple(step.seconds for step in calls.steps),
            own_s=tuple(step.own_s for step in calls.steps),
            steps_to=calls.steps[-1].number if calls.steps else -1,
            phase=int(calls.state.phase),
            phase_age_s=self._age_s(calls.state.phase_ns),
            process=activity.state if last.stat is not None else GONE,
            process_age_s=activity.state_age_s,
            idle_s=activity.idle_s,
            wchan=last.wchan,
            unread=self._edges.unread[number],
            throttled_s=max(0.0, last.throttled_s - rank.throttled_told),
            queued_s=_worth_telling(last.queued_s - rank.queued_told),
            calls=calls.calls(self._now_ns),
            timings=calls.timings(),
            lost=calls.lost,
        )

    def _age_s(self, at_ns: int) -> float:
        return max(0.0, (self._now_ns - at_ns) / 1e9) if at_ns else 0.0

    def _new_groups(self) -> tuple[Group, ...]:
        """Those that the coordinator has not, as many as fit; the others come with the next sample."""
        found: list[Group] = []
        room = MAX_SPANS
        for key, group in self._groups.items():
            if key not in self._known and (room > 0 or not found):
                found.append(group)
                room -= len(group.spans)
        return tuple(found)


def _worth_telling(queued_s: float) -> float:
    return round(queued_s, 4) if queued_s >= QUEUED_S else 0.0
