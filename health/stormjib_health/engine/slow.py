"""R2: the job steps more slowly than it did. A rank that comes late, a connection, everything, or somebody else each time?"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import TYPE_CHECKING

from stormjib_health.engine import words
from stormjib_health.engine.baseline import chance, median
from stormjib_health.engine.links import Links
from stormjib_health.engine.product import confirm_compute, took
from stormjib_health.engine.usual import Usual
from stormjib_health.verdict import Evidence, Scope, Syndrome, Verdict
from stormjib_health.wire import Phase

if TYPE_CHECKING:
    from collections import Counter
    from collections.abc import Sequence

    from stormjib_health.engine.book import Book
    from stormjib_health.engine.checks import Checks, Round
    from stormjib_health.engine.edges import Edges
    from stormjib_health.engine.late import Blame, Late
    from stormjib_health.engine.own import Growth, Own
    from stormjib_health.engine.pace import Pace

SLOW = Syndrome.NON_COMMUNICATION_SLOW
LOOK_BACK = 12
"""Calls that are told apart by chance: more would not make it surer, because they are not independent."""


class Slow:
    """Explains a slowdown that the pace shows, once, and keeps to it until the slowdown ends."""

    def __init__(self, book: Book, edges: Edges, pace: Pace, late: Late, own: Own, checks: Checks) -> None:
        self._book, self._edges, self._pace, self._late, self._checks = book, edges, pace, late, checks
        self._own = own
        self._usual = Usual(book, pace, checks)
        self._clear()

    def _clear(self) -> None:
        self._links = Links(self._book, self._edges, self._pace, self._checks, self._usual)
        self._verdict: Verdict | None = None
        self._round: Round | None = None
        self._looked = -1

    def look(self, now: float) -> Verdict | None:
        """The verdict on the slowdown; None while there is none, or nothing explains it yet."""
        pace = self._pace
        self._usual.look(now)
        if not pace.slow:
            self._clear()
            return None
        if not pace.above:
            return None  # it pauses, or is over before its cause was found: nothing is slow that could be explained now
        if self._links.asking:
            self._verdict = self._links.look(now) or self._verdict
        elif self._open_question() and pace.steps_since >= self._book.limits.patience_steps:
            self._verdict = self._explain(now) or self._verdict
        note = self._verdict is None or self._verdict.scope is Scope.JOB
        if note and pace.steps_since > self._book.limits.give_up_steps:
            pace.give_up()
        return self._updated(now)

    def _open_question(self) -> bool:
        """Nobody is named yet, or not surely: chance may explain it, or something better come."""
        said = self._verdict
        return said is None or said.scope is Scope.JOB or said.confidence < self._book.limits.act_confidence

    def _explain(self, now: float) -> Verdict | None:
        """A new look with each new step. What a rank's own host says comes first: no other rank has a part in it."""
        if self._looked == self._pace.steps_since:
            return None
        self._looked = self._pace.steps_since
        limits, since, excess = self._book.limits, self._pace.since or 0.0, self._pace.excess
        blame = self._late.blame(since, limits.late_least * excess)
        growth = self._own.growth(since, limits.own_part * excess)
        crowd = self._crowd(blame)
        if throttled := self._throttled():
            return self._of_ranks(blame, growth, throttled, 0.9, now)
        if named := self._grown(growth):
            return self._of_suspect(blame, growth, named, now)
        if self._leads(growth):
            return self._imbalance(blame, growth, now)  # it wants to be seen more often
        if self._inherited(growth, crowd):
            return self._links.look(now)
        if named := self._late_ranks(blame, crowd):
            return self._of_suspect(blame, growth, named, now)
        if len(self._book.slots_of(crowd)) == 1:
            return self._imbalance(blame, growth, now)  # so does this
        found = self._links.look(now)
        return found or (self._imbalance(blame, growth, now) if self._links.nothing else None)

    # --- the processor, and own work ---

    def _throttled(self) -> list[int]:
        """Ranks of one slot whose processor is refused more often than it was, and more than anybody else's."""
        more = {rank.rank: rank.throttled - rank.throttled_usually for rank in self._book.ranks.values()}
        top = max(more.values())
        if top < self._book.limits.throttled_least:
            return []
        crowd = sorted(rank for rank, part in more.items() if part > top / 3)
        return crowd if len(self._book.slots_of(crowd)) == 1 < len(self._book.slots) else []

    def _leads(self, growth: Growth) -> list[int]:
        """Ranks of one slot whose own work has grown far more than all others', by some part of the lost time."""
        limits = self._book.limits
        first = max(growth.more.values(), default=0.0)
        if first <= limits.own_part * self._pace.excess:
            return []
        crowd = sorted(rank for rank, more in growth.more.items() if more > first / limits.own_lead)
        grown = all(growth.ratio[rank] >= limits.own_ratio for rank in crowd)
        grown &= all(growth.more[rank] > limits.noises * growth.noise[rank] for rank in crowd)
        return crowd if grown and len(self._book.slots_of(crowd)) == 1 else []

    def _grown(self, growth: Growth) -> tuple[Sequence[int], float] | None:
        """The same, and not by chance."""
        ranks = self._leads(growth)
        luck = self._luck_of(growth.most, ranks, len(self._book.ranks)) if ranks else 1.0
        return self._surely(ranks, luck)

    # --- lateness ---

    def _crowd(self, blame: Blame) -> list[int]:
        """Ranks that are late by more than half of what the latest is; none where lateness explains too little."""
        limits = self._book.limits
        most = max(blame.late.values(), default=0.0)
        if most <= 0 or most < limits.late_part * self._pace.excess:
            return []
        crowd = sorted(rank for rank, late in blame.late.items() if late > most / limits.late_lead)
        noisy = any(blame.late[rank] <= limits.noises * math.sqrt(blame.noise[rank]) for rank in crowd)
        return [] if noisy else crowd

    def _inherited(self, growth: Growth, crowd: Sequence[int]) -> bool:
        """Late, but not by its own work, and its node's connections are hot: it waited in calls that are not timed."""
        grown = any(growth.ratio.get(rank, 1.0) >= self._book.limits.own_ratio for rank in crowd)
        slots = self._book.slots_of(crowd)
        return len(slots) == 1 and not grown and self._links.accuse(slots[0])

    def _late_ranks(self, blame: Blame, crowd: Sequence[int]) -> tuple[Sequence[int], float] | None:
        slots = self._book.slots_of(crowd)
        return self._surely(crowd, self._luck(blame, crowd)) if len(slots) == 1 else None

    def _surely(self, ranks: Sequence[int], luck: float) -> tuple[Sequence[int], float] | None:
        """How sure that is, after so much luck: a hint may still be taken back."""
        limits = self._book.limits
        return None if luck > limits.hint_chance else (ranks, 0.8 if luck <= limits.late_chance else 0.5)

    def _luck(self, blame: Blame, ranks: Sequence[int]) -> float:
        """How likely the same ones would be last so often in some group, were they drawn anew each step."""
        groups = self._book.groups
        found = (self._luck_of(last, ranks, len(groups[key].ranks)) for key, last in blame.last.items())
        return min(found, default=1.0)

    def _luck_of(self, counts: Counter[int], ranks: Sequence[int], size: int) -> float:
        limits, total = self._book.limits, counts.total()
        hits = sum(counts[rank] for rank in ranks)
        of = min(total, self._pace.steps_since, LOOK_BACK)
        if of < limits.late_steps or hits < limits.late_share * total:
            return 1.0
        return chance(int(of * hits / total), of, max(2, round(size / len(ranks))))

    def _imbalance(self, blame: Blame, growth: Growth, now: float) -> Verdict | None:
        limits, pace = self._book.limits, self._pace
        counts = [last for last in (*blame.last.values(), growth.most) if last]
        share = max((last.most_common(1)[0][1] / last.total() for last in counts), default=1.0)
        explained = max(blame.longest, growth.longest) >= limits.late_part * pace.excess
        if pace.steps_since < limits.rotating_steps or share >= limits.rotating_share or not explained:
            return None
        return words.verdict(
            self._book, Syndrome.IMBALANCE, Scope.JOB, (), confidence=0.8, severity=pace.severity,
            lasted_s=now - (pace.since or now),
            sentence=f"steps last {pace.severity:.2f} times what they did, and another rank is last each time",
            evidence=[Evidence("share of the most frequent last rank", "job", f"{share:.0%}", "75 % name a rank")],
        )  # fmt: skip

    # --- the verdict ---

    def _of_suspect(
        self, blame: Blame, growth: Growth, named: tuple[Sequence[int], float], now: float
    ) -> Verdict:
        """The verdict on ranks that a fixed product may clear. It says nothing where the processor is busy with others."""
        ranks, sure = named
        if self._queues(ranks, self._each(blame, growth, ranks[0])):
            self._forget_product()  # it runs on the busy processor, too
            lasting = now - (self._pace.since or now) >= self._book.limits.queued_s
            return self._of_ranks(blame, growth, ranks, sure if lasting else min(sure, 0.5), now)
        self._ask(ranks, now)
        return self._of_ranks(blame, growth, ranks, sure, now)

    def _forget_product(self) -> None:
        if self._round is not None:
            self._checks.drop(self._round)
            self._round = None

    def _queues(self, ranks: Sequence[int], each: float) -> bool:
        """Whether they are late because they wait for a processor, and the others do not."""
        since = self._pace.since or 0.0
        waits = {rank: book.queued_since(since) for rank, book in self._book.ranks.items()}
        usual = median([wait for rank, wait in waits.items() if rank not in ranks] or [0.0])
        return waits[ranks[0]] - usual >= self._book.limits.queued_part * each * self._pace.steps_since

    def _each(self, blame: Blame, growth: Growth, rank: int) -> float:
        """What this rank costs the others a step."""
        return max(0.0, blame.late.get(rank, 0.0), growth.more.get(rank, 0.0))

    def _of_ranks(
        self, blame: Blame, growth: Growth, ranks: Sequence[int], sure: float, now: float
    ) -> Verdict:
        book, pace = self._book, self._pace
        slots = book.slots_of(ranks)
        node = len(slots) == 1 and len(ranks) > 1
        each = self._each(blame, growth, ranks[0])
        sentence = (
            f"{words.rank_list(ranks)} keeps the others waiting, by {words.milliseconds(each)} a step{self._why(ranks, each)}; "
            f"steps last {pace.severity:.2f} times what they did"
        )
        return words.verdict(
            book, SLOW, Scope.NODE if node else Scope.RANK, slots if node else tuple(ranks), confidence=sure,
            severity=pace.severity, lasted_s=now - (pace.since or now), sentence=sentence,
            evidence=self._rows(blame, growth, ranks),
        )  # fmt: skip

    def _why(self, ranks: Sequence[int], each: float) -> str:
        rank = self._book.ranks[ranks[0]]
        if rank.throttled - rank.throttled_usually >= self._book.limits.throttled_least:
            return f" (its processor is refused {rank.throttled:.0%} of the time)"
        if self._queues(ranks, each):
            return " (its processor is busy with others)"
        return " (it waits for its data)" if rank.phase == Phase.DATA else ""

    def _rows(self, blame: Blame, growth: Growth, ranks: Sequence[int]) -> list[Evidence]:
        others = [late for rank, late in blame.late.items() if rank not in ranks]
        rows = [words_step(self._pace)]
        for rank in ranks[:3]:
            late = words.milliseconds(max(0.0, blame.late.get(rank, 0.0)))
            rest = words.milliseconds(max(0.0, max(others, default=0.0)))
            rows.append(Evidence("late a step", f"rank {rank}", late, rest))
            rows.append(
                Evidence("own work", f"rank {rank}", f"{growth.ratio.get(rank, 1.0):.2f}", "1 before")
            )
        return rows

    def _ask(self, ranks: Sequence[int], now: float) -> None:
        """The fixed product on the suspect and on somebody of another slot."""
        suspect = ranks[0]
        slot_of = self._book.slot_of
        other = next(
            (rank for rank in slot_of if slot_of[rank] != slot_of[suspect] and rank not in ranks), None
        )
        if other is not None and self._round is None:
            self._round = self._checks.computes([(rank, slot_of[rank]) for rank in (suspect, other)], now)

    def _updated(self, now: float) -> Verdict | None:
        if self._verdict is None:
            return None
        if self._round is not None and self._round.over(now):
            self._verdict = self._confirmed(self._verdict, self._round)
            self._round = None
        return replace(self._verdict, severity=round(self._pace.severity, 3))

    def _confirmed(self, verdict: Verdict, done: Round) -> Verdict:
        answers = done.computes()
        suspect, other = (answers.get(ask.rank) for ask in done.asks)
        ratio = max(self._book.limits.compute_ratio, 1 + (verdict.severity - 1) / 2)
        says = confirm_compute(suspect, other, ratio)
        if says is None or suspect is None or other is None:
            return verdict
        row = Evidence("fixed product", f"rank {done.asks[0].rank}", words.milliseconds(took(suspect)), words.milliseconds(took(other)))  # fmt: skip
        sure = 0.95 if says else min(0.6, verdict.confidence)
        return replace(
            verdict, confidence=sure, confirmed=says, evidence=(*verdict.evidence, row)[: words.ROWS]
        )


def words_step(pace: Pace) -> Evidence:
    """Step time now and before."""
    return Evidence("step", "job", words.milliseconds(pace.recent), words.milliseconds(pace.steps.centre))
