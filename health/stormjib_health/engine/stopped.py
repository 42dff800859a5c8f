"""Verdicts on ranks that do not come: stopped, stuck at a device, asleep, or behind a silent agent."""

from __future__ import annotations

from typing import TYPE_CHECKING

from stormjib_health.engine import words
from stormjib_health.engine.book import position
from stormjib_health.verdict import Evidence, Scope, Syndrome, Verdict
from stormjib_health.wire import Phase

if TYPE_CHECKING:
    from collections.abc import Sequence

    from stormjib_health.engine.book import Book
    from stormjib_health.engine.graph import Standstill

HANG = Syndrome.NON_COMMUNICATION_HANG


def stopped(book: Book, now: float) -> list[int]:
    """Ranks that the kernel has stopped for longer than any debugger needs to look."""
    floor = book.limits.hang_floor_s
    return sorted(
        rank.rank for rank in book.ranks.values()
        if rank.exit is None and rank.dead_since is not None and book.fresh(rank, now)
        and book.slots[rank.slot].heard - max(rank.dead_since, book.slots[rank.slot].blink) >= floor
    )  # fmt: skip


def deaf(book: Book, now: float, found: Standstill, limit: float) -> list[int]:
    """Ranks that the kernel shows not to run: waiting for a device, or not taking what they receive. Few, or none."""
    touched = [book.ranks[rank] for rank in {*found.waiting, *found.owing}]
    names = sorted(
        rank.rank for rank in touched
        if book.fresh(rank, now)
        and (rank.unread > 0 or (rank.disk_since is not None and now - rank.disk_since >= limit))
    )  # fmt: skip
    return names if 2 * len(names) < len(book.ranks) or len(names) == 1 else []


def of_ranks(
    book: Book, found: Standstill, ranks: Sequence[int], sure: float, confirmed: bool, lasted_s: float
) -> Verdict:
    """The verdict on ranks that do not come."""
    slots = book.slots_of(ranks)
    whole = len(slots) == 1 and len(ranks) > 1 and set(ranks) == set(book.slots[slots[0]].ranks)
    return words.verdict(
        book, HANG, Scope.NODE if whole else Scope.RANK, slots if whole else tuple(ranks),
        confidence=sure, confirmed=confirmed, software=_same_place(book, ranks), lasted_s=lasted_s,
        sentence=_sentence(book, found, ranks), evidence=_rows(book, found, ranks),
        stack=next((book.ranks[rank].stack for rank in ranks if book.ranks[rank].stack), ""),
    )  # fmt: skip


def of_silence(book: Book, slot: int, now: float, lasted_s: float) -> Verdict:
    """The others wait, the agent of the one slot that they may wait for is silent, and no connection says more."""
    silent = now - book.slots[slot].heard
    return words.verdict(
        book, HANG, Scope.NODE, (slot,), confidence=0.5, lasted_s=lasted_s,
        sentence=f"slot {slot} has been silent for {silent:.1f} s, and the others wait for its ranks",
        evidence=[Evidence("silent", f"slot {slot}", f"{silent:.1f} s")],
    )  # fmt: skip


def excused(book: Book, found: Standstill, limit: float) -> bool:
    """Who is waited for is in a phase that may last, or came out of it just now; or most of the job waits for its data."""
    who = [book.ranks[rank] for rank in (found.owing or found.waiting)]
    loading = sum(rank.phase == Phase.DATA for rank in book.ranks.values())
    lately = any(book.slots[rank.slot].heard - rank.excused_at < limit for rank in who)
    return lately or 2 * loading > len(book.ranks)


def _sentence(book: Book, found: Standstill, ranks: Sequence[int]) -> str:
    one = book.ranks[ranks[0]]
    call = found.owing.get(one.rank)
    who = words.rank_list(ranks)
    if call is None:
        held = found.waiting.get(one.rank)
        where = f" in {words.call_name(held.kind)} {held.issued:,} of {book.name(held.group)}" if held else ""
        return f"{who} does not run{where}; {words.state_of(one)}"
    if call.kind in (10, 11):
        return f"{who} owes rank {_waiter(found, one.rank)} a message of {book.name(call.group)}; {words.state_of(one)}"
    done = position(one, call.group)
    return f"{who} issued {done:,} collectives of {book.name(call.group)}, the others {call.issued:,}; {words.state_of(one)}"


def _waiter(found: Standstill, rank: int) -> int:
    return next((waiter for waiter, call in found.waiting.items() if call.peer == rank), -1)


def _rows(book: Book, found: Standstill, ranks: Sequence[int]) -> list[Evidence]:
    rows = []
    for name in ranks[:3]:
        rank = book.ranks[name]
        call = found.owing.get(name)
        if call is not None:
            rows.append(
                Evidence(
                    f"issued in {book.name(call.group)}",
                    f"rank {name}",
                    f"{position(rank, call.group):,}",
                    f"{call.issued:,}",
                )
            )
        rows.append(Evidence("process", f"rank {name}", rank.process, rank.wchan))
        if rank.unread:
            rows.append(Evidence("sockets not read", f"rank {name}", str(rank.unread), "0"))
    rows.append(Evidence("longest wait", "the others", f"{found.longest:.2f} s"))
    return rows


def _same_place(book: Book, ranks: Sequence[int]) -> bool:
    """The same stack on two slots is the program's doing."""
    stacks = [(book.ranks[rank].stack, book.slot_of[rank]) for rank in ranks if book.ranks[rank].stack]
    return any(a == b and s != t for i, (a, s) in enumerate(stacks) for b, t in stacks[i + 1 :])
