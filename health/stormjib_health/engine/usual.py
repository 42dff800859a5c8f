"""What a burst takes while all is well: one round of them as soon as a generation has found its pace.

Bursts of one moment are compared with each other, which finds the slow one of many. Where the network itself is slow for everybody
all of them are, and the slowest of them is nobody's fault: that only a memory can tell.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from stormjib_health.engine.baseline import median

if TYPE_CHECKING:
    from stormjib_health.engine.book import Book
    from stormjib_health.engine.checks import Checks, Pair, Round
    from stormjib_health.engine.pace import Pace

PAIRS = 8
"""Of slots, tried both ways: a sample of the network, and nothing that training feels."""


class Usual:
    """Asks once a generation."""

    def __init__(self, book: Book, pace: Pace, checks: Checks) -> None:
        self._book, self._pace, self._checks = book, pace, checks
        self._round: Round | None = None

    def look(self, now: float) -> None:
        """Ask, if the time has come."""
        if self._round is None and self._pace.steps.ready and not self._pace.uneasy:
            self._round = self._checks.transfers(self._pairs(), now)

    def _pairs(self) -> list[Pair]:
        slots = sorted(slot for slot, book in self._book.slots.items() if not book.quiet)
        ring = list(zip(slots, (*slots[1:], *slots[:1]), strict=True))
        chosen = ring[:: max(1, len(ring) // PAIRS)][:PAIRS]
        return list(dict.fromkeys(way for a, b in chosen for way in ((a, b), (b, a)) if a != b))

    def per_byte(self) -> float:
        """Seconds; 0 where nothing is known."""
        answers = self._round.transfers().values() if self._round is not None else ()
        return median(one.seconds / one.bytes for one in answers if one.ok and one.bytes > 0)
