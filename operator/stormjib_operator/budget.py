"""What the history of generations costs: restarts counted once, faults kept as evidence.

Only entries above `status.generation` are new. That mark, the counters and the bounds made from them are written in
one status write, so nothing is counted twice and a restarted operator goes on from there.
"""

from __future__ import annotations

from stormjib_operator import verdicts
from stormjib_operator.models import FaultStatus, Restarts, Status
from stormjib_operator.observed import Event, Now, Observed
from stormjib_runtime.wire import Cause, GenerationId, HistoryEntry

_RESTARTS = frozenset(
    {
        Cause.RANK_EXIT,
        Cause.RANK_HANG,
        Cause.COMMUNICATION_HANG,
        Cause.SLOW,
        Cause.CORRUPTION,
        Cause.DESYNC,
        Cause.CONTAINER_EXIT,
        Cause.AGENT_SILENT,
        Cause.RESUME_OLDER,
        Cause.PREPARE_FAILED,
    }
)
"""Causes that are faults; the others are plans."""


def newest(status: Status) -> GenerationId:
    """The newest generation that has been counted."""
    return GenerationId.parse(status.generation) if status.generation else GenerationId(0, 0)


def settle(seen: Observed, now: Now) -> tuple[Status, tuple[Event, ...]]:
    """The status with every new entry of the history counted, and an event for each."""
    status, state = seen.job.status, seen.state
    if state is None:
        return status, ()
    entries = [entry for entry in state.history if entry.generation.id > newest(status)]
    faults = [_fault(seen, entry, now) for entry in entries if entry.generation.cause in _RESTARTS]
    restarts = Restarts(
        total=status.restarts.total + len(faults),
        counted=status.restarts.counted + sum(entry.counted for entry in entries),
    )
    ids = [entry.generation.id for entry in entries]
    ids += [state.generation.id] if state.generation else []
    top = max([newest(status), *ids])
    changed = {
        "generation": str(top) if top.incarnation else None,
        "restarts": restarts,
        "faults": verdicts.faults(seen, (*reversed(faults), *status.faults), now),
    }
    told = (*(_event(entry) for entry in entries), *verdicts.events(seen))
    return status.model_copy(update=changed), told


def left(seen: Observed, status: Status) -> int:
    """Restarts that the budget still pays for."""
    return max(0, seen.job.spec.recovery.max_restarts - status.restarts.counted)


def _fault(seen: Observed, entry: HistoryEntry, now: Now) -> FaultStatus:
    fault = entry.fault
    slot = fault.slot if fault else None
    return FaultStatus(
        generation=str(entry.generation.id),
        time=now.text,
        cause=entry.generation.cause,
        slot=slot,
        rank=fault.rank if fault else None,
        node_name=verdicts.node_of(seen, slot),
        message=(fault.message if fault else "")[-1024:],
        verdict=verdicts.shown(fault.verdict) if fault and fault.verdict else None,
    )


def _event(entry: HistoryEntry) -> Event:
    generation, fault = entry.generation, entry.fault
    size = f"{len(generation.members)} nodes, {generation.world_size} ranks"
    # A generation is told of before its first member has looked at the storage: mostly nobody knows the step yet.
    resume = f", from step {entry.resume.step}" if entry.resume else ""
    words = f"generation {generation.id} began with {size}{resume}"
    if fault is not None:
        where = "".join(
            f", {name} {value}"
            for name, value in (("slot", fault.slot), ("rank", fault.rank))
            if value is not None
        )
        words += f"; {fault.cause}{where}: {fault.message}" if fault.message else f"; {fault.cause}{where}"
    return Event(generation.cause, words[:1000], warning=generation.cause in _RESTARTS)
