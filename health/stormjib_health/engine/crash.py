"""R0: several ranks died. Which one first, and which only because their peer was gone?"""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING

from stormjib_health.engine import words
from stormjib_health.engine.edges import host
from stormjib_health.verdict import Evidence, Scope, Syndrome, Verdict

if TYPE_CHECKING:
    from stormjib_health.engine.book import Book
    from stormjib_health.engine.edges import Edges

LINES = 4096
"""Of a rank's last words, at most."""
VICTIM = re.compile(
    r"connection (closed|reset) by peer|connection refused|broken pipe|socket timeout|recvvalue failed"
    r"|nccl(remote|system|internal)?error|nccl error|dist(backend|network|store)error|watchdog caught collective"
    r"|timed out waiting \d+ ?ms for|application timeout caused pair closure|gloo.*(read|write|connect) error",
    re.IGNORECASE,
)
"""What a rank says whose peer is gone. Words of torch, Gloo and NCCL."""
ACCUSED = re.compile(r"peer:? \[([0-9A-Fa-f.:]+)\](?::(\d+))?")
PROGRAM = re.compile(
    r"^(?:Assertion|Attribute|Import|Index|Key|ModuleNotFound|Name|NotImplemented|Syntax|Type|UnboundLocal|Value"
    r"|ZeroDivision|Recursion)Error\b",
    re.MULTILINE,
)
"""Errors that a device cannot cause. RuntimeError is not among them: torch reports devices by it."""


MISMATCH = re.compile(
    r"op\.preamble\.length <= op\.nbytes|detected mismatch between collectives", re.IGNORECASE
)
"""What a rank says that was sent something else than it had called for. Words of Gloo and torch."""


@dataclass(frozen=True)
class Exit:
    """One rank that ended and should not have."""

    rank: int
    code: int
    """As `wait` gives it: negative for a signal."""
    lines: str
    at: float

    @property
    def signal(self) -> int:
        """Which signal ended it; 0 for none. 128 + n is how a shell says it."""
        return -self.code if self.code < 0 else self.code - 128 if 128 < self.code < 160 else 0

    @property
    def victim(self) -> bool:
        """It raised a communication error: somebody else went first."""
        return not self.signal and bool(VICTIM.search(self.lines))


