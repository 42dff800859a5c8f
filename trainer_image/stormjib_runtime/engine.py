"""The generation engine: which agents train together, and when that changes.

Pure: every function takes the state, one fact and `now`, and gives the new state. A rule that is not about one fact is
in `decide`, which runs after each of them until nothing changes. `Refused` is raised for what may change nothing.
docs/decisions/0002-generation-engine.md says why the rules are as they are.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from stormjib_health.verdict import Action
from stormjib_runtime import adopt, budget, faults, members, plan, verdicts, witness
from stormjib_runtime.admit import admit, admit_bounds, is_news, merge
from stormjib_runtime.state import (
    Adopting,
    Agent,
    Complete,
    Idle,
    Preparing,
    Refused,
    Running,
    State,
    Suspended,
)
from stormjib_runtime.wire import (
    Bounds,
    Cause,
    Fault,
    Generation,
    GenerationId,
    HistoryEntry,
    Report,
)

if TYPE_CHECKING:
    from collections.abc import Callable

    from stormjib_health.verdict import Verdict

HISTORY_KEPT = 32
REFUSED_KEPT = 64
AUDIBLE = 2
"""Heartbeats: nobody waits for the steps in the memory of a node that has said nothing for so long."""
REST_S = 10.0
"""How long an agent that is no member any more is waited for: its ranks may be of the kind that no signal ends."""


# --- facts ----------------------------------------------------------------------------------------------------------


def decided(before: State, state: State, now: float) -> State:
    """The rules applied to a state with a new fact in it, if that may change a decision: then `revision` has grown."""
    return state if state.revision == before.revision else on_tick(state, now)


def heard(state: State, report: Report, now: float) -> State:
    """An agent said all it knows; `decided` comes next. Raises Refused where it is not of this job, not of its slot, or out of date."""
    admit(state, report)
    before = state.agents.get(report.slot)
    merged = merge(state, report, now)
    if merged is state or not is_news(state, before, report, now):
        return merged
    return _changed(state, adopt.newer(merged, report, now))


def on_poll(state: State, slot: int, agent: int, now: float) -> State:
    """An agent asks for its order: its connection is whole. Raises Refused where it has to report first."""
    known = state.agents.get(slot)
    if known is None:
        raise Refused(404, f"slot {slot} is not registered; report first")
    if agent != known.report.agent:
        raise Refused(409, f"slot {slot} is held by agent {known.report.agent}, not {agent}")
    return state if known.lost_at is None else _with_agent(state, slot, replace(known, lost_at=None))


def lost(state: State, slot: int, agent: int, now: float) -> State:
    """The last connection of an agent broke; `decided` comes next."""
    known = state.agents.get(slot)
    if known is None or known.report.agent != agent or known.lost_at is not None:
        return state
    return _changed(state, _with_agent(state, slot, replace(known, lost_at=now)))


def on_bounds(state: State, bounds: Bounds, now: float) -> State:
    """The operator's will. Raises Refused for what is older, malformed or of another incarnation."""
    if state.bounds == bounds:
        return state
    admit_bounds(state, bounds)
    agents = {
        slot: agent
        for slot, agent in state.agents.items()
        if bounds.slots.get(str(slot)) == agent.report.pod_uid
    }
    stage = state.stage
    if isinstance(stage, Adopting) and stage.since is None:
        stage = replace(stage, since=now)
    new = replace(
        verdicts.renewed(state, bounds),
        bounds=bounds,
        agents=agents,
        stage=stage,
        incarnation=bounds.incarnation,
    )
    return _changed(state, decide(new, now))


def on_verdict(state: State, generation: str, verdict: Verdict, now: float) -> State:
    """The health engine has found something: what the rules say is done at once, if that generation still runs."""
    verdict = replace(verdict, generation=generation)
    if not isinstance(state.stage, Running) or state.bounds is None or generation != str(state.current):
        return _changed(state, verdicts.noted(state, verdict))
    new, fault, action = verdicts.take(state, state.bounds, verdict, now)
    if fault is not None:
        new = _end(new, state.bounds, fault, now, final=action is Action.FAIL)
    return _changed(state, decide(new, now))


def on_tick(state: State, now: float) -> State:
    """Time passed."""
    new = decide(state, now)
    return state if new is state else _changed(state, new)


