"""What each agent shall do, and what the operator is told: both follow from the state alone."""

from __future__ import annotations

from dataclasses import replace
from itertools import islice
from typing import TYPE_CHECKING

from stormjib_runtime import budget
from stormjib_runtime.engine import exhausted
from stormjib_runtime.members import ADDRESS_CHARS
from stormjib_runtime.state import (
    Adopting,
    Agent,
    Complete,
    Idle,
    Preparing,
    Running,
    State,
    Suspended,
    is_ready,
)
from stormjib_runtime.wire import (
    PROTOCOL,
    AgentPhase,
    AgentView,
    Do,
    GenerationId,
    HistoryEntry,
    JobPhase,
    JobState,
    Order,
)

if TYPE_CHECKING:
    from stormjib_runtime.wire import ResumePoint

HISTORY_SENT = 64
"""Entries of history in one answer: the operator asks again above the last one."""
PEERS = 2


def state_version(state: State) -> int:
    """Grows with every change that the operator may want to see at once."""
    return (state.incarnation << 40) + state.revision


def order_for(state: State, slot: int) -> Order:
    """The order for the agent that holds `slot`."""
    agent = state.agents[slot]
    order = _order_for(state, slot, agent)
    return order if is_ready(agent) else replace(order, peers=_peers(state, slot))


def _peers(state: State, slot: int) -> tuple[str, ...]:
    """Measuring servers of those that train, or of all that are here while nobody does. Each slot begins at another one, so that no peer gets all."""
    members = [member.slot for member in state.members] or list(state.agents)
    found = (_measures(state, slot, members[(slot + 1 + i) % len(members)]) for i in range(len(members)))
    return tuple(islice(filter(None, found), PEERS))


def _measures(state: State, slot: int, other: int) -> str:
    agent = state.agents.get(other)
    if agent is None or other == slot or agent.lost_at is not None or agent.report.preflight:
        return ""
    return agent.report.measures if len(agent.report.measures) <= ADDRESS_CHARS else ""


def _order_for(state: State, slot: int, agent: Agent) -> Order:
    stage = state.stage
    if isinstance(stage, Adopting):
        return _carry_on(state, agent)
    if _is_over(state) or (agent.report.leaving and not _is_member(state, agent)):
        return _order(state, Do.FINISH)
    if isinstance(stage, Complete):
        stage = stage.running
    if isinstance(stage, Preparing):
        first = stage.at_rest and state.members[0].slot == slot
        return _order(state, Do.PREPARE if first else Do.WAIT, refused=state.refused if first else ())
    if isinstance(stage, Running) and _is_member(state, agent):
        return _run(state, stage, agent)
    return _order(state, Do.WAIT)


def _run(state: State, stage: Running, agent: Agent) -> Order:
    runs = state.generation is not None and agent.runs(state.generation)
    if not stage.store and not runs:
        return _order(state, Do.WAIT)  # adopted, and its first member has not told the store yet
    if stage.stop is None:
        left = 0 if state.bounds is None else max(0, budget.restarts_left(state.bounds, state.history))
        return _order(state, Do.RUN, store=stage.store, resume=stage.resume, restarts_left=left)
    return _order(
        state,
        Do.STOP,
        store=stage.store,
        resume=stage.resume,
        stop_after=stage.stop.stop_after,
        end_leaving=agent.report.leaving,
    )


def _order(
    state: State,
    do: Do,
    *,
    store: str = "",
    resume: ResumePoint | None = None,
    refused: tuple[str, ...] = (),
    stop_after: int = 0,
    end_leaving: bool = False,
    restarts_left: int = 0,
) -> Order:
    return Order(
        protocol=PROTOCOL,
        incarnation=state.incarnation,
        version=state.order_version,
        do=do,
        generation=None if do in (Do.WAIT, Do.FINISH) else state.generation,
        store=store,
        resume=resume,
        refused=refused,
        stop_after=stop_after,
        end_leaving=end_leaving,
        restarts_left=restarts_left,
        heartbeat_s=state.heartbeat_s,
    )


def _carry_on(state: State, agent: Agent) -> Order:
    """While a new coordinator listens, whoever runs something goes on with it."""
    do = {AgentPhase.RUNNING: Do.RUN, AgentPhase.PREPARED: Do.PREPARE, AgentPhase.STOPPED: Do.STOP}
    report = agent.report
    return Order(
        protocol=PROTOCOL,
        incarnation=state.incarnation,
        version=state.order_version,
        do=do.get(report.phase, Do.WAIT) if report.generation else Do.WAIT,
        generation=report.generation,
        store=report.store,
        resume=report.resume,
        stop_after=1 if report.phase is AgentPhase.STOPPED else 0,
        heartbeat_s=state.heartbeat_s,
    )


def _is_member(state: State, agent: Agent) -> bool:
    """Of a generation that is alive."""
    if state.generation is None or not isinstance(state.stage, Preparing | Running | Complete):
        return False
    member = state.generation.member(agent.report.slot)
    return member is not None and member.agent == agent.report.agent


def _is_over(state: State) -> bool:
    """The job has ended, and the operator has written it down."""
    if state.bounds is None or not state.bounds.finish:
        return False
    return phase(state, float("inf")) in (JobPhase.COMPLETE, JobPhase.EXHAUSTED)


def phase(state: State, now: float) -> JobPhase:
    """The one word for where the job is."""
    stage = state.stage
    if isinstance(stage, Complete):
        return JobPhase.COMPLETE
    if isinstance(stage, Suspended):
        return JobPhase.SUSPENDED
    if isinstance(stage, Preparing):
        return JobPhase.STARTING
    if isinstance(stage, Running):
        if stage.stop is not None:
            return JobPhase.STOPPING
        return JobPhase.RUNNING if state.progressed else JobPhase.STARTING
    if isinstance(stage, Adopting) and any(
        a.report.phase is AgentPhase.RUNNING for a in state.agents.values()
    ):
        return JobPhase.RUNNING
    if isinstance(stage, Idle) and state.bounds is not None and exhausted(state, state.bounds, stage):
        return JobPhase.EXHAUSTED
    return JobPhase.BACKOFF if isinstance(stage, Idle) and now < stage.not_before else JobPhase.WAITING


def job_state(state: State, now: float, above: GenerationId | None = None) -> JobState:
    """What the operator sees; of the history only what is newer than `above`, and not all at once."""
    return JobState(
        protocol=PROTOCOL,
        job_uid=state.job_uid,
        incarnation=state.incarnation,
        version=state_version(state),
        phase=phase(state, now),
        bounds_version=state.bounds.version if state.bounds else 0,
        generation=state.generation,
        history=_above(state.history, above),
        agents=tuple(_view(state, agent, now) for _, agent in sorted(state.agents.items())),
        step=state.step,
        loss=state.loss,
        committed=state.committed,
        storage=state.storage,
        last_fault=state.last_fault,
        events=state.events,
        verdicts=state.verdicts,
        unwanted=state.unwanted,
        accusations=state.accusations,
    )


def _above(history: tuple[HistoryEntry, ...], above: GenerationId | None) -> tuple[HistoryEntry, ...]:
    newer = history if above is None else tuple(one for one in history if one.generation.id > above)
    return newer[:HISTORY_SENT]


def _view(state: State, agent: Agent, now: float) -> AgentView:
    report = agent.report
    return AgentView(
        slot=report.slot,
        agent=report.agent,
        pod_uid=report.pod_uid,
        phase=report.phase,
        member=_is_member(state, agent),
        silent_s=round(max(0.0, now - agent.heard), 3),
        leaving=report.leaving,
    )
