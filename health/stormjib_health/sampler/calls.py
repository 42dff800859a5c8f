"""Where one rank stands, from what its ring gave: calls of each group, timings, steps, findings. Pure.

What is told is kept until the coordinator has taken it, and what is kept is bounded: a rank can write faster than
anybody reads.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, NamedTuple

from stormjib_health.records.layout import CallRecord, PhaseRecord, StepRecord
from stormjib_health.records.ring import State
from stormjib_health.wire import PAIRS, Call, Finding, Kind, Pair, Timing

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from stormjib_health.records.layout import Record
    from stormjib_health.records.ring import Batch
    from stormjib_health.wire import Group, RankSample

OLD_S = 0.5
"""An outstanding call of this age is told again and again, and is suspicious unless the rank often takes as long."""
OLD_NS = int(OLD_S * 1e9)
USUAL = 1.5
"""Suspicious is what lasts so many times as long as the rank's longest recent gap between two calls."""
BATCHES = 50
"""Over how many batches that longest gap is taken: ten seconds of a rank that calls all the time."""
MAX_CALLS = 64
MAX_TIMINGS = 8
MAX_STEPS = 8
MAX_FINDINGS = 16
_MAX_OPEN = 256

_Name = tuple[int, int, int, int]
_State = tuple[int, int, bool, int, int, int, tuple[Pair, ...]]
"""Of a group: issued, kind of the newest, whether that is over, signature, signed, peer, pairs."""


class Step(NamedTuple):
    """One finished step."""

    number: int
    seconds: float
    own_s: float
    """The rank's own work in it, as far as it is known."""


@dataclass
class _Lane:
    """One group of this rank."""

    issued: int = 0
    peer: int = -1
    pairs: dict[int, Pair] = field(default_factory=dict)
    """By peer, the newest last."""
    signature: int = 0
    signed: int = 0
    newest: CallRecord | None = None
    order: int = 0
    """Of the newest call among everything that the rank has recorded."""

    def pair(self, record: CallRecord) -> None:
        """A send or a receive."""
        self.peer = record.peer
        sent, received = record.kind is Kind.SEND, record.kind is Kind.RECV
        old = self.pairs.pop(record.peer, None) or Pair(record.peer, 0, 0)
        self.pairs[record.peer] = Pair(
            record.peer, record.number if sent else old.sent, record.number if received else old.received
        )
        if len(self.pairs) > PAIRS:
            del self.pairs[next(iter(self.pairs))]

    def state(self, done: bool) -> _State:
        kind = 0 if self.newest is None else int(self.newest.kind)
        return (
            self.issued, kind, done, self.signature, self.signed, self.peer, tuple(self.pairs.values()),
        )  # fmt: skip


