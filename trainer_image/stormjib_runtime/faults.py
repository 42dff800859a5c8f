"""Which fault, if any, ends the generation: the best culprit among all that is known at this moment.

First report wins: when one rank dies, the others exit within milliseconds because their connections were reset. What
they report then concerns a generation that is already over, and is no second fault.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from stormjib_health.engine.crash import Exit
from stormjib_health.verdict import Syndrome
from stormjib_runtime import hang
from stormjib_runtime.members import feasible
from stormjib_runtime.wire import (
    EXIT_RESUME_FAILED,
    EXIT_ROLL_BACK,
    EXIT_STOPPED,
    HEARTBEATS_MISSED,
    AgentPhase,
    Bounds,
    Cause,
    Fault,
    Member,
    RankState,
)
from stormjib_runtime.witness import may_replace

if TYPE_CHECKING:
    from collections.abc import Iterator

    from stormjib_health.verdict import Verdict
    from stormjib_runtime.state import Agent, Running, State

CONFIRM_S = 0.25
"""An agent whose connection was only reset asks again within milliseconds; a dead one does not."""
ROOT_S = 0.3
"""Ranks that lose a peer raise within 0.1 s, and their agent may be heard before the peer's."""
FINDING_S = 0.8
"""Samples come every 0.2 s, and one may be lost."""
BLIND_SILENT_S = 30.0
"""Silence that decides where no step clock tells whether the others go on."""
PREPARE_S = 120.0
MESSAGE_BYTES = 1024


def running(state: State, stage: Running, bounds: Bounds, now: float) -> Fault | None:
    """What ends a running generation, planned ends apart."""
    exits = list(_bad_exits(state, stage))
    return (
        _resume_failed(state, stage)
        or _rolled_back(state, now)
        or _replaced(state)
        or (_culprit(state, exits, now) if exits else None)
        or _container_lost(state, now)
        or _silent(state, bounds, now)
        or _failed(state)
        or hang.find(state, bounds, now)
    )


def preparing(state: State, since: float, now: float) -> Fault | None:
    """What ends the preparing of a generation: no rank runs yet, so any lost member does."""
    return (
        _replaced(state)
        or _container_lost(state, now)
        or _silent_before_start(state, now)
        or _failed(state)
        or _too_long(state, since, now)
    )


# --- exits ----------------------------------------------------------------------------------------------------------


def _bad_exits(state: State, stage: Running) -> Iterator[tuple[Member, Agent, RankState, int]]:
    for member, agent in state.speaking:
        for rank in agent.report.ended:
            if rank.exit and rank.exit != EXIT_ROLL_BACK and not _as_asked(stage, agent, rank):
                yield member, agent, rank, rank.exit


def _as_asked(stage: Running, agent: Agent, rank: RankState) -> bool:
    """Whether a planned stop explains the exit. A script that does not listen got SIGTERM: any code will do."""
    if agent.report.phase is AgentPhase.STOPPED:
        return True
    if stage.stop is None:
        return stage.adopted and rank.exit == EXIT_STOPPED
    return rank.exit == EXIT_STOPPED or not rank.listens


def _resume_failed(state: State, stage: Running) -> Fault | None:
    """A point refused once is not refused twice: offered again, it is an exit like any other."""
    if stage.resume is None or stage.resume.digest in state.refused:
        return None
    for member, agent in state.speaking:
        for rank in agent.report.ended:
            if rank.exit == EXIT_RESUME_FAILED:
                said = f"step {stage.resume.step} of {stage.resume.generation} could not be loaded"
                return Fault(Cause.RESUME_OLDER, member.slot, rank.rank, message(said, rank.last_lines))
    return None


def _rolled_back(state: State, now: float) -> Fault | None:
    """The ranks have ended because their numbers are in doubt. What they found comes with a sample, not with the exit:
    nothing is lost by waiting for it, and a node may have to stay out."""
    for member, agent in state.speaking:
        for rank in agent.report.ended:
            if rank.exit != EXIT_ROLL_BACK:
                continue
            found = next((one for one in reversed(state.verdicts) if _of_corruption(state, one)), None)
            if found is not None or now - agent.heard >= FINDING_S:
                slot = found.slots[0] if found is not None and found.slots else member.slot
                who = found.culprits[0] if found is not None and found.culprits else None
                said = found.sentence if found is not None else "numbers are in doubt"
                return Fault(Cause.CORRUPTION, slot, who, message(said, rank.last_lines), found)
    return None


def _of_corruption(state: State, verdict: Verdict) -> bool:
    return verdict.syndrome is Syndrome.CORRUPTION and verdict.generation == str(state.current)