class Crash:
    """All exits of one generation."""

    def __init__(self, book: Book, edges: Edges) -> None:
        self._book = book
        self._edges = edges
        self._exits: list[Exit] = []
        self._decided = False

    @property
    def open(self) -> bool:
        """Somebody died: whoever waits now waits for that."""
        return bool(self._exits)

    def take(self, rank: int, code: int, last_lines: str, now: float) -> None:
        """One exit, in the order in which they are heard. The first of a rank counts; code 0 is no fault."""
        self._book.ranks[rank].exit = code
        if code != 0 and all(exit.rank != rank for exit in self._exits):
            self._exits.append(Exit(rank, code, last_lines[-LINES:], now))

    def look(self, now: float) -> Verdict | None:
        """The verdict once it is due; told once, because what dies later dies of the restart."""
        if self._decided or not self._exits:
            return None
        roots = [exit for exit in self._exits if not exit.victim]
        limits = self._book.limits
        clear = bool(roots) or self._gone(now) is not None
        first = roots[0] if roots else self._exits[0]
        if now < first.at + (limits.settle_s if clear else limits.victims_s):
            return None
        self._decided = True
        return self._of_root(roots, now) if roots else self._of_victims(now)

    def _of_root(self, roots: list[Exit], now: float) -> Verdict:
        accused = self._accused()
        odd = next((exit for exit in roots if MISMATCH.search(exit.lines)), None)
        if odd is not None:
            return self._of_mismatch(odd, now)
        root = max(roots, key=lambda exit: accused[exit.rank])  # the first of several equals
        how = f"was ended by signal {root.signal}" if root.signal else f"ended with code {root.code}"
        others = len(self._exits) - len(roots)
        sentence = f"rank {root.rank} {how} without a communication error"
        sentence += f"; {others} of the others lost their peer after it" if others else ""
        sure = 0.98 if len(roots) == 1 else 0.9 if accused[root.rank] else 0.7
        return words.verdict(
            self._book, Syndrome.CRASH, Scope.RANK, (root.rank,), confidence=sure, sentence=sentence,
            evidence=self._rows(root.rank), confirmed=True, software=_program(root),
            lasted_s=now - root.at, stack=root.lines if not root.signal else "",
        )  # fmt: skip

    def _of_mismatch(self, root: Exit, now: float) -> Verdict:
        """It was told more than it had asked for: of the two, nobody can say which called the wrong thing."""
        return words.verdict(
            self._book, Syndrome.DESYNC, Scope.JOB, (), confidence=0.9, software=True, lasted_s=now - root.at,
            sentence=f"rank {root.rank} was sent something else than it had called for, and ended",
            evidence=self._rows(root.rank),
        )  # fmt: skip

    def _of_victims(self, now: float) -> Verdict:
        first = self._exits[0]
        accused = self._accused()
        rank = _most(accused)
        lasted = now - first.at
        gone = self._gone(now)
        if gone is not None:
            who = words.rank_list([exit.rank for exit in self._exits])
            sentence = f"{who} lost the connection to slot {gone}, and its agent has been silent since"
            scope, sure = Scope.NODE, 0.7
            culprits: tuple[int, ...] = (gone,)
        elif rank >= 0 and rank != first.rank:
            sentence = f"the connection of rank {first.rank} and rank {rank} broke; neither had ended before"
            scope, culprits, sure = Scope.LINK, (first.rank, rank), 0.5
        else:
            sentence = "every rank that ended says that its peer was gone, and none went first"
            scope, culprits, sure = Scope.JOB, (), 0.3
        return words.verdict(
            self._book, Syndrome.CRASH, scope, culprits, confidence=sure, sentence=sentence,
            evidence=self._rows(rank), lasted_s=lasted,
        )  # fmt: skip

    def _gone(self, now: float) -> int | None:
        """The slot with ranks that have not ended, as far as anybody knows, and whose agent ought to have been heard since the others'
        ended: processes that die with their agent are reported by nobody. None: there is none, or not that one alone."""
        at, patience = self._exits[0].at, self._book.limits.gone_intervals
        rank = _most(self._accused())
        silent = [
            number
            for number, slot in self._book.slots.items()
            if slot.number >= (0, 0)  # one that was never heard may be about to begin
            and any(rank.exit is None for rank in slot.ranks.values())
            and (slot.quiet or (slot.heard < at and now - slot.heard > patience * slot.interval))
            and (rank < 0 or number == self._book.slot_of[rank])
        ]
        return silent[0] if len(silent) == 1 else None

    def _accused(self) -> Counter[int]:
        """How often each rank is named by those who lost it. Some ranks share an address: all of them are."""
        votes: Counter[int] = Counter()
        for exit in self._exits:
            for address, _ in ACCUSED.findall(exit.lines):
                at = self._edges.ranks_at(host(address + ":0"))
                votes.update(rank for rank in at if rank != exit.rank)
        return votes

    def _rows(self, rank: int) -> list[Evidence]:
        accused = self._accused()
        rows = [Evidence("exits", "job", str(len(self._exits)))]
        if accused[rank]:
            rows.append(Evidence("named as lost peer", f"rank {rank}", f"{accused[rank]} times"))
        rows += [
            Evidence(
                "exit", f"rank {e.rank}", f"signal {e.signal}" if e.signal else f"code {e.code}", _last(e)
            )
            for e in self._exits
        ]
        return rows


def _most(votes: Counter[int]) -> int:
    """Who got most; -1 for nobody."""
    return votes.most_common(1)[0][0] if votes else -1


def _program(exit: Exit) -> bool:
    return not exit.signal and bool(PROGRAM.search(exit.lines))


def _last(exit: Exit) -> str:
    lines = exit.lines.strip().splitlines()
    return lines[-1][:120] if lines else ""
