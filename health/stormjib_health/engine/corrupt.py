"""Silent corruption: what ranks found out about their numbers becomes a verdict. The ranks have judged (`integrity`); here it
is only asked who says so, because a rank whose memory is wrong may say anything.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from stormjib_health.engine import words
from stormjib_health.verdict import Evidence, Scope, Syndrome, Verdict
from stormjib_health.wire import Doubt

if TYPE_CHECKING:
    from collections.abc import Iterable

    from stormjib_health.engine.book import Book
    from stormjib_health.wire import Finding

PROOFS = (Doubt.DIGEST, Doubt.REPLAY_DIFFERS)
"""The rest is a reason to do a step again, and what comes of that is one of these or the program's."""
KEPT = 256
_SAID = {
    Doubt.DIGEST: "the replicas of one shard differ",
    Doubt.REPLAY_DIFFERS: "the same step gave other bits the second time",
}
Claim = tuple[int, int, int]
"""(step, kind, accused)"""


class Corrupt:
    """What the ranks of one generation say about numbers."""

    def __init__(self, book: Book) -> None:
        self._book = book
        self._claims: dict[Claim, dict[int, Finding]] = {}
        """Who says it: rank -> its words."""
        self._since = 0.0

    def take(self, findings: Iterable[Finding], now: float) -> None:
        """Findings of one agent's ranks."""
        for finding in findings:
            if finding.kind not in PROOFS or len(self._claims) >= KEPT:
                continue
            self._since = self._since if self._claims else now
            claim = (finding.step, finding.kind, finding.accused)
            self._claims.setdefault(claim, {})[finding.rank] = finding

    def look(self, now: float) -> Verdict | None:
        """The verdict on the newest step that enough ranks agree on."""
        believed = [claim for claim, said in self._claims.items() if self._believed(claim, said)]
        if not believed:
            return None
        claim = max(believed)
        return self._verdict(claim, self._claims[claim], now)

    def _believed(self, claim: Claim, said: dict[int, Finding]) -> bool:
        """Two others say so; in a job of two ranks, the other one."""
        accused = claim[2]
        others = said.keys() - {accused}
        return len(others) >= min(2, len(self._book.ranks) - (accused in self._book.ranks))

    def _verdict(self, claim: Claim, said: dict[int, Finding], now: float) -> Verdict:
        step, kind, accused = claim
        named = accused in self._book.ranks
        who = f"rank {accused} is the one that differs" if named else "which of them is wrong cannot be told"
        votes = max(finding.votes for finding in said.values())
        rows = [Evidence("ranks that say so", "job", f"{len(said)} of {len(self._book.ranks)}")]
        if kind == Doubt.DIGEST and named:
            rows.append(Evidence("replicas against it", f"rank {accused}", str(votes)))
        return words.verdict(
            self._book, Syndrome.CORRUPTION, Scope.RANK if named else Scope.JOB, (accused,) if named else (),
            confidence=0.95 if named else 0.7, sentence=f"in step {step} {_SAID[Doubt(kind)]}; {who}",
            evidence=rows, confirmed=named, lasted_s=now - self._since,
        )  # fmt: skip
