"""A coordinator that comes new to a running job: it lets everybody go on, listens, and takes over what it finds.

Nothing is begun or ended before it is sure that it knows the newest generation: an agent that was cut off may still
run an older one, and to restart from that would lose what the newer one has committed.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from stormjib_runtime.state import Adopting, Agent, Idle, Preparing, Running, State
from stormjib_runtime.wire import AgentPhase, Bounds, Cause, Generation, HistoryEntry, Report

if TYPE_CHECKING:
    from stormjib_runtime.state import Stage

ADOPT_S = 10.0
"""Every agent that can be reached has registered by then."""
OPEN = frozenset({AgentPhase.PREPARED, AgentPhase.RUNNING, AgentPhase.STOPPED})
"""Phases that prove that the generation was opened."""
_BEGUN = frozenset({AgentPhase.RUNNING, AgentPhase.STOPPED})


def settle(state: State, bounds: Bounds, now: float) -> State:
    """End the listening, once enough is known."""
    stage = state.stage
    if not isinstance(stage, Adopting) or stage.since is None:
        return state
    found = _newest(state)
    if now - stage.since < ADOPT_S and not _knows_enough(state, bounds, found):
        return state
    if found is not None:
        return _take(state, found, now)
    fresh = state.generation is None or stage.cause is Cause.RESUME
    return replace(state, stage=Idle(now, stage.cause, stage.fault, fresh=fresh))


def newer(state: State, report: Report, now: float) -> State:
    """An agent came late, with a generation newer than what was adopted: that one is the job's.

    Once a generation of our own has begun there can be none.
    """
    found = _claim(report)
    ours = state.generation is not None and state.current.incarnation == state.incarnation
    if isinstance(state.stage, Adopting) or ours or found is None or found.id <= state.current:
        return state
    return _take(state, found, now)


def _claim(report: Report) -> Generation | None:
    """The open generation in which the reporting container itself is a member."""
    found = report.generation
    if found is None or report.phase not in OPEN:
        return None
    me = (report.slot, report.agent, report.pod_uid)
    return found if me in [(m.slot, m.agent, m.pod_uid) for m in found.members] else None


def _newest(state: State) -> Generation | None:
    claims = (_claim(agent.report) for agent in state.agents.values())
    known = (found for found in claims if found is not None and found.id >= state.current)
    return max(known, key=lambda found: found.id, default=None)


def _knows_enough(state: State, bounds: Bounds, found: Generation | None) -> bool:
    """Everybody has spoken; or all members of the newest one have, and the rest is too few to run another."""
    absent = {int(slot) for slot in bounds.slots} - state.agents.keys()
    if not absent:
        return True
    if found is None or len(absent) >= bounds.min_replicas:
        return False
    return all(
        agent is not None and agent.runs(found) for _, agent in replace(state, generation=found).seated
    )


def _take(state: State, found: Generation, now: float) -> State:
    """Go on with `found` as if it had been begun here."""
    new = replace(state, generation=found, progressed=False)
    if found.id.incarnation == state.incarnation:
        new = replace(new, number=max(state.number, found.id.number))
    speaking = [agent for _, agent in new.seated if agent is not None and agent.runs(found)]
    told = [agent.report for agent in speaking if agent.report.phase in _BEGUN]
    resume = next((report.resume for report in told if report.resume is not None), None)
    base = resume.step if resume is not None else -1
    progressed = any(rank.step > base for report in told for rank in report.ranks)
    if not state.history or state.history[-1].generation.id < found.id:
        entry = HistoryEntry(found, resume, found.cause.counted)
        new = replace(new, history=(*state.history, entry))
    return replace(new, stage=_stage(new, speaking, told, now), progressed=progressed)


def _stage(state: State, speaking: list[Agent], told: list[Report], now: float) -> Stage:
    if not told:
        return Preparing(now, at_rest=True)  # perhaps opened already, and that can be done once only
    absent = [agent for _, agent in state.seated if agent is not None and agent not in speaking]
    if absent:
        # Told to end while the others were not, or never told to begin: its ranks cannot join those of the others.
        return Idle(now, fresh=False)
    store = next((agent.report.store for agent in speaking if agent.report.store), "")
    resume = next((report.resume for report in told if report.resume is not None), None)
    return Running(now, store, resume, adopted=True)