def _culprit(state: State, exits: list[tuple[Member, Agent, RankState, int]], now: float) -> Fault | None:
    """Lost agents explain the exits of others; else a signal does, else who was heard first and did not only lose a peer.

    None while those alone are known that lost one: who went first is heard of in a moment.
    """
    for member, agent in state.seated:
        if agent is not None and agent.lost_at is not None and not agent.report.leaving:
            return _container(member)
        if agent is not None and agent.silent(now):
            return _agent_silent(member, now - agent.heard)
    member, by, rank, code = min(
        exits, key=lambda one: (_lost_a_peer(one[2]), one[3] > 0, one[1].heard, one[2].rank)
    )
    if _lost_a_peer(rank) and now - by.heard < ROOT_S and any(hang.ranks(state, now)):
        return None  # while others live
    return Fault(Cause.RANK_EXIT, member.slot, rank.rank, message(f"exit {code}", rank.last_lines))


def _lost_a_peer(rank: RankState) -> bool:
    return Exit(rank.rank, rank.exit or 0, rank.last_lines, 0.0).victim


# --- agents ---------------------------------------------------------------------------------------------------------


def _replaced(state: State) -> Fault | None:
    """The same pod registered with a higher agent number: its container died and started again."""
    for member in state.members:
        agent = state.agents.get(member.slot)
        if agent is not None and agent.report.pod_uid == member.pod_uid and agent.report.agent > member.agent:
            return _container(member)
    return None


def _container_lost(state: State, now: float) -> Fault | None:
    """A broken connection, not made again. While the others finish steps, somebody trains there and it is only silent."""
    for member, agent in state.seated:
        if agent is None or agent.lost_at is None or agent.report.leaving or now - agent.lost_at < CONFIRM_S:
            continue
        others = (one for one in hang.ranks(state, now) if one[0] != member.slot)
        if hang.stopped(others) or not hang.advanced_since(state, agent.lost_at, member.slot):
            return _container(member)
    return None


def _silent(state: State, bounds: Bounds, now: float) -> Fault | None:
    """A silent agent is a fault only if the others stand still, and only if something can be gained by acting."""
    for member, agent in state.seated:
        silence = silence_of(state, member, agent, bounds, now)
        if (
            silence > _patience(state, agent)
            and (_never_began(state, agent) or _others_stopped(state, member, silence, now))
            and feasible(state, bounds, now)
            and may_replace(state, now)
        ):
            return _agent_silent(member, silence)
    return None


def _patience(state: State, agent: Agent | None) -> float:
    return HEARTBEATS_MISSED * (agent.heartbeat_s if agent is not None else state.heartbeat_s)


def _never_began(state: State, agent: Agent | None) -> bool:
    """It fell silent before it spoke of this generation, so its ranks have not joined, and nobody steps without them."""
    return agent is not None and state.generation is not None and not agent.runs(state.generation)


def silence_of(state: State, member: Member, agent: Agent | None, bounds: Bounds, now: float) -> float:
    """Seconds without a word. A pod that the operator has replaced has been silent for ever."""
    if bounds.slots.get(str(member.slot)) != member.pod_uid:
        return BLIND_SILENT_S + now - state.started
    return now - (agent.heard if agent is not None else state.started)


def _others_stopped(state: State, member: Member, silence: float, now: float) -> bool:
    if len(state.members) == 1:
        return True
    verdict = hang.stopped(one for one in hang.ranks(state, now) if one[0] != member.slot)
    if verdict is not None:
        return verdict
    # Nobody else of this generation has a clock. If nobody at all is heard, it is we who are cut off.
    heard = any(not agent.silent(now) for agent in state.agents.values())
    return heard and silence > BLIND_SILENT_S


def _silent_before_start(state: State, now: float) -> Fault | None:
    for member, agent in state.seated:
        silence = now - (agent.heard if agent is not None else state.started)
        if silence > _patience(state, agent) and may_replace(state, now):
            return _agent_silent(member, silence)
    return None


def _failed(state: State) -> Fault | None:
    for member, agent in state.speaking:
        if agent.report.phase is AgentPhase.FAILED:
            return Fault(
                Cause.PREPARE_FAILED, member.slot, None, message(agent.report.error or "no reason given")
            )
    return None


def _too_long(state: State, since: float, now: float) -> Fault | None:
    if now - since < PREPARE_S or not state.members:
        return None
    said = f"opening the storage and the store took more than {PREPARE_S:.0f} s"
    return Fault(Cause.PREPARE_FAILED, state.members[0].slot, None, said)


def _container(member: Member) -> Fault:
    return Fault(Cause.CONTAINER_EXIT, member.slot, None, f"the container of agent {member.agent} is gone")


def _agent_silent(member: Member, silence: float) -> Fault:
    return Fault(Cause.AGENT_SILENT, member.slot, None, f"nothing heard for {silence:.1f} s")


def message(said: str, last_lines: str = "") -> str:
    """Text for people, at most MESSAGE_BYTES in UTF-8; of the lines the last ones stay."""
    room = MESSAGE_BYTES - len(said.encode("utf-8", "replace")) - 1
    tail = (
        last_lines.encode("utf-8", "replace")[-max(room, 0) :].decode("utf-8", "ignore") if room > 0 else ""
    )
    text = f"{said}\n{tail}" if tail else said
    return text.encode("utf-8", "replace")[:MESSAGE_BYTES].decode("utf-8", "ignore")
