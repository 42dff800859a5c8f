"""Conditions, counts and progress: what a person reads, made from what was observed.

No `phase`: the reason of the condition Running is the state in one word. A condition keeps its transition time while
its status stays, so that writing the same facts twice is the same status.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from stormjib_operator import budget, planning
from stormjib_operator.incarnation import adopting
from stormjib_operator.models import (
    CheckpointStatus,
    Condition,
    ConditionStatus,
    NodesStatus,
    Progress,
    Status,
)
from stormjib_operator.names import Type
from stormjib_operator.observed import Now, Observed, Problem
from stormjib_operator.slots import members
from stormjib_runtime.wire import (
    HEARTBEAT_S,
    HEARTBEATS_MISSED,
    AgentPhase,
    Cause,
    GenerationId,
    JobPhase,
    JobState,
)

if TYPE_CHECKING:
    from collections.abc import Iterator

NOTHING_FITS = "NothingFits"
"""The model has room on no allowed number of nodes."""
PROGRESS_S = 10.0
"""Progress alone is written no more often than this: the API server is no place for a step counter."""

_TRUE, _FALSE, _UNKNOWN = ConditionStatus.TRUE, ConditionStatus.FALSE, ConditionStatus.UNKNOWN
_LAST = (JobPhase.COMPLETE, JobPhase.EXHAUSTED, JobPhase.SUSPENDED)
_READY = (AgentPhase.IDLE, AgentPhase.PREPARED, AgentPhase.RUNNING, AgentPhase.STOPPED)


@dataclass(frozen=True)
class Fact:
    """A condition without its times."""

    kind: Type
    status: ConditionStatus
    reason: str
    message: str = ""


def figures(seen: Observed, status: Status, now: Now) -> Status:
    """The status with nodes, progress and checkpoint as the coordinator reports them."""
    changed = {
        "nodes": _nodes(seen, now),
        "checkpoint": _checkpoint(seen, status, now),
        "progress": _progress(seen, status, now),
        "observed_generation": seen.job.generation,
    }
    return status.model_copy(update=changed)


def conditions(seen: Observed, status: Status, now: Now, *more: Fact) -> Status:
    """The status with every known condition; `more` stands above what is derived here."""
    facts = {fact.kind: fact for fact in (*_facts(seen, status, now), *more)}
    made = tuple(_condition(seen, status, facts[kind], now) for kind in Type if kind in facts)
    return status.model_copy(update={"conditions": made})


def problem(seen: Observed) -> Problem | None:
    """The first thing that keeps a wanted pod from running: a refusal of the API server, then scheduler, then kubelet."""
    for name, refusal in sorted(seen.refusals.items()):
        return Problem("CreateRefused", f"{name}: {refusal.message}")
    troubled = [pod for pod in seen.pods if pod.problem is not None and not pod.deleting and not pod.over]
    troubled.sort(key=lambda pod: (not pod.unschedulable, pod.name))
    for pod in troubled:
        if pod.problem is not None:
            return Problem(pod.problem.reason, f"pod {pod.name}: {pod.problem.message}")
    return None


# --- figures --------------------------------------------------------------------------------------------------------


def _nodes(seen: Observed, now: Now) -> NodesStatus:
    wanted, state, old = seen.job.spec.nodes, seen.state, seen.job.status.nodes
    unheard = state is None and old.desired and not seen.job.status.holds(Type.SUSPENDED)
    if unheard or adopting(seen, now):
        return old.model_copy(update={"desired": wanted.replicas, "summary": _summary(old.active, seen)})
    active = len(members(state)) if state and state.phase is not JobPhase.SUSPENDED else 0
    agents = state.agents if state else ()
    ready = sum(view.phase in _READY and view.silent_s < HEARTBEATS_MISSED * HEARTBEAT_S for view in agents)
    spares = sum(view.phase is AgentPhase.IDLE and not view.member for view in agents)
    summary = _summary(active, seen)
    return NodesStatus(desired=wanted.replicas, active=active, ready=ready, spares=spares, summary=summary)


def _summary(active: int, seen: Observed) -> str:
    wanted = seen.job.spec.nodes
    return f"{active}/{wanted.replicas}" + (f"+{wanted.spares}" if wanted.spares else "")


def _progress(seen: Observed, status: Status, now: Now) -> Progress:
    state, old = seen.state, status.progress
    if state is None or state.step < 0 or state.step == old.step:
        return old
    if _later(seen, status, now):
        return old
    loss = "" if state.loss is None else f"{state.loss:.6g}"
    return Progress(step=state.step, loss=loss, last_updated_time=now.text)


def _later(seen: Observed, status: Status, now: Now) -> bool:
    """Whether figures were written a moment ago and will be written again: not so at an end, which is the last word."""
    ended = seen.state is not None and seen.state.phase in _LAST
    return not ended and now.since(status.progress.last_updated_time) < PROGRESS_S


def _checkpoint(seen: Observed, status: Status, now: Now) -> CheckpointStatus:
    state, old = seen.state, status.checkpoint
    if state is None or state.committed is None or state.committed.step == old.last_committed_step:
        return old
    if old.last_committed_step >= 0 and _later(seen, status, now):
        return old
    return CheckpointStatus(last_committed_step=state.committed.step, last_committed_time=now.text)


# --- conditions -----------------------------------------------------------------------------------------------------


def _condition(seen: Observed, status: Status, fact: Fact, now: Now) -> Condition:
    old = status.condition(fact.kind)
    since = old.last_transition_time if old is not None and old.status is fact.status else now.text
    return Condition(
        type=fact.kind,
        status=fact.status,
        reason=fact.reason,
        message=fact.message[:4096],
        last_transition_time=since,
        observed_generation=seen.job.generation,
    )


def _facts(seen: Observed, status: Status, now: Now) -> Iterator[Fact]:
    yield Fact(Type.SUSPENDED, _FALSE, "NotSuspended")
    found = planning.plan(seen.job.spec)
    if found is not None:
        yield _feasible(found)
    yield _scheduled(seen, status)
    yield _running(seen, status, now)
    yield _degraded(seen, status)
    yield _recovering(seen, status)
    if seen.job.spec.checkpoint is not None:
        yield _checkpoint_healthy(seen, status)
    yield Fact(Type.COMPLETE, _FALSE, "NotYet")
    yield Fact(Type.FAILED, _FALSE, "NotYet")


def _feasible(found: planning.Plan) -> Fact:
    if not found.fits:
        words = f"{found.text}; raise nodes.replicas or model.memoryPerRank"
        return Fact(Type.FEASIBLE, _FALSE, NOTHING_FITS, words)
    return Fact(Type.FEASIBLE, _TRUE, "SomeFit" if found.rejected else "AllFit", found.text)


def _scheduled(seen: Observed, status: Status) -> Fact:
    trouble = problem(seen)
    if trouble is not None and (trouble.reason == "CreateRefused" or any(p.unschedulable for p in seen.pods)):
        return Fact(Type.SCHEDULED, _FALSE, trouble.reason, trouble.message)
    placed = {pod.slot for pod in seen.slot_pods() if pod.node and not pod.over}
    wanted = {entry.slot for entry in status.slots}
    if wanted and wanted <= placed:
        return Fact(Type.SCHEDULED, _TRUE, "AllPlaced", f"all {len(wanted)} pods have a node")
    return Fact(
        Type.SCHEDULED, _FALSE, "Placing", f"{len(wanted & placed)} of {len(wanted)} pods have a node"
    )


_RUNNING: dict[JobPhase, tuple[ConditionStatus, str, str]] = {
    JobPhase.WAITING: (_FALSE, "Waiting", "the coordinator waits for enough agents"),
    JobPhase.STARTING: (_FALSE, "Starting", "a generation is being started"),
    JobPhase.RUNNING: (_TRUE, "Running", "ranks are stepping"),
    JobPhase.STOPPING: (_TRUE, "Stopping", "ranks save and stop, as planned"),
    JobPhase.BACKOFF: (_FALSE, "Backoff", "the last restart made no progress; waiting before the next one"),
    JobPhase.SUSPENDED: (_FALSE, "Suspended", "the job is held"),
    JobPhase.COMPLETE: (_FALSE, "Complete", "every rank has ended with exit code 0"),
    JobPhase.EXHAUSTED: (_FALSE, "Failed", "the restart budget is spent"),
}


_STEPLESS = Fact(
    Type.RUNNING, _TRUE, "Running", "ranks run and have told of no step yet; not every script does"
)


def _stepless(state: JobState) -> bool:
    """Whether every member runs its ranks but no step was seen: a script that tells none is not starting for ever."""
    phases = {view.phase for view in state.agents if view.member}
    return state.phase is JobPhase.STARTING and phases == {AgentPhase.RUNNING}


def _running(seen: Observed, status: Status, now: Now) -> Fact:
    state, trouble = seen.state, problem(seen)
    if state is not None and state.bounds_version and not adopting(seen, now):
        if state.phase is JobPhase.WAITING and trouble is not None:
            return Fact(Type.RUNNING, _FALSE, trouble.reason, trouble.message)
        return Fact(Type.RUNNING, *_RUNNING[state.phase]) if not _stepless(state) else _STEPLESS
    if status.coordinator.incarnation != seen.job.status.coordinator.incarnation and status.generation:
        words = "the coordinator is being replaced; the ranks go on meanwhile"
        return Fact(Type.RUNNING, _UNKNOWN, "CoordinatorLost", words)
    old = seen.job.status.condition(Type.RUNNING)
    if old is not None and status.generation is not None and old.reason != "Suspended":
        return Fact(Type.RUNNING, old.status, old.reason, old.message)
    if trouble is not None:
        return Fact(Type.RUNNING, _FALSE, trouble.reason, trouble.message)
    return Fact(Type.RUNNING, _FALSE, "Creating", "pods and the coordinator are being started")


def _degraded(seen: Observed, status: Status) -> Fact:
    nodes = status.nodes
    if status.generation is None or nodes.active >= nodes.desired:
        return Fact(Type.DEGRADED, _FALSE, "FullSize")
    words = f"{nodes.active} of {nodes.desired} nodes train"
    trouble = problem(seen)
    return Fact(Type.DEGRADED, _TRUE, "FewerNodes", f"{words}; {trouble.message}" if trouble else words)


_RECOVERS = (JobPhase.STARTING, JobPhase.WAITING, JobPhase.BACKOFF)


def _recovering(seen: Observed, status: Status) -> Fact:
    state = seen.state
    back = state is None or state.phase not in _RECOVERS or _stepless(state)
    if back or status.restarts.total == 0 or not status.faults:
        return Fact(Type.RECOVERING, _FALSE, "NoFault")
    fault = status.faults[0]
    return Fact(Type.RECOVERING, _TRUE, fault.cause, fault.message)


def _checkpoint_healthy(seen: Observed, status: Status) -> Fact:
    fault, newest = (status.faults[0] if status.faults else None), budget.newest(status)
    if (
        fault is not None
        and fault.cause == Cause.PREPARE_FAILED
        and GenerationId.parse(fault.generation) == newest
    ):
        return Fact(Type.CHECKPOINT_HEALTHY, _FALSE, "StorageFailed", fault.message)
    step = status.checkpoint.last_committed_step
    if step < 0:
        return Fact(Type.CHECKPOINT_HEALTHY, _UNKNOWN, "NoneYet", "no checkpoint has been committed yet")
    return Fact(Type.CHECKPOINT_HEALTHY, _TRUE, "Committed", "")
