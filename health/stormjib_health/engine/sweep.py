"""Bursts round hot connections, both ways: which are slow says whether it is a link, a node, everything or nothing.

A connection looks hot also where only its acknowledgements wait, and a ring that one link slows makes all of its connections wait. A
burst of an agent's own has neither trouble. All slow bursts touch one slot and two peers: the node. All are between two slots: the
link. The way back counts as well, because a slow side delays the acknowledgements of what comes in.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from enum import Enum
from typing import TYPE_CHECKING

from stormjib_health.engine import words
from stormjib_health.engine.baseline import median
from stormjib_health.engine.edges import cover
from stormjib_health.verdict import Evidence

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from stormjib_health.engine.checks import Pair
    from stormjib_health.engine.thresholds import Thresholds
    from stormjib_health.wire import Answer

LINKS = 4
"""Hottest links that are tried."""
ENOUGH = 4
"""Answers below which nothing can be compared."""


class Part(Enum):
    """What the bursts point at."""

    NODE = "node"
    LINK = "link"
    FABRIC = "fabric"
    NOTHING = "nothing"
    UNKNOWN = "unknown"


@dataclass(frozen=True)
class Outcome:
    """What the answers say."""

    part: Part
    slots: tuple[int, ...] = ()
    """NODE: the slot; LINK: the two slots, the slower direction's sender first."""
    side: str = ""
    """NODE: `sending`, `receiving`, or both."""
    sure: float = 0.0
    """0 to 1."""


def pairs(hot: Sequence[Pair], healthy: Sequence[int]) -> list[Pair]:
    """The transfers to ask for: the links of `hot` (the hottest first), and from and to two references."""
    links = list(dict.fromkeys((min(pair), max(pair)) for pair in hot))[:LINKS]
    a, b = links[0]
    warm = {slot for link in links for slot in link}
    free = sorted((slot for slot in healthy if slot not in (a, b)), key=lambda slot: (slot in warm, slot))
    if free:
        x, y = free[0], free[1] if len(free) > 1 else free[0]
        links += [(a, x), (y, b), (x, y)]
    # An agent measures one path after the other, and a dead one takes it a second: those come last.
    both = [way for one, other in reversed(links) for way in ((one, other), (other, one)) if one != other]
    return list(dict.fromkeys(both))


def judge(
    answers: Mapping[Pair, Answer], limits: Thresholds, lost_per_byte: float = 0.0, usual: float = 0.0
) -> Outcome:
    """What the bursts point at. `lost_per_byte`: seconds that a byte must lose on a bad path to explain the slowdown. `usual`:
    seconds that a byte took while all was well, 0 where that is not known."""
    bad = _slow(answers, limits, lost_per_byte)
    if len(answers) < ENOUGH:
        return Outcome(Part.UNKNOWN)
    if usual > 0 and _everywhere(answers, bad, limits.crowd_ratio * usual):
        return Outcome(Part.FABRIC, sure=0.8)
    return _pointed(answers, bad, limits)


def judge_reach(answers: Mapping[Pair, Answer], limits: Thresholds) -> Outcome:
    """The same where something stands: only bursts that did not arrive count, however slow the others are."""
    if len(answers) < ENOUGH:
        return Outcome(Part.UNKNOWN)
    return _pointed(answers, [pair for pair, answer in answers.items() if not answer.ok], limits)


def _pointed(answers: Mapping[Pair, Answer], bad: Sequence[Pair], limits: Thresholds) -> Outcome:
    if not bad:
        return Outcome(Part.NOTHING, sure=0.8)
    slot, part, peers = cover([(a, b, 1.0) for a, b in bad])
    if peers >= 2 and part >= limits.node_part:
        return Outcome(Part.NODE, (slot,), _side(bad, slot), 0.95 if part == 1.0 else 0.8)
    if peers == 1 and len({frozenset(pair) for pair in bad}) == 1:
        return Outcome(Part.LINK, bad[0], sure=0.95 if _elsewhere(answers, bad) else 0.6)
    return Outcome(Part.FABRIC if 2 * len(bad) > len(answers) else Part.UNKNOWN, sure=0.6)


def rows(answers: Mapping[Pair, Answer]) -> list[Evidence]:
    """The bursts as evidence, the worst first."""
    worst = sorted(answers.items(), key=lambda item: (item[1].ok, -item[1].seconds))
    return [
        Evidence(
            "burst",
            f"slot {a} -> slot {b}",
            words.milliseconds(answer.seconds) if answer.ok else f"failed: {answer.text[:60]}",
        )
        for (a, b), answer in worst
    ]


def agree(one: Outcome, other: Outcome) -> bool:
    """Both name the same node, or the same link."""
    return one.part is other.part and set(one.slots) == set(other.slots)


def _slow(answers: Mapping[Pair, Answer], limits: Thresholds, lost_per_byte: float) -> list[Pair]:
    """Pairs whose bursts are far slower than the best, lossy, or not possible at all; the slowest first. The line lies half-way, in
    factors, between the best and the worst. Ends that waited longer for a processor than for the path are too busy to call it slow."""
    done = [answer for answer in answers.values() if answer.ok and answer.seconds > 0]
    if not done:
        return []
    best, worst = min(a.seconds for a in done), max(a.seconds for a in done)
    rtt = min(a.rtt_s for a in done)
    line = best * max(limits.burst_ratio, math.sqrt(worst / best))
    slow = max(limits.ping_ratio * rtt, rtt + limits.ping_more_s)
    found = [
        pair for pair, a in answers.items()
        if not a.ok or a.rtt_s > slow or a.again >= limits.burst_again
        or a.queued_s < a.seconds > max(line, best + lost_per_byte * a.bytes)
    ]  # fmt: skip
    return sorted(
        found, key=lambda pair: answers[pair].seconds if answers[pair].ok else math.inf, reverse=True
    )


def _everywhere(answers: Mapping[Pair, Answer], bad: Sequence[Pair], limit: float) -> bool:
    """Also those that are not slow beside the others take more than `limit` seconds a byte."""
    rest = [a.seconds / a.bytes for pair, a in answers.items() if a.ok and a.bytes > 0 and pair not in bad]
    return bool(rest) and median(rest) > limit


def _side(bad: Sequence[Pair], slot: int) -> str:
    out, into = any(a == slot for a, _ in bad), any(b == slot for _, b in bad)
    return "sending and receiving" if out and into else "sending" if out else "receiving"


def _elsewhere(answers: Mapping[Pair, Answer], bad: Sequence[Pair]) -> bool:
    """Both ends of the bad link do well with somebody else."""
    good = {slot for pair in answers if pair not in bad for slot in pair}
    return set(bad[0]) <= good
