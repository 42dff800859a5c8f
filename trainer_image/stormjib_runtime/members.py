"""Who may be a member of the next generation, and on which node rank."""

from __future__ import annotations

from typing import TYPE_CHECKING

from stormjib_runtime.state import Agent, Idle, State, is_ready
from stormjib_runtime.wire import AgentPhase, Bounds, Member

if TYPE_CHECKING:
    from collections.abc import Collection

START_WAIT_S = 30.0
"""How long a start waits for the full number once the smallest one is there, and for a zygote that still imports."""
ADDRESS_CHARS = 64
"""Longer than any address and port."""
LOWER_WAIT_S = 10.0
"""How long a start waits for a low slot where a higher one, meant as a spare, is ready first."""


def choose(
    before: tuple[int, ...], returning: Collection[int], new: Collection[int], size: int
) -> tuple[int, ...]:
    """Slots in node-rank order, at most `size`.

    `before` are the slots of the generation before; of them, `returning` can go on and keep their order. A slot out of
    `new`, lowest first, takes the place of one that is lost; what is left of `new` is appended.
    """
    spares = sorted(set(new) - set(before))
    wanted = max(0, size - sum(slot in returning for slot in before))
    chosen: list[int] = []
    for slot in before:
        if slot in returning:
            chosen.append(slot)
        elif spares and wanted > 0:
            chosen.append(spares.pop(0))
            wanted -= 1
    return tuple((chosen + spares[:wanted])[:size])


def usable(agent: Agent, bounds: Bounds, now: float) -> bool:
    """Whether an agent can be a member: heard, allowed, staying, with a zygote."""
    report = agent.report
    return (
        is_ready(agent)
        and agent.lost_at is None
        and not agent.silent(now)
        and not report.leaving
        and report.pod_uid not in bounds.excluded
        and report.processes == bounds.processes
    )


def candidates(state: State, bounds: Bounds, now: float, *, fresh: bool) -> tuple[int, ...]:
    """The slots of the best generation that could begin now; may be fewer than allowed. Of members that go on and are too many for an
    allowed size, the last become spares."""
    before = () if fresh else tuple(member.slot for member in state.members)
    can = {slot for slot, agent in state.agents.items() if usable(agent, bounds, now)}
    new = {slot for slot in can if state.agents[slot].report.phase is AgentPhase.IDLE}
    found = choose(before, can & set(before), new, bounds.replicas)
    return choose(before, can & set(before), new, bounds.fitting(len(found)))


def feasible(state: State, bounds: Bounds, now: float) -> bool:
    """Whether a generation without those who are lost now could begin at all."""
    return len(candidates(state, bounds, now, fresh=False)) >= bounds.min_replicas


def may_begin(state: State, bounds: Bounds, idle: Idle, chosen: tuple[int, ...], now: float) -> bool:
    """Whether to begin with `chosen`, or to wait for somebody who is likely to come."""
    if len(chosen) < bounds.min_replicas:
        return False
    if idle.fresh:
        waited = now - (now if idle.enough_since is None else idle.enough_since)
        return waited >= _start_wait(bounds, chosen)
    if len(chosen) >= min(bounds.replicas, len(state.members)):
        return True
    missing = [member for member in state.members if member.slot not in chosen]
    return all(now >= _patience(state.agents.get(member.slot), bounds, idle) for member in missing)


def _start_wait(bounds: Bounds, chosen: tuple[int, ...]) -> float:
    """The full number begins; where a spare was quicker than a slot below it, that one gets a moment."""
    if len(chosen) < bounds.replicas:
        return START_WAIT_S
    lowest = sorted(int(slot) for slot in bounds.slots)[: bounds.replicas]
    return 0.0 if list(chosen) == lowest else LOWER_WAIT_S


def _patience(agent: Agent | None, bounds: Bounds, idle: Idle) -> float:
    """Until when to wait for the slot of a member that is lost: only a container that died comes back soon."""
    if (
        agent is None
        or agent.report.leaving
        or agent.report.preflight
        or agent.report.pod_uid in bounds.excluded
    ):
        return idle.since
    if agent.lost_at is not None:
        return idle.since + bounds.shrink_after_s
    return idle.since if is_ready(agent) else idle.since + START_WAIT_S


def member(agent: Agent) -> Member:
    """The agent as a generation names it."""
    report = agent.report
    known = len(report.copies) <= ADDRESS_CHARS and len(report.node) <= ADDRESS_CHARS
    where = (report.copies, report.node) if known else ("", "")
    return Member(report.slot, report.agent, report.pod_uid, report.address, report.processes, *where)
