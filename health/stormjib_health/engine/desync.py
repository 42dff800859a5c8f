"""Ranks that call different things at the same place of one group: the program's fault, whatever else it looks like."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING

from stormjib_health.engine import words
from stormjib_health.engine.book import POINT_TO_POINT, position
from stormjib_health.verdict import Evidence, Scope, Syndrome, Verdict
from stormjib_health.wire import Kind

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from stormjib_health.engine.book import Book, RankBook
    from stormjib_health.engine.graph import Standstill

UNEVEN = (int(Kind.ALL_TO_ALL), int(Kind.GATHER), int(Kind.SCATTER), int(Kind.OTHER))
"""Calls in which ranks may rightly differ in elements."""


@dataclass(frozen=True)
class Mismatch:
    """What the minority does and what the others do."""

    group: int
    number: int
    minority: tuple[int, ...]
    """Empty where no side is the smaller one."""
    theirs: str
    others: str


def mismatch(book: Book, now: float, found: Standstill) -> Mismatch | None:
    """The first group that stands in which ranks differ at one number: in kind, or in kind, type and elements."""
    for key in found.stuck:
        ranks = [rank for rank in book.members(key) if key in rank.calls and book.fresh(rank, now)]
        wrong = _by_kind(key, ranks) or _by_signature(book, key, ranks)
        if wrong:
            return wrong
    return None


def _by_kind(key: int, ranks: Iterable[RankBook]) -> Mismatch | None:
    at: dict[int, dict[int, str]] = {}
    for rank in ranks:
        call = rank.calls[key].call
        if call.kind not in POINT_TO_POINT and not call.done:
            at.setdefault(call.issued, {})[rank.rank] = words.call_name(call.kind)
    return next((m for number, said in at.items() if (m := _split(key, number, said))), None)


def _by_signature(book: Book, key: int, ranks: Iterable[RankBook]) -> Mismatch | None:
    lowest = min((position(rank, key) for rank in book.members(key)), default=0)
    at: dict[int, dict[int, str]] = {}
    for rank in ranks:
        call = rank.calls[key].call
        if call.signature and call.signed >= lowest and call.kind not in UNEVEN:
            at.setdefault(call.signed, {})[rank.rank] = f"signature {call.signature:08x}"
    return next((m for number, said in at.items() if (m := _split(key, number, said))), None)


def _split(key: int, number: int, said: Mapping[int, str]) -> Mismatch | None:
    counts = Counter(said.values()).most_common()
    if len(counts) < 2:
        return None
    common = counts[0][0]
    clear = counts[0][1] > counts[1][1]
    odd = tuple(sorted(rank for rank, what in said.items() if what != common))
    return Mismatch(key, number, odd if clear else (), said[odd[0]], common)


def of_mismatch(book: Book, wrong: Mismatch, lasted_s: float) -> Verdict:
    """The verdict on it. Never a node's fault."""
    name = book.name(wrong.group)
    who = words.rank_list(wrong.minority) if wrong.minority else "half of the ranks"
    sentence = f"call {wrong.number:,} of {name} is {wrong.theirs} on {who} and {wrong.others} on the others"
    return words.verdict(
        book, Syndrome.DESYNC, Scope.RANK if wrong.minority else Scope.JOB, wrong.minority, confidence=0.95,
        sentence=sentence, software=True, lasted_s=lasted_s,
        evidence=[Evidence(f"call {wrong.number:,} of {name}", who, wrong.theirs, wrong.others)],
    )  # fmt: skip


def of_ring(book: Book, found: Standstill, lasted_s: float) -> Verdict:
    """Everybody waits for somebody else's call: the smaller side has left out, or made, a call of its own."""
    behind: dict[int, list[int]] = {}
    for rank, call in found.owing.items():
        behind.setdefault(call.group, []).append(rank)
    key, odd = min(behind.items(), key=lambda item: len(item[1]))
    clear = 2 * len(odd) < len(book.members(key))
    minority = tuple(sorted(odd)) if clear else ()
    who = words.rank_list(minority) if clear else "as many ranks"
    sentence = (
        f"the ranks wait for each other in a ring: {who} in another group, the others in {book.name(key)}"
    )
    rows = [
        Evidence(
            "waits in",
            f"rank {rank}",
            f"{words.call_name(call.kind)} {call.issued:,} of {book.name(call.group)}",
        )
        for rank, call in sorted(found.waiting.items())
    ]
    return words.verdict(
        book, Syndrome.DESYNC, Scope.RANK if clear else Scope.JOB, minority, confidence=0.8,
        sentence=sentence, software=True, lasted_s=lasted_s, evidence=rows,
    )  # fmt: skip
