"""Verdicts on connections that stand, all ranks having entered the call: which link, or which node."""

from __future__ import annotations

from typing import TYPE_CHECKING

from stormjib_health.engine import sweep, words
from stormjib_health.engine.edges import cover
from stormjib_health.engine.sweep import Part
from stormjib_health.verdict import Evidence, Scope, Syndrome, Verdict

if TYPE_CHECKING:
    from collections.abc import Sequence

    from stormjib_health.engine.book import Book
    from stormjib_health.engine.checks import Checks, Round
    from stormjib_health.engine.edges import Bad
    from stormjib_health.engine.graph import Standstill

HANG = Syndrome.COMMUNICATION_HANG
SWEEP = 16
"""Pairs of slots to try where no connection shows anything."""


class Cut:
    """What a hang in the network is put down to, and the checks that make it sure. One a trouble."""

    def __init__(self, book: Book, checks: Checks) -> None:
        self._book = book
        self._checks = checks
        self._round: Round | None = None
        self._sweep: Round | None = None

    def prepare(self, bad: Sequence[Bad], now: float) -> None:
        """Connections begin to stand: ask for bursts round the worst of them, so that their answers are there when it is called a hang.
        Between two slots alone they would tell nothing."""
        healthy = [slot for slot in sorted(self._book.slots) if self._heard(slot, now)]
        if bad and self._round is None and len(healthy) > 2:
            worst = max(bad, key=lambda b: b.weight)
            self._round = self._checks.reaches(sweep.pairs([self._ends(worst)], healthy), now)

    def _ends(self, bad: Bad) -> tuple[int, int]:
        return self._book.slot_of[bad.source], self._book.slot_of[bad.target]

    def of_bad(self, bad: Sequence[Bad], now: float, lasted_s: float) -> Verdict | None:
        """The node that touches the bad connections, or the one link. None while bursts may yet tell these apart."""
        pairs = [self._ends(b) for b in bad]
        apart = {(min(a, b), max(a, b)) for a, b in pairs if a != b}
        best, part, peers = cover([(a, b, 1.0) for a, b in apart])
        rows = [_row(b) for b in bad]
        if peers >= 2 and part >= self._book.limits.node_part:
            sentence = f"slot {best} reaches none of {peers} others: nothing that it sends or is sent arrives"
            return self._node(best, 0.9, sentence, rows, False, lasted_s)
        if len(apart) > 1:
            sentence = f"{len(apart)} links of the job stand and no single node explains them"
            return words.verdict(
                self._book,
                HANG,
                Scope.JOB,
                (),
                confidence=0.5,
                sentence=sentence,
                evidence=rows,
                lasted_s=lasted_s,
            )
        return self._one(max(bad, key=lambda b: b.weight), rows, now, lasted_s)

    def _one(self, bad: Bad, rows: list[Evidence], now: float, lasted_s: float) -> Verdict | None:
        a, b = self._ends(bad)
        quiet = [slot for slot in (a, b) if not self._heard(slot, now)]
        if len(quiet) == 1:
            sentence = f"nothing reaches slot {quiet[0]}, and its agent is silent"
            return self._node(quiet[0], 0.8, sentence, rows, False, lasted_s)
        if self._round is not None and not self._round.over(now):
            return None
        answers = self._round.transfers() if self._round is not None else {}
        rows = [*rows, *sweep.rows(answers)]
        outcome = sweep.judge_reach(answers, self._book.limits) if answers else None
        if outcome and outcome.part is Part.NODE and outcome.slots[0] in (a, b):
            sentence = f"slot {outcome.slots[0]} fails at {outcome.side} bursts, with whomever"
            return self._node(outcome.slots[0], outcome.sure, sentence, rows, True, lasted_s)
        sure, confirmed = 0.7, False
        if outcome and outcome.part is Part.LINK and set(outcome.slots) == {a, b}:
            sure, confirmed = outcome.sure, outcome.sure > 0.6
        elif outcome and outcome.part is Part.NOTHING:
            sure = 0.5
        sentence = f"what rank {bad.source} sends to rank {bad.target} is not acknowledged; all ranks have entered the call"
        return words.verdict(
            self._book, HANG, Scope.LINK, (bad.source, bad.target), confidence=sure, confirmed=confirmed,
            sentence=sentence, evidence=rows, lasted_s=lasted_s,
        )  # fmt: skip

    def of_nothing(self, found: Standstill, now: float, lasted_s: float) -> Verdict | None:
        """No connection shows anything: try the links of the group, then say that nobody is known. None: not yet."""
        ranks = [rank.rank for rank in self._book.members(found.complete[0])] if found.complete else []
        slots = self._book.slots_of(ranks)
        if self._sweep is None and len(slots) > 1:
            ring = list(zip(slots, (*slots[1:], slots[0]), strict=True))[:SWEEP]
            self._sweep = self._checks.transfers(list(dict.fromkeys(ring)), now)
        if self._sweep is not None and not self._sweep.over(now):
            return None
        failed = [
            pair for pair, answer in (self._sweep.transfers() if self._sweep else {}).items() if not answer.ok
        ]
        return self._of_failed(failed, lasted_s) or self._unknown(found, lasted_s)

    def _of_failed(self, failed: Sequence[tuple[int, int]], lasted_s: float) -> Verdict | None:
        best, part, peers = cover([(a, b, 1.0) for a, b in failed])
        if peers < 2 or part < self._book.limits.node_part:
            return None
        rows = [Evidence("burst", f"slot {a} -> slot {b}", "failed") for a, b in failed]
        return self._node(
            best, 0.8, f"bursts from and to slot {best} do not get through", rows, True, lasted_s
        )

    def _unknown(self, found: Standstill, lasted_s: float) -> Verdict:
        group = self._book.name(found.complete[0]) if found.complete else "the job"
        return words.verdict(
            self._book, HANG, Scope.JOB, (), confidence=0.3, lasted_s=lasted_s,
            sentence=f"every rank has entered the call of {group} and none comes out; no connection, process or check says why",
            evidence=[Evidence("longest wait", "all", f"{found.longest:.2f} s")],
        )  # fmt: skip

    def _node(
        self, slot: int, sure: float, sentence: str, rows: list[Evidence], confirmed: bool, lasted_s: float
    ) -> Verdict:
        return words.verdict(
            self._book, HANG, Scope.NODE, (slot,), confidence=sure, confirmed=confirmed, sentence=sentence,
            evidence=rows, lasted_s=lasted_s,
        )  # fmt: skip

    def _heard(self, slot: int, now: float) -> bool:
        return any(self._book.fresh(rank, now) for rank in self._book.slots[slot].ranks.values())


def _row(bad: Bad) -> Evidence:
    edge = bad.end.newest
    value = f"{edge.unacked} unacknowledged, {edge.backoff} timeouts, last word {edge.last_ack_s:.1f} s ago"
    return Evidence("in flight", words.arrow(bad.source, bad.target), value, "0 unacknowledged")
