"""Nobody comes late, and the job is slow: which connection, which node's side of it, or all of them?"""

from __future__ import annotations

from typing import TYPE_CHECKING

from stormjib_health.engine import sweep, words
from stormjib_health.engine.edges import cover, log_heat
from stormjib_health.engine.sweep import Outcome, Part
from stormjib_health.verdict import Evidence, Scope, Syndrome, Verdict

if TYPE_CHECKING:
    from collections.abc import Sequence

    from stormjib_health.engine.book import Book
    from stormjib_health.engine.checks import Checks, Round
    from stormjib_health.engine.edges import Edges, Heat
    from stormjib_health.engine.pace import Pace
    from stormjib_health.engine.usual import Usual

SLOW = Syndrome.COMMUNICATION_SLOW
MOST_DOUBLED = 6
"""Then the wait for the next round grows no more."""


class Links:
    """One slowdown's look at the connections, with the bursts that it asks for."""

    def __init__(self, book: Book, edges: Edges, pace: Pace, checks: Checks, usual: Usual) -> None:
        self._book, self._edges, self._pace, self._checks = book, edges, pace, checks
        self._usual = usual
        self._round: Round | None = None
        self._hot: list[Heat] = []
        """The hottest first."""
        self._next = 0
        """Step of the slowdown from which bursts may be asked for again."""
        self._said: list[Outcome] = []
        """What the bursts have said so far."""
        self.nothing = False
        """The newest look found no hot connection."""

    @property
    def asking(self) -> bool:
        """Answers are awaited."""
        return self._round is not None

    def look(self, now: float) -> Verdict | None:
        """What the connections say themselves, then, once bursts have run, what those say; None where nothing is new."""
        if self._round is not None:
            return self._judge(self._round, now) if self._round.over(now) else None
        limits = self._book.limits
        if self._pace.steps_since < self._next or self._pace.severity < limits.comm_ratio:
            return None
        hot, total = self._heats()
        self.nothing = not hot
        if not hot:
            return None
        self._ask(hot, now)
        part = cover([(*self._ends(heat), log_heat(heat.factor)) for heat in hot])[1]
        if part < limits.node_part and len(hot) > limits.crowd * total:
            words_ = f"{len(hot)} of {total} connections take longer for the same bytes"
            return self._congestion(hot, words_, 0.5, now)
        return self._passive([], now)

    def _heats(self) -> tuple[list[Heat], int]:
        """Hot connections that can explain the slowdown, the hottest first; and how many there are at all."""
        hot, total = self._edges.heats()
        pace = self._pace
        least = self._book.limits.hot_part * pace.excess / pace.recent if pace.recent else 0.0
        explaining = [heat for heat in hot if heat.lost >= least]
        return sorted(explaining, key=lambda heat: heat.factor, reverse=True), total

    def accuse(self, slot: int) -> bool:
        """Most of the heat touches this slot."""
        hot, _ = self._heats()
        mine = sum(log_heat(heat.factor) for heat in hot if slot in self._ends(heat))
        return bool(hot) and mine >= self._book.limits.node_part * sum(log_heat(heat.factor) for heat in hot)

    def _ends(self, heat: Heat) -> tuple[int, int]:
        return self._book.slot_of[heat.source], self._book.slot_of[heat.target]

    def _ask(self, hot: list[Heat], now: float) -> None:
        """Bursts on the hottest links and round the first of them; ever more seldom, because a slowdown may last."""
        limits = self._book.limits
        self._hot = hot
        self._next = self._pace.steps_since + limits.sweep_steps * 2 ** min(len(self._said), MOST_DOUBLED)
        healthy = [slot for slot in sorted(self._book.slots) if not self._book.slots[slot].quiet]
        pairs = sweep.pairs([self._ends(heat) for heat in hot], healthy)
        self._round = self._checks.transfers(pairs, now)

    def _judge(self, round: Round, now: float) -> Verdict | None:
        """What this round of bursts says. A named culprit is sure once two rounds in a row name it: one may have met a busy
        processor."""
        self._round = None
        outcome = sweep.judge(
            round.transfers(), self._book.limits, self._lost_per_byte(), self._usual.per_byte()
        )
        again = bool(self._said) and sweep.agree(self._said[-1], outcome)
        self._said.append(outcome)
        rows = self._rows(round)
        if outcome.part is Part.UNKNOWN:
            return self._passive(rows, now)
        if outcome.part is Part.FABRIC:
            return self._congestion(self._hot, "bursts between most nodes are slow", 0.8, now)
        if outcome.part is Part.NOTHING:
            return self._congestion(
                self._hot, "connections take longer, and no burst is slower than others", 0.4, now
            )
        if not again and len(self._said) < self._book.limits.sweeps:
            self._ask(self._hot, now)  # at once
        return self._named(outcome, rows, outcome.sure if again else 0.5, now)

    def _lost_per_byte(self) -> float:
        """Seconds that a byte on the busiest hot connection must lose for a good part of what a step loses."""
        pace = self._pace
        rate = max(heat.end.rate for heat in self._hot)
        return (
            self._book.limits.hot_part * pace.excess / (rate * pace.recent) if rate * pace.recent > 0 else 0.0
        )

    def _named(self, outcome: Outcome, rows: list[Evidence], sure: float, now: float) -> Verdict:
        confirmed = sure > 0.6
        if outcome.part is Part.NODE:
            sentence = f"slot {outcome.slots[0]} is slow at {outcome.side}, with every peer"
            return self._node(outcome.slots[0], sure, sentence, rows, now, confirmed)
        return self._link(self._on(outcome.slots), sure, confirmed, rows, now)

    def _on(self, link: Sequence[int]) -> Heat:
        """The hottest connection of a link, in the direction that the bursts found slower if there is one."""
        same = [heat for heat in self._hot if set(self._ends(heat)) == set(link)]
        return max(same or self._hot, key=lambda heat: (self._ends(heat) == tuple(link), heat.factor))

    def _passive(self, rows: list[Evidence], now: float) -> Verdict:
        """No burst says more: what the connections themselves say, and less sure."""
        best, part, peers = cover([(*self._ends(heat), log_heat(heat.factor)) for heat in self._hot])
        if peers >= 2 and part >= self._book.limits.node_part:
            return self._node(best, 0.5, f"slot {best} is slow, with every peer", rows, now, False)
        return self._link(self._hot[0], 0.4, False, rows, now)

    def _node(
        self, slot: int, sure: float, sentence: str, rows: list[Evidence], now: float, confirmed: bool
    ) -> Verdict:
        return self._verdict(SLOW, Scope.NODE, (slot,), sure, sentence, rows, now, confirmed)

    def _link(self, heat: Heat, sure: float, confirmed: bool, rows: list[Evidence], now: float) -> Verdict:
        sentence = (
            f"what rank {heat.source} sends to rank {heat.target} takes {heat.factor:.1f} times as long"
        )
        return self._verdict(
            SLOW, Scope.LINK, (heat.source, heat.target), sure, sentence, rows, now, confirmed
        )

    def _congestion(self, hot: Sequence[Heat], sentence: str, sure: float, now: float) -> Verdict:
        rows = [words.arrow(h.source, h.target) for h in hot[: words.ROWS]]
        factors = [
            Evidence("time per byte", who, f"{h.factor:.1f} x") for who, h in zip(rows, hot, strict=False)
        ]
        return self._verdict(Syndrome.CONGESTION, Scope.JOB, (), sure, sentence, factors, now, False)

    def _verdict(
        self, syndrome: Syndrome, scope: Scope, culprits: tuple[int, ...], sure: float, sentence: str,
        rows: list[Evidence], now: float, confirmed: bool,
    ) -> Verdict:  # fmt: skip
        pace = self._pace
        return words.verdict(
            self._book, syndrome, scope, culprits, confidence=sure, confirmed=confirmed, severity=pace.severity,
            sentence=f"{sentence}; steps last {pace.severity:.2f} times what they did", evidence=rows,
            lasted_s=now - (pace.since or now),
        )  # fmt: skip

    def _rows(self, round: Round) -> list[Evidence]:
        hottest = self._hot[0]
        who = words.arrow(hottest.source, hottest.target)
        rows = [
            Evidence(
                "step",
                "job",
                words.milliseconds(self._pace.recent),
                words.milliseconds(self._pace.steps.centre),
            ),
            Evidence("time per byte", who, f"{hottest.factor:.1f} x", "1 before"),
            Evidence("round trip", who, words.milliseconds(hottest.end.newest.rtt_s)),
        ]
        return [*rows, *sweep.rows(round.transfers())]
