"""Questions to agents and their answers: each asked once, each waited for a bounded time."""

from __future__ import annotations

from typing import TYPE_CHECKING

from stormjib_health.engine.check import check_answer
from stormjib_health.engine.report import Ask
from stormjib_health.wire import Answer, CheckKind

if TYPE_CHECKING:
    from collections.abc import Sequence

    from stormjib_health.engine.thresholds import Thresholds

Pair = tuple[int, int]


class Round:
    """Some questions that belong together."""

    def __init__(self, asks: Sequence[Ask], due: float) -> None:
        self.asks = tuple(asks)
        self.answers: dict[int, Answer] = {}
        self._due = due

    def over(self, now: float) -> bool:
        """All are answered, or no answer is to be expected any more."""
        return len(self.answers) == len(self.asks) or now >= self._due

    def transfers(self) -> dict[Pair, Answer]:
        """Answers by (slot that sends, slot that receives), less those that say nothing of the path."""
        found = {(a.slot, a.peer_slot): self.answers[a.id] for a in self.asks if a.id in self.answers}
        return {pair: answer for pair, answer in found.items() if not answer.turned_away}

    def computes(self) -> dict[int, Answer]:
        """Answers by rank."""
        return {a.rank: self.answers[a.id] for a in self.asks if a.id in self.answers}


class Checks:
    """Numbers the questions and finds the round of an answer."""

    def __init__(self, limits: Thresholds) -> None:
        self._limits = limits
        self._next = 1
        self._new: list[Ask] = []
        self._open: dict[int, tuple[Ask, Round]] = {}

    def transfers(self, pairs: Sequence[Pair], now: float) -> Round:
        """Ask for bursts from the first slot of each pair to the second."""
        limits = self._limits
        wanted = [(CheckKind.TRANSFER, a, b, -1) for a, b in pairs]
        return self._round(wanted, now, limits.check_limit_s, limits.check_slack_s)

    def reaches(self, pairs: Sequence[Pair], now: float) -> Round:
        """The same where something stands: whoever is there answers soon, and whoever is not is not waited for."""
        limits = self._limits
        wanted = [(CheckKind.TRANSFER, a, b, -1) for a, b in pairs]
        return self._round(wanted, now, limits.reach_limit_s, limits.reach_slack_s)

    def computes(self, places: Sequence[tuple[int, int]], now: float) -> Round:
        """Ask for the fixed product on each (rank, slot)."""
        limits = self._limits
        wanted = [(CheckKind.COMPUTE, slot, -1, rank) for rank, slot in places]
        return self._round(wanted, now, limits.check_limit_s, limits.check_slack_s)

    def _round(
        self, wanted: list[tuple[CheckKind, int, int, int]], now: float, limit: float, slack: float
    ) -> Round:
        asks = [Ask(self._next + i, *what, limit_s=limit) for i, what in enumerate(wanted)]
        self._next += len(asks)
        round = Round(asks, now + limit + slack)
        self._new += asks
        self._open.update((ask.id, (ask, round)) for ask in asks)
        return round

    def answered(self, slot: int, answer: Answer) -> None:
        """Take an answer; one that nobody asked this slot for is ignored. Raises Malformed."""
        check_answer(answer)
        ask, round = self._open.get(answer.id, (None, None))
        if ask is not None and round is not None and ask.slot == slot:
            round.answers[answer.id] = answer
            del self._open[answer.id]

    def new(self) -> tuple[Ask, ...]:
        """What was asked since the last call."""
        asks, self._new = tuple(self._new), []
        return asks

    def drop(self, round: Round) -> None:
        """Nobody waits for this one any more."""
        for ask in round.asks:
            self._open.pop(ask.id, None)