def _with_agent(state: State, slot: int, agent: Agent) -> State:
    return replace(state, agents={**state.agents, slot: agent})


def _changed(old: State, new: State) -> State:
    """Count the change: `revision` in any case, `version` where somebody's order is another one now."""
    orders = _order_key(old) != _order_key(new)
    return replace(new, revision=old.revision + 1, version=old.version + int(orders))


def _order_key(state: State) -> tuple[object, ...]:
    leaving = frozenset(slot for slot, agent in state.agents.items() if agent.report.leaving)
    finish = state.bounds is not None and state.bounds.finish
    return (state.stage, state.current, state.incarnation, finish, leaving)


# --- rules ----------------------------------------------------------------------------------------------------------


def decide(state: State, now: float) -> State:
    """Apply the rules until none applies. Every rule that applies changes the stage, and they form no circle."""
    if state.bounds is None or state.incarnation == 0:
        return state
    while True:
        new = _RULES[type(state.stage)](state, verdicts.allowed(state, state.bounds, now), now)
        if new is state:
            return state
        state = new


def _adopting(state: State, bounds: Bounds, now: float) -> State:
    return adopt.settle(state, bounds, now)


def _idle(state: State, bounds: Bounds, now: float) -> State:
    idle = state.stage
    if not isinstance(idle, Idle):
        return state
    if bounds.suspend:
        return replace(state, stage=Suspended(None if idle.cause is Cause.START else idle))
    if exhausted(state, bounds, idle) or now < idle.not_before or _storage_is_ahead(state):
        return state
    chosen = members.candidates(state, bounds, now, fresh=idle.fresh)
    if idle.fresh and (len(chosen) >= bounds.min_replicas) != (idle.enough_since is not None):
        idle = replace(idle, enough_since=now if idle.enough_since is None else None)
        state = replace(state, stage=idle)
    if witness.may_replace(state, now) and members.may_begin(state, bounds, idle, chosen, now):
        return _begin(state, idle, chosen, now)
    return state


def exhausted(state: State, bounds: Bounds, idle: Idle) -> bool:
    """The next generation would have to be paid for, and nothing is left; or the rules say that this is the end."""
    return idle.final or (idle.cause.counted and budget.restarts_left(bounds, state.history) <= 0)


def _storage_is_ahead(state: State) -> bool:
    """Somebody's generations on the storage are not below ours: the operator has to raise the incarnation."""
    found = state.storage
    return state.generation is None and found is not None and found.generation >= _next(state)


def _next(state: State) -> GenerationId:
    return GenerationId(state.incarnation, state.number + 1)


def _begin(state: State, idle: Idle, chosen: tuple[int, ...], now: float) -> State:
    """A new generation: from here on nothing of an older one counts."""
    picked = tuple(members.member(state.agents[slot]) for slot in chosen)
    planned = state.bounds.replicate.get(str(len(picked)), 0) if state.bounds else 0
    generation = Generation(_next(state), _parent(state), picked, idle.cause, planned)
    entry = HistoryEntry(generation, None, idle.cause.counted, idle.fault)
    return replace(
        state,
        number=state.number + 1,
        generation=generation,
        history=_kept(state, (*state.history, entry)),
        stage=Preparing(now),
        progressed=False,
    )


def _parent(state: State) -> GenerationId | None:
    """The generation to continue: the newest known, here or on the storage."""
    known = [state.generation.id] if state.generation else []
    found = state.storage
    ours = found is not None and (found.job_uid == state.job_uid or state.generation is None)
    if found is not None and ours and found.generation < _next(state):
        known.append(found.generation)
    return max(known, default=None)


def _kept(state: State, history: tuple[HistoryEntry, ...]) -> tuple[HistoryEntry, ...]:
    """History that the budget no longer needs, because the operator has counted it, is kept only for a while."""
    above = state.bounds.counted_above if state.bounds else GenerationId(0, 0)
    last = len(history) - HISTORY_KEPT
    return tuple(entry for i, entry in enumerate(history) if i >= last or entry.generation.id > above)


