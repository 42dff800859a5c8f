"""What goes in and out of the engine, beside the words of `wire`."""

from __future__ import annotations

from dataclasses import dataclass

from stormjib_health.verdict import Verdict  # noqa: TC001  part of the public records
from stormjib_health.wire import CheckKind  # noqa: TC001  part of the public records


class Malformed(ValueError):
    """A sample says what cannot be: names field, value and what is possible. Nothing of it was taken."""


@dataclass(frozen=True)
class Place:
    """Who sits where in this generation."""

    rank: int
    slot: int


@dataclass(frozen=True)
class Ask:
    """One measurement that the engine wants; the coordinator turns it into a `Check` for the agent of `slot`."""

    id: int
    """Growing within the engine's life; comes back in `Answer.id`."""
    kind: CheckKind
    slot: int
    """Who measures."""
    peer_slot: int = -1
    """TRANSFER: to whom."""
    rank: int = -1
    """COMPUTE: whose device."""
    limit_s: float = 1.0


@dataclass(frozen=True)
class Findings:
    """What one look found."""

    verdicts: tuple[Verdict, ...] = ()
    """New or changed; a verdict with a known id takes the place of the earlier one."""
    asks: tuple[Ask, ...] = ()
    """New questions; each is put once."""
    stacks: tuple[int, ...] = ()
    """Ranks whose stack is wanted now, at most 8; repeated until it came or nobody wants it any more."""
    suspicious: bool = False
    """Agents should send at once: something may be wrong."""
