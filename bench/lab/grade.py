"""From records of trials to figures. Pure: what is graded is what was written down, so that anybody can grade it again."""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from stormjib_fault.words import JOB, NON_COMMUNICATION_SLOW, RANK, Answer, Truth
from stormjib_health.verdict import SURE

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

SETTLE_S = 1.2
"""A verdict may be confirmed by a check of at most a second: the newest one of the same trouble in this time counts."""
NOTES = frozenset({"Congestion", "Imbalance"})
"""Syndromes that blame nobody: they are notes, whatever happens."""
UNSEEN = "none"


@dataclass(frozen=True)
class Seen:
    """One verdict as the coordinator published it."""

    at_s: float
    """After the injection."""
    id: int
    syndrome: str
    scope: str
    culprits: tuple[int, ...] = ()
    slots: tuple[int, ...] = ()
    confidence: float = 0.0
    confirmed: bool = False
    software: bool = False
    severity: float = 1.0
    stack: bool = False
    sentence: str = ""


@dataclass(frozen=True)
class Record:
    """What happened in one trial: one JSON line."""

    id: str
    row: str
    fault: str
    ranks: int
    pattern: str
    severity: float
    victim: int
    seed: int
    truth: Truth
    proof: str = ""
    """What shows that the fault fired; empty where nothing did, and then the trial counts for nothing."""
    verdicts: tuple[Seen, ...] = ()
    steps: int = -1
    """Steps of the quickest rank from the injection to the verdict that counts; -1 without one."""
    step_s: float = 0.0
    """Median before the injection."""
    slowdown: float = 1.0
    """Median step after the injection over the one before; 0 where no step was finished."""
    restarts: tuple[str, ...] = ()
    """Causes of the generations that began between injection and healing."""
    accused: tuple[int, ...] = ()
    """Slots whose isolation was asked for."""
    load: float = 0.0
    """Average load of the machine per core."""
    watched_s: float = 0.0
    """How long after the injection it was watched."""
    trace: dict[str, tuple[tuple[float, ...], ...]] = field(default_factory=dict)
    """rank -> steps around the injection, as `traces.pack` writes them."""


def blaming(verdicts: Iterable[Seen]) -> list[Seen]:
    """Those that say more than a note."""
    sure = (v for v in verdicts if v.confidence >= SURE and v.syndrome not in NOTES)
    return [v for v in sure if v.culprits or v.scope == JOB]


def counting(record: Record) -> Seen | None:
    """The verdict that is graded: the first one, or what became of it after its check. Notes come last."""
    for found in (blaming(record.verdicts), record.verdicts):
        if found:
            first = found[0]
            same = [v for v in found if v.id == first.id and v.at_s <= first.at_s + SETTLE_S]
            return same[-1]
    return None


def answer(verdict: Seen) -> Answer:
    """What a verdict answers, in the form of a truth's answers."""
    if verdict.scope == RANK:
        return Answer(RANK, tuple(sorted(verdict.culprits)))
    if verdict.scope == JOB:
        return Answer(JOB)
    return Answer(verdict.scope, tuple(sorted(set(verdict.slots) or set(verdict.culprits))))


@dataclass(frozen=True)
class Grade:
    """One trial, judged."""

    syndrome: str
    """That was found; UNSEEN for none."""
    right: bool
    """The syndrome is the true one."""
    exact: bool
    """And so is the culprit."""
    detected_s: float = math.inf
    steps: int = -1
    wrongly_accused: bool = False
    """Isolation was asked for a node that holds no culprit."""
    wrongly_blamed: bool = False
    """Somebody healthy was named, above a note."""


def grade(record: Record) -> Grade:
    """Judge one trial."""
    truth, verdict = record.truth, counting(record)
    accused = bool(set(record.accused) - set(truth.slots))
    blamed = any(not _innocent(truth, v) for v in blaming(record.verdicts))
    if truth.harmless:
        right = all(v.scope != JOB and answer(v) in _sorted(truth.answers) for v in blaming(record.verdicts))
        return Grade(
            _name(verdict),
            right,
            right and not record.restarts,
            wrongly_accused=accused,
            wrongly_blamed=blamed,
        )
    if verdict is None:
        return Grade(UNSEEN, False, False, wrongly_accused=accused)
    right = verdict.syndrome == truth.syndrome and (verdict.software or not truth.software)
    exact = right and answer(verdict) in _sorted(truth.answers)
    return Grade(verdict.syndrome, right, exact, verdict.at_s, record.steps, accused, blamed)


def _name(verdict: Seen | None) -> str:
    return UNSEEN if verdict is None else verdict.syndrome


def _innocent(truth: Truth, verdict: Seen) -> bool:
    """Whether what a verdict says harms nobody healthy."""
    return verdict.scope == JOB or verdict.software or answer(verdict) in _sorted(truth.answers)


def _sorted(answers: Iterable[Answer]) -> set[Answer]:
    return {Answer(each.scope, tuple(sorted(each.who))) for each in answers}


def wilson(hits: int, trials: int, z: float = 1.96) -> tuple[float, float]:
    """The Wilson interval of a share, 95 % by default; (0, 1) without trials."""
    if trials == 0:
        return 0.0, 1.0
    share, spread = hits / trials, z * z / trials
    middle = (share + spread / 2) / (1 + spread)
    half = z / (1 + spread) * math.sqrt(share * (1 - share) / trials + spread / (4 * trials))
    return max(0.0, middle - half), min(1.0, middle + half)


def percentile(values: Sequence[float], share: float) -> float:
    """The smallest value that so large a share of them does not exceed; infinite without values."""
    ordered = sorted(values)
    return ordered[max(0, math.ceil(share * len(ordered)) - 1)] if ordered else math.inf


def confusion(records: Iterable[Record]) -> dict[str, Counter[str]]:
    """True syndrome -> how often each was found. What blames nobody is `none`, found or true."""
    table: dict[str, Counter[str]] = defaultdict(Counter)
    for record in records:
        table[record.truth.syndrome or UNSEEN][grade(record).syndrome] += 1
    return dict(table)


def f1(records: Iterable[Record], syndrome: str = NON_COMMUNICATION_SLOW) -> tuple[float, float, float]:
    """(precision, recall, F1) of a syndrome with its exact culprit, over all trials, the others' too."""
    hit = missed = false = 0
    for record in records:
        found = grade(record)
        true = record.truth.syndrome == syndrome
        hit += true and found.exact
        missed += true and not found.exact
        false += found.syndrome == syndrome and not (true and found.exact)
    precision = hit / (hit + false) if hit + false else 0.0
    recall = hit / (hit + missed) if hit + missed else 0.0
    both = precision + recall
    return precision, recall, 2 * precision * recall / both if both else 0.0


def counts(record: Record, least_slowdown: float = 1.15) -> bool:
    """Whether a trial may be judged: its fault fired, and a slow one was as slow as the smallest that is promised."""
    if not record.proof:
        return False
    least = {"CommunicationSlow": 1.3, NON_COMMUNICATION_SLOW: least_slowdown}.get(record.truth.syndrome)
    return least is None or record.slowdown == 0 or record.slowdown >= least