def _preparing(state: State, bounds: Bounds, now: float) -> State:
    stage = state.stage
    if not isinstance(stage, Preparing) or state.generation is None:
        return state
    if bounds.suspend:
        return replace(state, stage=Suspended())
    fault = faults.preparing(state, stage.since, now)
    if fault is not None:
        return _end(state, bounds, fault, now)
    if plan.leaving(state) or plan.too_many(state, bounds):
        return replace(
            state, stage=Idle(now, Cause.LEAVE if plan.leaving(state) else Cause.SHRINK, fresh=False)
        )
    if not stage.at_rest:
        return replace(state, stage=Preparing(now, at_rest=True)) if _at_rest(state, stage, now) else state
    first = state.agent(state.members[0])
    if first is None or not first.runs(state.generation) or not first.report.store:
        return state
    if first.report.phase not in adopt.OPEN:
        return state
    resume = first.report.resume
    begun = replace(state.history[-1], resume=resume)
    return replace(
        state,
        stage=Running(now, first.report.store, resume),
        committed=resume,
        history=(*state.history[:-1], begun),
    )


def _at_rest(state: State, stage: Preparing, now: float) -> bool:
    """Whoever is waited for holds nothing older: its ranks have ended, and what they had staged is on the storage."""
    seated = {member.slot for member in state.members}
    return all(
        agent.lost_at is not None
        or now - agent.heard > AUDIBLE * agent.heartbeat_s
        or (slot not in seated and now - stage.since > REST_S)
        or agent.report.generation is None
        or (state.generation is not None and agent.runs(state.generation))
        for slot, agent in state.agents.items()
    )


def _running(state: State, bounds: Bounds, now: float) -> State:
    stage = state.stage
    if not isinstance(stage, Running):
        return state
    if _all_done(state, stage):
        return replace(state, stage=Complete(stage))
    fault = faults.running(state, stage, bounds, now)
    if fault is not None:
        return _end(state, bounds, fault, now)
    stop = plan.wanted(state, stage, bounds, now)
    if stop is not None:
        stage = replace(stage, stop=stop)
        return replace(state, stage=stage)
    return _planned_end(state, stage, now)


def _all_done(state: State, stage: Running) -> bool:
    """Every rank exited 0 by itself. Under a planned stop only a script that listens can mean that it is done."""
    for _, agent in state.seated:
        if (
            agent is None
            or state.generation is None
            or not agent.runs(state.generation)
            or not agent.report.ranks
        ):
            return False
        if any(rank.exit != 0 or (stage.stop and not rank.listens) for rank in agent.report.ranks):
            return False
    return True


def _planned_end(state: State, stage: Running, now: float) -> State:
    if stage.stop is None or not plan.is_over(state, stage.stop, now):
        return state
    if state.bounds is not None and state.bounds.suspend:
        return replace(state, stage=Suspended())
    cause = Cause.LEAVE if plan.leaving(state) else stage.stop.cause
    return replace(state, stage=Idle(now, cause, fresh=False), barren=0 if state.progressed else state.barren)


def _end(state: State, bounds: Bounds, fault: Fault, now: float, *, final: bool = False) -> State:
    """The generation is over. Orders say so at once; the next one begins when the rules of Idle allow it."""
    counted = fault.cause.counted
    barren = 0 if state.progressed else state.barren + int(counted)
    refused = state.refused
    if fault.cause is Cause.RESUME_OLDER and isinstance(state.stage, Running) and state.stage.resume:
        refused = (*refused, state.stage.resume.digest)[-REFUSED_KEPT:]
    not_before = now + budget.delay(bounds, barren) if counted else now
    idle = Idle(now, fault.cause, fault, not_before, final, fresh=False)
    return replace(state, stage=idle, barren=barren, refused=refused, last_fault=fault)


def _suspended(state: State, bounds: Bounds, now: float) -> State:
    stage = state.stage
    if not isinstance(stage, Suspended) or bounds.suspend:
        return state
    cause = Cause.RESUME if state.generation else Cause.START
    then = stage.then or Idle(now, cause)
    return replace(state, stage=replace(then, since=now, fresh=True, enough_since=None))


def _complete(state: State, bounds: Bounds, now: float) -> State:
    return state


_RULES: dict[type, Callable[[State, Bounds, float], State]] = {
    Adopting: _adopting,
    Idle: _idle,
    Preparing: _preparing,
    Running: _running,
    Suspended: _suspended,
    Complete: _complete,
}
