"""What the health engine found, as status, events and nodes to keep away from. A node is looked up in our own records."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from stormjib_health.verdict import SURE, Scope, Syndrome
from stormjib_operator.models import EvidenceStatus, FaultStatus, VerdictStatus
from stormjib_operator.observed import Event, Now
from stormjib_runtime.wire import Cause, GenerationId

if TYPE_CHECKING:
    from collections.abc import Iterable

    from stormjib_health.verdict import Verdict
    from stormjib_operator.observed import Observed
    from stormjib_runtime.wire import JobState

MAX_FAULTS = 10
MAX_CULPRITS = 16
MAX_ROWS = 8
STACK_CHARS = 2048
_GENERATION = re.compile(r"[0-9]{1,19}\.[0-9]{1,19}")
_NOBODYS = (Syndrome.CONGESTION, Syndrome.IMBALANCE)


def shown(verdict: Verdict) -> VerdictStatus:
    """The verdict as the status keeps it. Texts come from the job's own processes, and are cut to the schema's bounds."""
    rows = (
        EvidenceStatus(name=row.name[:64], who=row.who[:64], value=row.value[:64], others=row.others[:64])
        for row in verdict.evidence[:MAX_ROWS]
    )
    return VerdictStatus(
        id=verdict.id,
        generation=verdict.generation,
        syndrome=verdict.syndrome,
        scope=verdict.scope,
        culprits=tuple(max(0, one) for one in verdict.culprits[:MAX_CULPRITS]),
        confidence_percent=round(100 * min(1.0, max(0.0, verdict.confidence))),
        confirmed=verdict.confirmed,
        software=verdict.software,
        detection_milliseconds=round(1000 * max(0.0, verdict.lasted_s)),
        evidence=tuple(rows),
        stack=verdict.stack[-STACK_CHARS:],
    )


def faults(seen: Observed, known: Iterable[FaultStatus], now: Now) -> tuple[FaultStatus, ...]:
    """The list of faults, newest first, with every verdict in it once: with the generation that it ended, or alone.

    A crash is always told by the end of its generation: who died first, which is known a moment later, is added to that.
    """
    kept = list(known)
    for verdict in _sound(seen.state):
        if verdict.syndrome is Syndrome.CRASH:
            kept = _attached(seen, kept, verdict)
            continue
        key, new = (verdict.generation, verdict.id), _alone(seen, verdict, now)
        same = [i for i, fault in enumerate(kept) if _key(fault) == key]
        if not same:
            kept.insert(0, new)
        elif kept[same[0]].cause == new.cause:  # only told again, perhaps with more behind it
            kept[same[0]] = new.model_copy(update={"time": kept[same[0]].time})
    return tuple(_once(kept))[:MAX_FAULTS]


def _attached(seen: Observed, kept: list[FaultStatus], verdict: Verdict) -> list[FaultStatus]:
    """The list with who died first in the fault that ended the verdict's generation."""
    over = GenerationId.parse(verdict.generation)
    after = [one for one in kept if GenerationId.parse(one.generation) > over]
    ended = min(after, key=lambda one: GenerationId.parse(one.generation), default=None)
    if ended is None or ended.cause != Cause.RANK_EXIT or ended.verdict is not None:
        return kept
    who = _alone(seen, verdict, Now(0.0, ended.time))
    found: dict[str, object] = {"verdict": who.verdict}
    if who.rank is not None:
        found |= {"rank": who.rank, "slot": who.slot, "node_name": who.node_name or ended.node_name}
    return [one.model_copy(update=found) if one is ended else one for one in kept]


def _key(fault: FaultStatus) -> tuple[str, int] | None:
    return (fault.verdict.generation, fault.verdict.id) if fault.verdict is not None else None


def _once(kept: Iterable[FaultStatus]) -> Iterable[FaultStatus]:
    """A verdict that has ended a generation stands in that fault, and no more alone."""
    known: set[tuple[str, int]] = set()
    for fault in kept:
        key = _key(fault)
        if key is None or key not in known:
            yield fault
        if key is not None:
            known.add(key)


def _alone(seen: Observed, verdict: Verdict, now: Now) -> FaultStatus:
    slot = max(0, verdict.slots[0]) if verdict.slots else None
    found = shown(verdict)
    return FaultStatus(
        generation=verdict.generation,
        time=now.text,
        cause=verdict.syndrome,
        slot=slot,
        rank=found.culprits[0] if found.culprits and verdict.scope is Scope.RANK else None,
        node_name=node_of(seen, slot),
        message=verdict.sentence[:1024],
        verdict=found,
    )


def _sound(state: JobState | None) -> list[Verdict]:
    """Verdicts that are sure, and whose names fit the status: a coordinator is in its tenant's hands."""
    return [one for one in sure(state) if _GENERATION.fullmatch(one.generation) and 0 <= one.id <= 2**53]


def sure(state: JobState | None) -> tuple[Verdict, ...]:
    """Without those that may still be taken back: a noisy machine has many, and they would push out what is known."""
    found = state.verdicts if state else ()
    return tuple(one for one in found if one.confidence >= SURE)


def node_of(seen: Observed, slot: int | None) -> str:
    """The node of a slot's pod, by what we see ourselves."""
    return next((pod.node for pod in seen.slot_pods() if pod.slot == slot and pod.node), "")


def events(seen: Observed) -> tuple[Event, ...]:
    """One event for each verdict, on the job."""
    return tuple(
        Event(
            verdict.syndrome,
            f"generation {verdict.generation}: {verdict.sentence}"[:1000],
            warning=verdict.syndrome not in _NOBODYS,
            once=True,
        )
        for verdict in _sound(seen.state)
        if verdict.sentence
    )
