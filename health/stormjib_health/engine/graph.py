"""Who waits for whom, over all groups at once: the rank that nobody can wait past.

A rank waits in a call that others have not entered, or in one that all have entered and the network does not finish. Whoever
is waited for and does not wait itself is where the wait ends. Linear in the sizes of the groups that stand.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from stormjib_health.engine.book import POINT_TO_POINT, position
from stormjib_health.wire import PAIRS, Kind, Pair

if TYPE_CHECKING:
    from collections.abc import Iterable

    from stormjib_health.engine.book import Book, RankBook
    from stormjib_health.wire import Call


@dataclass
class Standstill:
    """Where the ranks stand."""

    longest: float = 0.0
    """The longest wait that is a wait for others or for the network."""
    waiting: dict[int, Call] = field(default_factory=dict)
    """Ranks that wait, each with the call."""
    owing: dict[int, Call] = field(default_factory=dict)
    """Ranks that are waited for, each with the call that it has not entered."""
    unheard: set[int] = field(default_factory=set)
    """Ranks that may be waited for, whose agents are silent."""
    complete: list[int] = field(default_factory=list)
    """Groups that stand though all have entered the call."""
    stuck: list[int] = field(default_factory=list)
    """Groups with a waiting rank."""
    perhaps: set[int] = field(default_factory=set)
    """Ranks that wait for a message of which nobody knows whether it is under way."""

    @property
    def sinks(self) -> list[int]:
        """Waited for, and waiting for nobody."""
        return sorted(rank for rank in self.owing if rank not in self.waiting)


def stand(book: Book, now: float, least: float) -> Standstill:
    """The wait graph of all calls that have been open for `least` seconds."""
    found = Standstill()
    by_group, pairs = _open_calls(book, now, least)
    for key, open_calls in by_group.items():
        _look_at_group(book, now, key, open_calls, found)
    for kind in (Kind.RECV, Kind.SEND):
        explained = kind is Kind.SEND and bool(found.sinks)
        for rank, (peer, seconds, call) in pairs.items():
            if call.kind == kind and not (explained and not _ahead(book, rank, peer, call)):
                _look_at_pair(book, now, rank, peer, seconds, call, pairs, found)
    return found


_Open = list[tuple["RankBook", "Call", float]]
_Pairs = dict[int, tuple[int, float, "Call"]]


def _open_calls(book: Book, now: float, least: float) -> tuple[dict[int, _Open], _Pairs]:
    by_group: dict[int, _Open] = {}
    pairs: _Pairs = {}
    for rank in book.ranks.values():
        if rank.idle_since is None or not book.fresh(rank, now):
            continue
        for key, standing in rank.calls.items():
            call = standing.call
            if call.done or not call.started:
                continue
            seconds = book.waited(rank, standing)
            if seconds < least:
                continue
            if call.kind not in POINT_TO_POINT:
                by_group.setdefault(key, []).append((rank, call, seconds))
            elif call.peer in book.ranks and call.peer != rank.rank:
                pairs[rank.rank] = (call.peer, seconds, call)
    return by_group, pairs


def _look_at_group(book: Book, now: float, key: int, open_calls: _Open, found: Standstill) -> None:
    members = book.members(key)
    wanted = max(call.issued for _, call, _ in open_calls)
    behind = [rank for rank in members if rank.exit is None and position(rank, key) < wanted]
    heard = [rank for rank in behind if book.fresh(rank, now)]
    lowest = min((position(rank, key) for rank in heard), default=wanted)
    unheard = [rank.rank for rank in behind if not book.fresh(rank, now)]
    example = next(call for _, call, _ in open_calls if call.issued == wanted)
    top = max(position(rank, key) for rank in members)
    waits = [(rank, call, s) for rank, call, s in open_calls if lowest < call.issued or call.issued == top]
    if len(members) < 2 or not waits:
        return
    found.stuck.append(key)
    found.owing.update((rank.rank, example) for rank in heard)
    found.unheard.update(unheard)
    if not behind:
        found.complete.append(key)
    for rank, call, seconds in waits:
        found.waiting[rank.rank] = call
        found.longest = max(found.longest, seconds)


def _look_at_pair(
    book: Book, now: float, rank: int, peer: int, seconds: float, call: Call, pairs: _Pairs, found: Standstill
) -> None:
    other = book.ranks[peer]
    met = pairs.get(peer)
    taken = call.kind == Kind.SEND and met is not None and met[0] == rank and met[2].kind == Kind.RECV
    ahead = _ahead(book, rank, peer, call)
    if taken or ahead is False:
        return
    if ahead is None:
        found.perhaps.add(rank)
    found.waiting[rank] = call
    found.longest = max(found.longest, seconds)
    if book.fresh(other, now):
        found.owing[peer] = call
    else:
        found.unheard.add(peer)


def _ahead(book: Book, rank: int, peer: int, call: Call) -> bool | None:
    """Whether this receive is of a message that was not sent, or this send of one that the other does not receive: then it waits.
    None where that is not known."""
    theirs = book.ranks[peer].calls.get(call.group)
    mine = _pair(call, peer)
    other = _pair(theirs.call, rank) if theirs is not None else None
    if mine is None or other is None:
        return None
    return mine.received > other.sent if call.kind == Kind.RECV else mine.sent > other.received


def _pair(call: Call, peer: int) -> Pair | None:
    """What a rank counts of its calls with `peer`; None where others may have driven that out."""
    found = next((pair for pair in call.pairs if pair.peer == peer), None)
    return Pair(peer, 0, 0) if found is None and len(call.pairs) < PAIRS else found


def odd_ones(ranks: Iterable[RankBook]) -> list[int]:
    """Those whose main thread sleeps elsewhere in the kernel than most: in a ring of waits, who does not wait."""
    listed = list(ranks)
    places: dict[str, list[int]] = {}
    for rank in listed:
        places.setdefault(rank.wchan, []).append(rank.rank)
    common = max(places.values(), key=len, default=[])
    odd = [rank.rank for rank in listed if rank.rank not in common]
    return odd if 2 * len(odd) < len(listed) else []
