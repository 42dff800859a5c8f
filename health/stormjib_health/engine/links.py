"""Nobody comes late, and the job is slow: which connection, which node's side of it, or all of them?"""

from __future__ import annotations

from typing import TYPE_CHECKING

from stormjib_health.engine import corners, words
from stormjib_health.engine.corners import Outcome, Part
from stormjib_health.engine.edges import cover, log_heat
from stormjib_health.wire import Evidence, Scope, Syndrome, Verdict

if TYPE_CHECKING:
    from collections.abc import Sequence

    from stormjib_health.engine.book import Book
    from stormjib_health.engine.checks import Checks, Round
    from stormjib_health.engine.edges import Edges, Heat
    from stormjib_health.engine.pace import Pace

SLOW = Syndrome.COMMUNICATION_SLOW

BOTH_WAYS = 1.3
"""Factors of the two directions of one link that differ by less are alike."""


class Links:
    """One slowdown's look at the connections, with the bursts that it asks for."""

    def __init__(self, book: Book, edges: Edges, pace: Pace, checks: Checks) -> None:
        self._book, self._edges, self._pace, self._checks = book, edges, pace, checks
        self._corners: corners.Corners | None = None
        self._round: Round | None = None
        self._suspect: Heat | None = None
        self._hot: list[Heat] = []
        self.nothing = False
        """The newest look found no hot connection."""

    @property
    def asking(self) -> bool:
        """Answers are awaited."""
        return self._round is not None

    def look(self, now: float) -> Verdict | None:
        """What the connections say themselves, then, once bursts have run, what those say; None where nothing is new."""
        if self._round is not None:
            return self._judge(now) if self._round.over(now) else None
        hot, total = self._edges.heats()
        self.nothing = not hot
        if not hot:
            return None
        pairs = [(*self._ends(heat), log_heat(heat.factor)) for heat in hot]
        best, part, _ = cover(pairs)
        if part < self._book.limits.node_part and len(hot) > self._book.limits.crowd * total:
            return self._congestion(
                hot, f"{len(hot)} of {total} connections take longer for the same bytes", 0.8, now
            )
        if self._both_ways(hot):
            return self._congestion(hot, "the one link of the job takes longer, both ways alike", 0.5, now)
        self._ask(hot, best if part >= self._book.limits.node_part else -1, now)
        return self._passive([], now)

    def accuse(self, slot: int) -> bool:
        """Most of the heat touches this slot."""
        hot, _ = self._edges.heats()
        mine = sum(log_heat(heat.factor) for heat in hot if slot in self._ends(heat))
        return bool(hot) and mine >= self._book.limits.node_part * sum(log_heat(heat.factor) for heat in hot)

    def _both_ways(self, hot: Sequence[Heat]) -> bool:
        """Of two nodes, neither can be told from the other or from what lies between."""
        factors = [heat.factor for heat in hot]
        alike = max(factors) < BOTH_WAYS * min(factors)
        return len(self._book.slots) == 2 and len({heat.source for heat in hot}) > 1 and alike

    def _ends(self, heat: Heat) -> tuple[int, int]:
        return self._book.slot_of[heat.source], self._book.slot_of[heat.target]

    def _ask(self, hot: list[Heat], best: int, now: float) -> None:
        """Bursts on the hottest connection of the suspect node, and round it."""
        touching = [heat for heat in hot if best < 0 or best in self._ends(heat)]
        self._suspect, self._hot = max(touching, key=lambda heat: heat.factor), hot
        a, b = self._ends(self._suspect)
        warm = {slot for heat in hot for slot in self._ends(heat)}
        slots = sorted(self._book.slots, key=lambda slot: (slot in warm, slot))
        healthy = [slot for slot in slots if not self._book.slots[slot].quiet]
        self._corners = corners.choose(a, b, healthy)
        self._round = self._checks.transfers(self._corners.pairs(), now)

    def _judge(self, now: float) -> Verdict | None:
        assert self._round is not None
        assert self._corners is not None
        assert self._suspect is not None
        round, self._round = self._round, None
        outcome = corners.judge(self._corners, round.transfers(), self._book.limits)
        rows = self._rows(round)
        if outcome.part in (Part.SENDER, Part.RECEIVER):
            slot = self._corners.a if outcome.part is Part.SENDER else self._corners.b
            return self._node(slot, outcome, rows, now)
        if outcome.part is Part.LINK:
            return self._link(self._suspect, outcome.sure, outcome.sure > 0.5, rows, now)
        if outcome.part is Part.UNKNOWN:
            return self._passive(rows, now)
        if outcome.part is Part.FABRIC:
            return self._congestion(self._hot, "bursts between healthy nodes are slow as well", 0.8, now)
        return self._clear(now)

    def _clear(self, now: float) -> Verdict | None:
        return self._congestion(self._hot, "connections take longer, and bursts on them do not", 0.4, now)

    def _passive(self, rows: list[Evidence], now: float) -> Verdict:
        """No burst says more: what the connections themselves say, and less sure."""
        assert self._suspect is not None
        best, part, peers = cover([(*self._ends(heat), log_heat(heat.factor)) for heat in self._hot])
        if peers >= 2 and part >= self._book.limits.node_part:
            return self._node(best, Outcome(Part.UNKNOWN, 0.5), rows, now)
        return self._link(self._suspect, 0.4, False, rows, now)

    def _node(self, slot: int, outcome: Outcome, rows: list[Evidence], now: float) -> Verdict:
        known = outcome.part is not Part.UNKNOWN
        side = outcome.part.value if known else "one side"
        return self._verdict(
            SLOW,
            Scope.NODE,
            (slot,),
            outcome.sure,
            f"{side} of slot {slot} is slow, to every peer",
            rows,
            now,
            known,
        )

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
        assert self._suspect is not None
        edge = self._suspect.end.newest
        who = words.arrow(self._suspect.source, self._suspect.target)
        rows = [
            Evidence(
                "step",
                "job",
                words.milliseconds(self._pace.recent),
                words.milliseconds(self._pace.steps.centre),
            ),
            Evidence("time per byte", who, f"{self._suspect.factor:.1f} x", "1 before"),
            Evidence("round trip", who, words.milliseconds(edge.rtt_s)),
        ]
        for (a, b), answer in round.transfers().items():
            took = words.milliseconds(answer.seconds) if answer.ok else f"failed: {answer.text[:60]}"
            rows.append(Evidence("burst", f"slot {a} -> slot {b}", took))
        return rows
