"""What is known of every slot, rank and group: kept up to date sample by sample, at a cost of what is new only.

All times here are the coordinator's: an age in a sample is turned into a moment when the sample arrives. So the way of a
sample (milliseconds) is the only error, and no two clocks are compared.
"""

from __future__ import annotations

from collections import deque
from typing import TYPE_CHECKING, NamedTuple

from stormjib_health.engine.check import MEMBERSHIPS, check
from stormjib_health.engine.report import Malformed
from stormjib_health.wire import Kind, Phase

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from stormjib_health.engine.report import Place
    from stormjib_health.engine.thresholds import Thresholds
    from stormjib_health.wire import Call, Group, RankSample, Sample

PATIENT = frozenset(phase for phase in Phase if phase.may_last and phase is not Phase.DATA)
"""Phases in which silence says nothing. Not DATA: a rank that alone waits for its data holds up the others, and a
common stall of storage is told by most ranks being in it."""
POINT_TO_POINT = (int(Kind.SEND), int(Kind.RECV))
DEAD_STATES = frozenset("TtZX")
FOREVER_AGO = float("-inf")
QUEUES = 150
"""Waits for a processor that are kept of a rank: of half a minute at five samples a second."""


class Standing(NamedTuple):
    """The newest call of one rank in one group."""

    call: Call
    issued_at: float

    @property
    def position(self) -> int:
        """How many collectives this rank has entered: a call that its device has not started does not count."""
        return self.call.issued if self.call.started else self.call.issued - 1


class SlotBook:
    """One agent as it is heard."""

    __slots__ = ("blink", "heard", "interval", "number", "quiet", "ranks", "unknown")

    def __init__(self, now: float) -> None:
        self.ranks: dict[int, RankBook] = {}
        self.heard = now
        self.blink = now
        """Waits count from here on at most: before it, this slot or the coordinator did not run."""
        self.interval = 0.0
        self.number: tuple[int, int] = (-1, -1)
        self.quiet = True
        """The coordinator says that it is cut off, or it has never been heard."""
        self.unknown: set[int] = set()
        """Groups in which its ranks call, and whose members are not known."""


class RankBook:
    """One rank as its agent last saw it."""

    __slots__ = (
        "calls", "dead_since", "disk_since", "excused_at", "exit", "idle_since", "phase", "phase_since", "process", "queued",
        "rank", "slot", "stack", "step", "throttled", "throttled_usually", "unread", "wchan",
    )  # fmt: skip

    def __init__(self, rank: int, slot: int) -> None:
        self.rank = rank
        self.slot = slot
        self.step = -1
        self.phase = 0
        self.phase_since = 0.0
        self.process = "R"
        self.excused_at = FOREVER_AGO
        """When it was last known to be in a phase that may last."""
        self.dead_since: float | None = None
        self.disk_since: float | None = None
        self.idle_since: float | None = None
        self.wchan = ""
        self.unread = 0
        self.throttled = 0.0
        """Part of the time in which the processor was refused, recent samples weighing most."""
        self.throttled_usually = 0.0
        """The same over many seconds."""
        self.queued: deque[tuple[float, float]] = deque(maxlen=QUEUES)
        """When it was heard that it had waited for a processor, and how long."""
        self.stack = ""
        self.exit: int | None = None
        self.calls: dict[int, Standing] = {}

    def take(self, seen: RankSample, now: float, over_s: float) -> None:
        """The newest sample of this rank."""
        if seen.phase in PATIENT:
            self.excused_at = now
        elif self.phase in PATIENT:
            self.excused_at = max(self.excused_at, now - seen.phase_age_s)
        self.step = max(self.step, seen.step)
        self.phase, self.phase_since = seen.phase, now - seen.phase_age_s
        self.process, self.wchan, self.unread = seen.process, seen.wchan, seen.unread
        since = now - seen.process_age_s
        self.dead_since = since if seen.process in DEAD_STATES else None
        self.disk_since = since if seen.process == "D" else None
        self.idle_since = now - seen.idle_s if seen.idle_s > 0 else None
        part = min(1.0, seen.throttled_s / over_s) if over_s > 0 else 0.0
        self.throttled += 0.3 * (part - self.throttled)
        self.throttled_usually += 0.01 * (part - self.throttled_usually)
        if seen.queued_s:
            self.queued.append((now, seen.queued_s))

    def queued_since(self, since: float) -> float:
        """Seconds that it waited for a processor."""
        return sum(seconds for at, seconds in self.queued if at > since)


