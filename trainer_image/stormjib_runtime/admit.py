"""What a report must be to count, and how it is taken into the state."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from stormjib_runtime.state import Agent, Refused, Running, StandDown, State
from stormjib_runtime.wire import PROTOCOL, UNKNOWN_GENERATION, Bounds, GenerationId, Report, ResumePoint

if TYPE_CHECKING:
    from collections.abc import Iterable

EVENTS_KEPT = 64
EVENT_CHARS = 512


def admit(state: State, report: Report) -> None:
    """Raise Refused for a report that may not be heard."""
    if report.protocol != PROTOCOL:
        raise Refused(409, f"protocol {report.protocol}; this coordinator speaks {PROTOCOL}")
    if report.job_uid != state.job_uid:
        raise Refused(403, f"job {report.job_uid[:64]!r} is not served here")
    highest = max(report.incarnation, report.generation.id.incarnation if report.generation else 0)
    if highest > state.incarnation:
        raise StandDown(
            409, f"agent of slot {report.slot} has obeyed incarnation {highest}; this is {state.incarnation}"
        )
    if state.bounds is None:
        raise Refused(403, "no bounds yet; ask again")
    if state.bounds.slots.get(str(report.slot)) != report.pod_uid:
        raise Refused(403, f"slot {report.slot} is not for pod {report.pod_uid[:64]!r}")
    known = state.agents.get(report.slot)
    if known is not None and report.agent < known.report.agent:
        raise Refused(
            409, f"slot {report.slot} is held by agent {known.report.agent}; {report.agent} is older"
        )


def completed(state: State, report: Report) -> Report:
    """The report with the members of its generation, which an agent leaves out once it was answered. Raises Refused where they are
    not known here: a coordinator that is new to the job has to be told."""
    if report.generation is None:
        return report
    known = state.agents.get(report.slot)
    whole = report.generation.whole(state.generation, known.report.generation if known else None)
    if whole is None:
        raise Refused(
            UNKNOWN_GENERATION, f"generation {report.generation.id} is not known here; say who is in it"
        )
    return replace(report, generation=whole)


def admit_bounds(state: State, bounds: Bounds) -> None:
    """Raise Refused for bounds that may not be taken: malformed, older, or of another incarnation."""
    if not 1 <= bounds.min_replicas <= bounds.replicas or bounds.processes < 1:
        raise Refused(400, "bounds need 1 <= min_replicas <= replicas and processes >= 1")
    if not all(bounds.min_replicas <= size <= bounds.replicas for size in bounds.sizes):
        raise Refused(400, "sizes lie between min_replicas and replicas")
    if not all(degree >= 1 for degree in bounds.replicate.values()):
        raise Refused(400, "replicate counts ranks that hold the same: at least 1")
    if not all(slot.isascii() and slot.isdecimal() for slot in bounds.slots):
        raise Refused(400, "slots are written as decimal numbers")
    if state.bounds is not None and bounds.version <= state.bounds.version:
        raise Refused(409, f"version {bounds.version} is not above {state.bounds.version}")
    if bounds.incarnation < state.incarnation:
        raise Refused(409, f"incarnation {bounds.incarnation} is below {state.incarnation}")
    if bounds.incarnation > state.incarnation and state.generation is not None:
        raise Refused(
            409, f"incarnation {state.incarnation} has begun {state.current}; it can no longer be raised"
        )


def merge(state: State, report: Report, now: float) -> State:
    """The state with this report in it; the same one where a newer report was already here."""
    known = state.agents.get(report.slot)
    if known is not None and _is_older(report, known.report):
        return state
    agent = Agent(report, now, heartbeat_s=state.heartbeat_s)
    if known is not None and known.report.agent == report.agent:
        agent = replace(agent, since=now if known.silent(now) else known.since)
    agents = {**state.agents, report.slot: agent}
    return _progress(replace(state, agents=agents, events=_events(state.events, report)), report)


def is_news(state: State, before: Agent | None, report: Report, now: float) -> bool:
    """Whether a report may change a decision: the usual heartbeat does not, and shall cost nothing."""
    if before is None or before.lost_at is not None or before.silent(now):
        return True
    if state.generation is not None and report.generation != before.report.generation:
        return True
    return _facts(report) != _facts(before.report)


def _facts(report: Report) -> tuple[object, ...]:
    ranks = tuple((rank.rank, rank.exit, rank.process, rank.listens, rank.step >= 0) for rank in report.ranks)
    return (
        report.agent,
        report.phase,
        report.leaving,
        report.preflight,
        report.processes,
        report.store,
        report.error,
        report.committed,
        report.storage,
        report.events,
        report.generation,
        ranks,
    )


def _is_older(report: Report, known: Report) -> bool:
    """Late on its way: the same container had already said more. An agent never goes back to an older generation."""
    if report.agent != known.agent:
        return False
    said, before = report.generation, known.generation
    if said is not None and before is not None and said.id != before.id:
        return said.id < before.id
    return report.order_version < known.order_version


def _progress(state: State, report: Report) -> State:
    """Step, loss and newest checkpoint, from members that speak of the running generation."""
    stage = state.stage
    if not isinstance(stage, Running) or state.generation is None or report.generation != state.generation:
        return state
    member = state.generation.member(report.slot)
    if member is None or member.agent != report.agent:
        return state
    base = stage.resume.step if stage.resume is not None else -1
    step = max((rank.step for rank in report.ranks), default=-1)
    if step > base:
        state = replace(state, progressed=True, step=max(step, state.step if state.progressed else step))
    loss = next((rank.loss for rank in report.ranks if rank.loss is not None), None)
    if loss is not None and step >= state.step:
        state = replace(state, loss=loss)
    return replace(state, committed=_newest(state.committed, report.committed))


def _newest(known: ResumePoint | None, said: ResumePoint | None) -> ResumePoint | None:
    if said is None or (known is not None and _order(said) <= _order(known)):
        return known
    return said


def _order(point: ResumePoint) -> tuple[GenerationId, int]:
    return point.generation, point.step


def _events(known: tuple[str, ...], report: Report) -> tuple[str, ...]:
    """Events once each, in the order in which they came; the oldest are dropped."""
    said: Iterable[str] = (f"slot {report.slot}: {event[:EVENT_CHARS]}" for event in report.events)
    new = tuple(dict.fromkeys(event for event in said if event not in known))
    return (*known, *new)[-EVENTS_KEPT:] if new else known
