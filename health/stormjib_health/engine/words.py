"""How findings are put into words, alike in all of them."""

from __future__ import annotations

from typing import TYPE_CHECKING

from stormjib_health.verdict import Evidence, Scope, Syndrome, Verdict
from stormjib_health.wire import Kind, Phase

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from stormjib_health.engine.book import Book, RankBook

ROWS = 8
"""Of evidence, at most."""
STATES = {"T": "stopped", "t": "stopped by a debugger", "Z": "dead, not yet collected", "X": "dead", "D": "waiting for a device"}  # fmt: skip


def rank_list(ranks: Iterable[int], limit: int = 8) -> str:
    """`rank 5`, `ranks 1, 2 and 3`, `ranks 0, 1, … (500 of them)`."""
    listed = list(ranks)
    if len(listed) == 1:
        return f"rank {listed[0]}"
    if len(listed) > limit:
        return f"ranks {', '.join(map(str, listed[:limit]))}, … ({len(listed):,} of them)"
    return f"ranks {', '.join(map(str, listed[:-1]))} and {listed[-1]}"


def arrow(source: int, target: int) -> str:
    """`rank 2 -> rank 1`."""
    return f"rank {source} -> rank {target}"


def milliseconds(seconds: float) -> str:
    """`12 ms`; a decimal below 10."""
    return f"{seconds * 1e3:,.1f} ms" if seconds < 0.01 else f"{seconds * 1e3:,.0f} ms"


def call_name(kind: int) -> str:
    """`all_reduce`; `call` for what this version does not know."""
    return Kind(kind).name.lower() if kind in Kind._value2member_map_ and kind else "call"


def state_of(rank: RankBook) -> str:
    """What the kernel and the phase record say of a rank, as a clause."""
    words = []
    if rank.process in STATES:
        words.append(f"its process is {STATES[rank.process]}")
    elif rank.unread:
        words.append("it does not take what it receives")
    elif rank.idle_since is None:
        words.append("its process computes")
    elif rank.wchan and rank.wchan != "0":
        words.append(f"its process sleeps in {rank.wchan}")
    else:
        words.append("its process is idle")
    if rank.phase > Phase.STEP and rank.phase in Phase._value2member_map_:
        words.append(f"phase {Phase(rank.phase).name.lower()}")
    return ", ".join(words)


def verdict(
    book: Book,
    syndrome: Syndrome,
    scope: Scope,
    culprits: Sequence[int],
    *,
    confidence: float,
    sentence: str,
    evidence: Sequence[Evidence] = (),
    confirmed: bool = False,
    software: bool = False,
    severity: float = 1.0,
    lasted_s: float = 0.0,
    stack: str = "",
) -> Verdict:
    """A verdict without an id yet; slots follow from the culprits."""
    slots = tuple(culprits) if scope is Scope.NODE else book.slots_of(culprits)
    return Verdict(
        0, syndrome, scope, tuple(culprits), slots, round(confidence, 2), confirmed, software,
        round(severity, 3), round(max(0.0, lasted_s), 3), sentence, tuple(evidence[:ROWS]), stack,
    )  # fmt: skip