class Book:
    """All of one generation."""

    def __init__(self, places: Sequence[Place], limits: Thresholds, now: float) -> None:
        self.limits = limits
        self.slot_of = {place.rank: place.slot for place in places}
        self.slots = {slot: SlotBook(now) for slot in dict.fromkeys(self.slot_of.values())}
        self.ranks: dict[int, RankBook] = {}
        for rank, slot in self.slot_of.items():
            self.ranks[rank] = self.slots[slot].ranks[rank] = RankBook(rank, slot)
        self.groups: dict[int, Group] = {}
        self.top_step = -1
        self.advanced_at = now
        self.peak = 0.0
        """Longest wait seen in the step in progress."""
        self.long_at = FOREVER_AGO
        """When somebody was last seen in a phase that may last."""
        self._now = now
        self._members = 0

    # --- taking ---

    def clock(self, now: float) -> None:
        """Every call of the engine comes through here: a hole in time excuses everybody."""
        if now - self._now > self.limits.blink_s:
            for slot in self.slots.values():
                slot.blink = now
        self._now = max(self._now, now)

    def take(self, sample: Sample, now: float) -> bool:
        """Take one sample; False where a newer one is known already. Raises Malformed."""
        slot = self.slots.get(sample.slot)
        if slot is None:
            raise Malformed(f"slot is {sample.slot}; this generation has {len(self.slots)} other ones")
        if (sample.agent, sample.number) <= slot.number:
            return False
        check(sample, slot.ranks, self.slot_of, self.groups)
        self._learn_groups(sample.groups)
        self._hear(slot, sample, now)
        for seen in sample.ranks:
            rank = slot.ranks[seen.rank]
            rank.take(seen, now, sample.over_s)
            self._take_calls(slot, rank, seen.calls, now)
            self._note_progress(seen, now)
        for stack in sample.stacks:
            self.ranks[stack.rank].stack = stack.text
        return True

    def _hear(self, slot: SlotBook, sample: Sample, now: float) -> None:
        away = max(self.limits.blink_s, 3 * slot.interval)
        if slot.quiet or now - slot.heard > away or sample.over_s > away:
            slot.blink = now
        slot.interval = min(10.0, sample.over_s)
        slot.heard, slot.quiet = now, False
        slot.number = (sample.agent, sample.number)

    def _learn_groups(self, groups: Iterable[Group]) -> None:
        for group in groups:
            known = self.groups.get(group.key)
            if known is not None and known.spans != group.spans and known.ranks != group.ranks:
                raise Malformed(f"group {group.key} has other ranks than another agent says of it")
            if known is None:
                self._members += group.size
                if self._members > MEMBERSHIPS * len(self.ranks):
                    self._members -= group.size
                    raise Malformed(
                        f"groups have more than {MEMBERSHIPS} members for each rank of the generation"
                    )
                self.groups[group.key] = group

    def _take_calls(self, slot: SlotBook, rank: RankBook, calls: Iterable[Call], now: float) -> None:
        for call in calls:
            if call.group not in self.groups:
                slot.unknown.add(call.group)
            old = rank.calls.get(call.group)
            if old is None or call.issued > old.call.issued:
                self._advance_without_steps(now)
            rank.calls[call.group] = Standing(call, now - call.age_s)
            if not call.done and rank.phase not in PATIENT:
                self.peak = max(self.peak, self.waited(rank, rank.calls[call.group]))
        if slot.unknown:
            slot.unknown.difference_update(self.groups)

    def _advance_without_steps(self, now: float) -> None:
        if self.top_step < 0:
            self.advanced_at = now

    def _note_progress(self, seen: RankSample, now: float) -> None:
        if seen.step > self.top_step:
            self.top_step = seen.step
            self.advanced_at = now
        if seen.phase in PATIENT:
            self.long_at = now

    # --- asking ---

    def waited(self, rank: RankBook, standing: Standing) -> float:
        """How long this call is known to be open without its rank computing: by what was seen, not by hope."""
        slot = self.slots[rank.slot]
        if rank.idle_since is None:
            return 0.0
        return slot.heard - max(standing.issued_at, rank.idle_since, slot.blink)

    def fresh(self, rank: RankBook, now: float) -> bool:
        """Its agent is heard, so that what is written of it holds now."""
        slot = self.slots[rank.slot]
        return not slot.quiet and now - slot.heard <= max(
            self.limits.fresh_s, self.limits.fresh_intervals * slot.interval
        )

    def members(self, key: int) -> tuple[RankBook, ...]:
        """Of a group; those who call in it where its members are not known."""
        group = self.groups.get(key)
        if group is not None:
            return tuple(self.ranks[rank] for rank in group.ranks)
        return tuple(rank for rank in self.ranks.values() if key in rank.calls)

    def name(self, key: int) -> str:
        """Of a group, for people."""
        group = self.groups.get(key)
        return group.name if group and group.name else f"group {key:x}"

    def slots_of(self, ranks: Iterable[int]) -> tuple[int, ...]:
        """Their slots, each once, in the order of the ranks."""
        return tuple(dict.fromkeys(self.slot_of[rank] for rank in ranks))


def position(rank: RankBook, key: int) -> int:
    """How many collectives of this group the rank has entered."""
    standing = rank.calls.get(key)
    return standing.position if standing else 0