class Calls:
    """One rank's story."""

    def __init__(self, rank: int, world_size: int, max_timings: int = MAX_TIMINGS) -> None:
        self.state = State()
        self.step = -1
        """Last finished step."""
        self.lost = 0
        self.findings: list[Finding] = []
        self.steps: list[Step] = []
        """Those that are not told yet."""
        self.groups: list[Group | None] = []
        """By the index that its ring names them by; None for one that no correct rank has."""
        self._rank = rank
        self._world_size = world_size
        self._lanes: dict[int, _Lane] = {}
        self._order = 0
        self._newest: CallRecord | None = None
        self._free_ns = 0
        """When the rank's newest call ended; 0 where that is not known."""
        self._own_ns = 0
        """Own work of the step in progress."""
        self._pending: dict[_Name, None] = {}
        self._usual: deque[float] = deque(maxlen=BATCHES)
        self._long = False
        self._timings = Thinned(max_timings)
        self._told: dict[int, _State] = {}

    def take(self, batch: Batch, groups: Iterable[Group | None] = (), step: int = -1) -> None:
        """Take what one read gave: records, groups that are new, and the last finished step where a clock beside the
        ring tells it: the ring hears of a step with the first call of the next."""
        self.groups.extend(group if self._fits(group) else None for group in groups)
        early = [record for record in batch.ended if _name(record) in self._pending]
        new = [record for record in batch.ended if _name(record) not in self._pending]
        for record in early:
            self._ended(record)
        longest = self._records(batch.records)
        for record in new:
            self._ended(record)
        if longest > 0:
            self._usual.append(longest / 1e9)
        self.lost += batch.lost
        if batch.state.count:  # else the file could not be read
            self.state = batch.state
        self.step = max(self.step, step, batch.state.step)

    def waits(self, now_ns: int) -> bool:
        """The newest call is not known to be over, for longer than is usual here, and the phase does not explain it."""
        newest = self._newest
        if newest is None or self.state.phase.may_last or self._over(self._lanes[newest.group]):
            return False
        return (now_ns - newest.issued_ns) / 1e9 > max(OLD_S, USUAL * max(self._usual, default=0.0))

    def calls(self, now_ns: int) -> tuple[Call, ...]:
        """Groups where something is new, or an outstanding call is old; the old ones first."""
        found: list[Call] = []
        for index, lane in self._lanes.items():
            group, newest = self._group(index), lane.newest
            if group is None or newest is None:
                continue
            state = lane.state(self._over(lane))
            old = not state[2] and now_ns - newest.issued_ns > OLD_NS
            if old or self._told.get(group.key) != state:
                found.append(_call(group.key, state, now_ns - newest.issued_ns))
        found.sort(key=_old, reverse=True)
        return tuple(found[:MAX_CALLS])

    def timings(self) -> tuple[Timing, ...]:
        """Calls whose end was taken."""
        return self._timings.items()

    def told(self, said: RankSample, findings: Sequence[Finding]) -> None:
        """The coordinator has these."""
        self._told.update((call.group, _state(call)) for call in said.calls)
        self._timings.told(said.timings)
        self.steps = [step for step in self.steps if step.number > said.steps_to]
        self.findings = [finding for finding in self.findings if finding not in findings]
        self.lost -= said.lost

    def forget(self) -> None:
        """The coordinator knows nothing any more."""
        self._told.clear()

    # --- records ----------------------------------------------------------------------------------------------------

    def _records(self, records: Iterable[Record]) -> int:
        """Take them; the longest time in ns between two calls, unless a long phase lies between. The hot loop: a rank
        may call thousands of times a second."""
        longest = 0
        for record in records:
            if type(record) is not CallRecord:
                self._other(record)
                continue
            before, self._newest = self._newest, record
            self._order += 1
            lane = self._lanes.get(record.group)
            if lane is None:
                lane = self._lanes[record.group] = _Lane()
            lane.newest, lane.order = record, self._order
            if record.kind >= Kind.SEND:
                lane.pair(record)
            else:
                lane.issued = record.number
                if record.signature:
                    lane.signature, lane.signed = record.signature, record.number
            issued_ns = record.issued_ns
            if record.pending or record.done_ns:
                self._open(record)
            if self._free_ns:
                self._own_ns += max(0, issued_ns - self._free_ns)
            self._free_ns = record.done_ns
            if self._long:
                self._long = False
            elif before is not None and issued_ns - before.issued_ns > longest:
                longest = issued_ns - before.issued_ns
        return longest

    def _other(self, record: Record) -> None:
        if isinstance(record, Finding):
            self.findings = [*self.findings, replace(record, rank=self._rank)][-MAX_FINDINGS:]
            return
        self._order += 1
        if isinstance(record, StepRecord):
            if record.duration_ns:
                step = Step(record.step, record.duration_ns / 1e9, self._own_ns / 1e9)
                self.steps = [*(one for one in self.steps if one.number < step.number), step][-MAX_STEPS:]
            self._own_ns = 0
        if isinstance(record, PhaseRecord):
            self._long = self._long or record.phase.may_last

    def _open(self, record: CallRecord) -> None:
        """The end of this call is taken, now or later."""
        self._pending[_name(record)] = None
        if len(self._pending) > _MAX_OPEN:
            del self._pending[next(iter(self._pending))]

    def _ended(self, record: CallRecord) -> None:
        lane = self._lanes.get(record.group)
        if lane is not None and lane.newest is not None and _name(lane.newest) == _name(record):
            lane.newest = record
        if self._newest is not None and _name(self._newest) == _name(record):
            self._newest = record
            self._free_ns = record.done_ns
        self._pending.pop(_name(record), None)
        self._timing(record)

    def _group(self, index: int) -> Group | None:
        return self.groups[index] if index < len(self.groups) else None

    def _fits(self, group: Group | None) -> bool:
        return group is not None and self._rank in group.ranks and max(group.ranks) < self._world_size

    def _timing(self, record: CallRecord) -> None:
        group = self._group(record.group)
        if group is None or record.kind.point_to_point:
            return
        wait_s = (record.done_ns - record.issued_ns) / 1e9
        key = record.step if record.step >= 0 else record.number
        self._timings.add(key, Timing(group.key, record.number, wait_s))

    def _over(self, lane: _Lane) -> bool:
        """Its end was taken, or the rank has gone on."""
        newest = lane.newest
        return newest is not None and (
            newest.done_ns > 0 or lane.order < self._order or newest.step < self.step
        )


class Thinned:
    """At most so many timings: of every step, or of every second, fourth, ... counted from 0.

    So ranks whose agents send at other times still tell of the same steps: lateness compares ranks at the same call.
    """

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._stride = 1
        self._kept: list[tuple[int, Timing]] = []

    def add(self, step: int, timing: Timing) -> None:
        if step % self._stride:
            return
        self._kept.append((step, timing))
        while len(self._kept) > self._limit and self._kept[0][0] != self._kept[-1][0]:
            self._stride *= 2
            thinner = [one for one in self._kept if one[0] % self._stride == 0]
            self._kept = thinner or [one for one in self._kept if one[0] == step]
        del self._kept[self._limit :]  # one step with more calls than that: its first ones, on every rank

    def items(self) -> tuple[Timing, ...]:
        return tuple(timing for _, timing in self._kept)

    def told(self, timings: tuple[Timing, ...]) -> None:
        """Drop what is told; from now on every step counts again."""
        self._kept = [one for one in self._kept if one[1] not in timings]
        self._stride = 1


def _name(record: CallRecord) -> _Name:
    """Of one call of a rank: sends and receives have numbers of their own with each peer."""
    return record.group, record.kind, record.peer, record.number


def _call(key: int, state: _State, age_ns: int) -> Call:
    issued, kind, done, signature, signed, peer, pairs = state
    return Call(key, issued, kind, max(0.0, age_ns / 1e9), True, done, signature, signed, peer, pairs)


def _state(call: Call) -> _State:
    return call.issued, call.kind, call.done, call.signature, call.signed, call.peer, call.pairs


def _old(call: Call) -> bool:
    return not call.done and call.age_s > OLD_S
