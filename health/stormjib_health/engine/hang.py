"""R1: nothing advances. Is it a hang, and whose?

In this order: what the kernel says of a process; ranks that call different things; whoever is waited for and does not wait;
connections that stand; checks; and else nobody.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from stormjib_health.engine import desync, stopped
from stormjib_health.engine.cut import Cut
from stormjib_health.engine.graph import Standstill, odd_ones, stand

if TYPE_CHECKING:
    from collections.abc import Sequence

    from stormjib_health.engine.book import Book
    from stormjib_health.engine.checks import Checks
    from stormjib_health.engine.edges import Bad, Edges
    from stormjib_health.engine.pace import Pace
    from stormjib_health.verdict import Verdict

STACKS = 8
"""Ranks whose stacks are asked for at one time."""


class Hang:
    """Watches for a standstill. One look each tick; a look at a job that advances costs nothing."""

    def __init__(self, book: Book, edges: Edges, pace: Pace, checks: Checks) -> None:
        self._book, self._edges, self._pace, self._checks = book, edges, pace, checks
        self._cut = Cut(book, checks)
        self._streak: tuple[object, int] = (None, 0)
        self.since: float | None = None
        """Since when the job stands, while it is suspicious."""
        self.wanted: tuple[int, ...] = ()
        """Ranks whose stacks would help."""

    def look(self, now: float) -> Verdict | None:
        """A verdict that two looks in a row agree on; None while there is nothing to say."""
        if now - self._book.advanced_at < self._book.limits.hang_floor_s / 2:
            self._clear()
            return None
        draft = self._judge(now)
        key = draft and (draft.syndrome, draft.scope, draft.culprits)
        count = self._streak[1] + 1 if key == self._streak[0] else 1
        self._streak = (key, count)
        return draft if count >= self._book.limits.ticks else None

    def _clear(self) -> None:
        if self.since is not None:
            self._cut = Cut(self._book, self._checks)
            for rank in self.wanted:
                self._book.ranks[rank].stack = ""
        self.since, self.wanted, self._streak = None, (), (None, 0)

    def patience(self) -> float | None:
        """How long a wait may last; None while nothing is known of this job."""
        limits, peaks, book = self._book.limits, self._pace.peaks, self._book
        if book.top_step < 0:
            return limits.hang_stepless_s
        if not peaks.warm:
            return None
        step = limits.hang_steps * max(self._pace.steps.centre, self._pace.recent)
        known = max(limits.hang_floor_s, step, limits.hang_factor * peaks.centre)
        if not peaks.ready:
            unsure = limits.hang_unsure_s * (1 - len(peaks) / limits.baseline_steps)
            return max(known, unsure, limits.hang_factor * peaks.top)
        return max(known, peaks.centre + limits.hang_mads * peaks.spread)

    def _judge(self, now: float) -> Verdict | None:
        dead = stopped.stopped(self._book, now)
        limit = self.patience()
        least = (limit or self._book.limits.hang_floor_s) / 2
        if not dead and now - self._book.advanced_at < least:
            self.since, self.wanted = None, ()
            return None  # nobody can have waited for so long: a look at ten thousand ranks is not free
        found = stand(self._book, now, least)
        if dead:
            self._suspect(now, found, dead)
            return stopped.of_ranks(self._book, found, dead, 0.98, True, self._lasted(now))
        if limit is None or not found.waiting:
            self.since, self.wanted = None, ()
            return None
        self._suspect(now, found, found.sinks)
        self._cut.prepare(self._bad(found, now), now)
        return self._name(found, now, limit) if found.longest >= limit else None

    def _suspect(self, now: float, found: Standstill, ranks: Sequence[int]) -> None:
        if self.since is None:
            self.since = now - found.longest
        self.wanted = tuple(ranks)[:STACKS]

    def _lasted(self, now: float) -> float:
        return now - self.since if self.since is not None else 0.0

    def _name(self, found: Standstill, now: float, limit: float) -> Verdict | None:
        """Who it is, everything known. None: nobody, or not yet."""
        book, lasted = self._book, self._lasted(now)
        if stopped.excused(book, found, limit):
            return None
        if deaf := stopped.deaf(book, now, found, limit):
            self._suspect(now, found, deaf)
            return stopped.of_ranks(book, found, deaf, 0.9, True, lasted)
        if wrong := desync.mismatch(book, now, found):
            return desync.of_mismatch(book, wrong, lasted)
        bad = self._bad(found, now)
        if found.sinks and not _touch(bad, found.sinks):
            return self._sinks(found, limit, lasted)
        if bad:
            return self._cut.of_bad(bad, now, lasted)
        return self._ring_or_silence(found, now, limit, lasted)

    def _bad(self, found: Standstill, now: float) -> list[Bad]:
        touched = {*found.waiting, *found.owing, *found.unheard}
        return [b for b in self._edges.bad(now) if b.source in touched or b.target in touched]

    def _sinks(self, found: Standstill, limit: float, lasted: float) -> Verdict | None:
        ranks, limits = found.sinks, self._book.limits
        slots = self._book.slots_of(ranks)
        if any(self._busy(rank, limit) for rank in ranks) and found.longest < limits.busy_factor * limit:
            return None
        many = 2 * len(ranks) > len(self._book.ranks) and len(slots) > 1
        return stopped.of_ranks(self._book, found, ranks, 0.5 if many else 0.9, False, lasted)

    def _busy(self, rank: int, limit: float) -> bool:
        """It has computed in the second half of the wait."""
        book = self._book.ranks[rank]
        heard = self._book.slots[book.slot].heard
        return book.idle_since is None or heard - book.idle_since < limit / 2

    def _ring_or_silence(self, found: Standstill, now: float, limit: float, lasted: float) -> Verdict | None:
        book = self._book
        if found.unheard:
            slots = book.slots_of(found.unheard)
            patient = found.longest < book.limits.silent_factor * limit
            return None if patient or len(slots) > 1 else stopped.of_silence(book, slots[0], now, lasted)
        if found.owing and not found.complete:
            if not found.perhaps:
                return desync.of_ring(book, found, lasted)
            if odd := odd_ones(book.ranks[rank] for rank in found.waiting):
                return stopped.of_ranks(book, found, odd, 0.7, False, lasted)
        return self._cut.of_nothing(found, now, lasted)


def _touch(bad: Sequence[Bad], ranks: Sequence[int]) -> bool:
    return any(b.source in ranks or b.target in ranks for b in bad)
