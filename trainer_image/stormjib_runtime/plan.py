"""Planned ends of a generation: somebody leaves, the job is resized or suspended, a lost node came back."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from stormjib_runtime import hang
from stormjib_runtime.members import candidates
from stormjib_runtime.state import Running, State, Stop
from stormjib_runtime.wire import EXIT_STOPPED, AgentPhase, Bounds, Cause

if TYPE_CHECKING:
    from stormjib_runtime.state import Agent
    from stormjib_runtime.wire import RankState

ANNOUNCE_S = 0.5
"""A stop is announced this far ahead, so that the page is written before the step is reached."""
NEAR_S = 2.0
"""Growing waits for a checkpoint; the stop is announced when it is this near, so that other plans stay open till then."""
STOP_WAIT_S = 60.0
"""Beside three times the steps still to go: what saving may take before the plan goes on without."""


def wanted(state: State, stage: Running, bounds: Bounds, now: float) -> Stop | None:
    """The stop to announce now, or None. It keeps its cause and step once announced."""
    if stage.stop is not None:
        return None
    cause = _cause(state, stage, bounds)
    if cause is None and not _may_grow(state, bounds, now):
        return None
    step, margin, median = horizon(state, stage, now)
    if cause is not None:
        return _stop(cause, step + margin, margin, median, now)
    after = _grow_after(state, bounds, step, margin, median)
    return None if after is None else _stop(Cause.GROW, after, after - step, median, now)


def _cause(state: State, stage: Running, bounds: Bounds) -> Cause | None:
    """Why the generation must not go on as it is; the cause of the next one."""
    if bounds.suspend:
        return Cause.RESUME
    if leaving(state):
        return Cause.LEAVE
    if any(member.pod_uid in bounds.excluded for member in state.members):
        return Cause.LEAVE
    if too_many(state, bounds):
        return Cause.SHRINK
    return Cause.RESUME if stage.adopted and _stopping_already(state) else None


def too_many(state: State, bounds: Bounds) -> bool:
    """Whether the generation is larger than any that is allowed now of its members."""
    return len(state.members) > bounds.fitting(len(state.members))


def leaving(state: State) -> bool:
    """Whether a member has announced that it leaves."""
    return any(agent is not None and agent.report.leaving for _, agent in state.seated)


def horizon(state: State, stage: Running, now: float) -> tuple[int, int, float]:
    """(newest step, steps until a stop that every rank will see in time, median step time)."""
    ranks = [(rank, now - agent.heard) for _, agent in state.seated if agent for rank in agent.report.ranks]
    begun = stage.resume.step if stage.resume is not None else 0
    step = max([begun, *(rank.step for rank, _ in ranks)])
    median = max((rank.median_step_s for rank, _ in ranks), default=0.0)
    margin = max((_margin(rank, age) for rank, age in ranks), default=2)
    return step, margin, median


def _margin(rank: RankState, age: float) -> int:
    ahead = ANNOUNCE_S + min(age, hang.FLOOR_S)  # it went on stepping since its report
    return max(2, math.ceil(ahead / rank.median_step_s)) if rank.median_step_s > 0 else 2


def _stop(cause: Cause, stop_after: int, steps: int, median: float, now: float) -> Stop:
    return Stop(cause, stop_after, now + STOP_WAIT_S + hang.MEDIANS * median * (steps + 1))


def _stopping_already(state: State) -> bool:
    """The coordinator before this one had asked for a stop, and some ranks have obeyed."""
    return any(
        agent is not None
        and (
            agent.report.phase is AgentPhase.STOPPED
            or any(rank.exit == EXIT_STOPPED for rank in agent.report.ranks)
        )
        for _, agent in state.seated
    )


def _may_grow(state: State, bounds: Bounds, now: float) -> bool:
    if not state.progressed or len(state.members) >= bounds.replicas:
        return False
    return len(candidates(state, bounds, now, fresh=False)) > len(state.members)


def _grow_after(state: State, bounds: Bounds, step: int, margin: int, median: float) -> int | None:
    """The step after which to stop in order to grow: the next checkpoint, once it is near."""
    if not _listens(state):
        return step + margin if _just_committed(state, step, margin) else None
    interval = max(bounds.interval_steps, 1)
    after = math.ceil((step + margin) / interval) * interval
    near = margin + (math.ceil(NEAR_S / median) if median > 0 else interval)
    return after if after - step <= near else None


def is_over(state: State, stop: Stop, now: float) -> bool:
    """Whether the planned end is reached, or cannot be any more."""
    return _all_stopped(state) or _left_early(state) or now >= stop.deadline


def _all_stopped(state: State) -> bool:
    return all(agent is not None and _has_stopped(state, agent) for _, agent in state.seated)


def _has_stopped(state: State, agent: Agent) -> bool:
    """Its ranks have ended as asked; or it never began, has obeyed the stop, and holds nothing."""
    if state.generation is not None and agent.runs(state.generation):
        return agent.report.phase is AgentPhase.STOPPED
    return agent.report.generation is None and agent.report.order_version >= state.order_version


def _left_early(state: State) -> bool:
    """A leaver is gone before it had stopped: its grace period was over. The others cannot reach the step any more."""
    return any(
        agent is not None
        and agent.report.leaving
        and agent.lost_at is not None
        and agent.report.phase is not AgentPhase.STOPPED
        for _, agent in state.seated
    )


def _listens(state: State) -> bool:
    return any(rank.listens for _, agent in state.seated if agent for rank in agent.report.ranks)


def _just_committed(state: State, step: int, margin: int) -> bool:
    """A script that does not listen is killed by the stop: only right behind a checkpoint is that cheap."""
    point = state.committed
    return point is not None and point.generation == state.current and step - point.step <= margin
