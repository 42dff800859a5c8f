"""One generation's judge: takes what agents say, and at each look answers with verdicts, questions and wishes."""

from __future__ import annotations

from typing import TYPE_CHECKING

from stormjib_health.engine.book import Book
from stormjib_health.engine.checks import Checks
from stormjib_health.engine.corrupt import Corrupt
from stormjib_health.engine.crash import Crash
from stormjib_health.engine.edges import Edges
from stormjib_health.engine.hang import Hang
from stormjib_health.engine.late import Late
from stormjib_health.engine.ledger import Ledger
from stormjib_health.engine.own import Own
from stormjib_health.engine.pace import Pace
from stormjib_health.engine.report import Findings, Malformed
from stormjib_health.engine.slow import Slow
from stormjib_health.engine.thresholds import DEFAULT, Thresholds

if TYPE_CHECKING:
    from collections.abc import Sequence

    from stormjib_health.engine.report import Place
    from stormjib_health.verdict import Verdict
    from stormjib_health.wire import Answer, Sample


class Engine:
    """Mutable inside, and without a clock: `now` is the caller's monotonic seconds, and never goes back.

    Call `tick` about every 100 ms. A hole of 2 s between two calls says that the caller itself was stopped.
    """

    def __init__(self, places: Sequence[Place], thresholds: Thresholds = DEFAULT, now: float = 0.0) -> None:
        self._limits = thresholds
        self._book = Book(places, thresholds, now)
        self._edges = Edges(self._book.slot_of, thresholds)
        self._checks = Checks(thresholds)
        self._pace = Pace(self._book)
        self._late = Late(self._book)
        self._own = Own(self._book)
        self._corrupt = Corrupt(self._book)
        self._crash = Crash(self._book, self._edges)
        self._hang = Hang(self._book, self._edges, self._pace, self._checks)
        self._slow = Slow(self._book, self._edges, self._pace, self._late, self._own, self._checks)
        self._ledger = Ledger()

    # --- in ---

    def observe(self, sample: Sample, now: float) -> None:
        """Take one sample of this generation. Raises Malformed, and then has taken nothing that was judged.

        A sample that is older than one already taken is ignored.
        """
        self._book.clock(now)
        if not self._book.take(sample, now):
            return
        frozen = self._pace.uneasy or self._hang.since is not None
        self._edges.frozen = self._late.frozen = self._own.frozen = frozen
        self._edges.take(sample, now)
        self._corrupt.take(sample.findings, now)
        for seen in sample.ranks:
            if seen.timings:
                self._late.take(seen.rank, seen.timings, now)
            if seen.steps_s:
                self._pace.take(seen, now)
                self._own.take(seen, now)

    def exited(self, rank: int, code: int, last_lines: str, now: float) -> None:
        """A rank has ended, though nobody told it to. `code` as `wait` gives it: negative for a signal."""
        self._book.clock(now)
        if rank not in self._book.ranks:
            raise Malformed(f"rank is {rank}; this generation has {len(self._book.ranks)} ranks")
        self._crash.take(rank, code, last_lines, now)

    def silent(self, slot: int, now: float) -> None:
        """The agent of this slot is cut off. By itself no fault: the next sample of it ends the silence."""
        self._book.clock(now)
        if slot in self._book.slots:
            self._book.slots[slot].quiet = True

    def answered(self, slot: int, answer: Answer, now: float) -> None:
        """What a check found. One that this slot was not asked for is ignored. Raises Malformed."""
        self._book.clock(now)
        self._checks.answered(slot, answer)

    # --- out ---

    def tick(self, now: float) -> Findings:
        """Look at everything."""
        self._book.clock(now)
        told = [self._look_for_crash(now), self._look_for_corruption(now)]
        if not self._crash.open:
            told += [self._look_for_hang(now), self._look_for_slow(now)]
        stacks = [rank for rank in self._hang.wanted if not self._book.ranks[rank].stack]
        return Findings(
            tuple(verdict for verdict in told if verdict is not None),
            self._checks.new(),
            tuple(stacks),
            self._crash.open or self._hang.since is not None or self._pace.uneasy,
        )

    def lacks_groups(self, slot: int) -> bool:
        """Ranks of this slot call in groups that this engine does not know: their agent should send all again."""
        return bool(self._book.slots[slot].unknown) if slot in self._book.slots else False

    def _look_for_crash(self, now: float) -> Verdict | None:
        draft = self._crash.look(now)
        return draft and self._ledger.tell("crash", draft, self._limits.act_ratio)

    def _look_for_corruption(self, now: float) -> Verdict | None:
        draft = self._corrupt.look(now)
        return draft and self._ledger.tell("corruption", draft, self._limits.act_ratio)

    def _look_for_hang(self, now: float) -> Verdict | None:
        draft = self._hang.look(now)
        if self._hang.since is None:
            self._ledger.close("hang")
        return draft and self._ledger.tell("hang", draft, self._limits.act_ratio)

    def _look_for_slow(self, now: float) -> Verdict | None:
        if self._hang.since is not None:
            return None
        draft = self._slow.look(now)
        if not self._pace.slow:
            self._ledger.close("slow")
        return draft and self._ledger.tell("slow", draft, self._limits.act_ratio)
