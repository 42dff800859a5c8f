"""Four corners: a burst from a to b says that something is slow, the bursts a-x, y-b and x-y say what.

With two healthy references x and y: only a-b is bad: the link. a-x too: a's sending side. y-b too: b's receiving side. Even x-y:
the fabric, so nobody. With three slots x stands for both references and there is no x-y; with two there is nothing to compare.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from enum import Enum
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from stormjib_health.engine.checks import Pair
    from stormjib_health.engine.thresholds import Thresholds
    from stormjib_health.wire import Answer


class Part(Enum):
    """What the corners point at."""

    LINK = "the link"
    SENDER = "the sending side"
    RECEIVER = "the receiving side"
    FABRIC = "the fabric"
    NOTHING = "nothing"
    UNKNOWN = "unknown"


@dataclass(frozen=True)
class Corners:
    """One suspect pair of slots with its references."""

    a: int
    b: int
    x: int = -1
    y: int = -1

    def pairs(self) -> list[Pair]:
        """The transfers to ask for, the suspect one first."""
        if self.x < 0:
            return [(self.a, self.b)]
        pairs = [(self.a, self.b), (self.a, self.x), (self.y, self.b)]
        return [*pairs, (self.x, self.y)] if self.x != self.y else pairs


@dataclass(frozen=True)
class Outcome:
    """What the answers say."""

    part: Part
    sure: float
    """0 to 1."""
    bad: tuple[Pair, ...] = ()


def choose(a: int, b: int, healthy: Sequence[int]) -> Corners:
    """Corners with the first two of `healthy` as references."""
    free = [slot for slot in healthy if slot not in (a, b)]
    if not free:
        return Corners(a, b)
    return Corners(a, b, free[0], free[1] if len(free) > 1 else free[0])


def judge(corners: Corners, answers: Mapping[Pair, Answer], limits: Thresholds) -> Outcome:
    """What the corners point at. A corner without an answer counts as neither good nor bad."""
    a, b, x, y = corners.a, corners.b, corners.x, corners.y
    line = _line(answers, answers.get((a, b)), limits)
    state = {pair: _bad(answer, *line) for pair, answer in answers.items()}
    bad = tuple(pair for pair, is_bad in state.items() if is_bad)
    suspect = state.get((a, b))
    if suspect is None:
        return Outcome(Part.UNKNOWN, 0.0, bad)
    if x < 0:
        return Outcome(Part.LINK if suspect else Part.UNKNOWN, 0.5, bad)
    if not suspect:
        return Outcome(Part.NOTHING, 0.8, bad)
    out, into, apart = state.get((a, x)), state.get((y, b)), state.get((x, y))
    full = 0.95 if x != y else 0.8
    sure = full if None not in (out, into) else 0.6
    return Outcome(_part(out, into, apart), sure, bad)


def _part(out: bool | None, into: bool | None, apart: bool | None) -> Part:
    if apart:
        return Part.FABRIC
    if out and into:
        return Part.UNKNOWN
    if out:
        return Part.SENDER
    return Part.RECEIVER if into else Part.LINK


def _line(answers: Mapping[Pair, Answer], suspect: Answer | None, limits: Thresholds) -> tuple[float, float]:
    """Seconds and round trip beyond which a corner is bad: half-way, in factors, from the best one to the suspect."""
    done = [answer for answer in answers.values() if answer.ok and answer.seconds > 0]
    if not done:
        return math.inf, math.inf
    best = min(answer.seconds for answer in done)
    rtt = min(answer.rtt_s for answer in done)
    worst = suspect.seconds if suspect and suspect.ok else best
    factor = max(limits.corner_ratio, math.sqrt(worst / best))
    return best * factor, max(limits.corner_rtt * rtt, rtt + limits.corner_rtt_s)


def _bad(answer: Answer, seconds: float, rtt_s: float) -> bool:
    """Far slower than the best corner, or not possible at all."""
    return not answer.ok or answer.seconds > seconds or answer.rtt_s > rtt_s


def confirm_compute(suspect: Answer | None, reference: Answer | None, ratio: float) -> bool | None:
    """Whether the product on the suspect is slow or wrong beside the reference's; None where that cannot be said."""
    if suspect is None or reference is None or not (suspect.ok and reference.ok):
        return None
    if suspect.versions == reference.versions and suspect.digest != reference.digest:
        return True
    if took(reference) <= 0 or suspect.versions != reference.versions:
        return None
    return took(suspect) > ratio * took(reference)


def took(answer: Answer) -> float:
    """Seconds of the product: on a processor those that it had, because a neighbour on the same core is not the node."""
    return answer.cpu_s or answer.seconds
