"""The rules about time without progress. All of it is evidence from reports: ages that agents measured themselves.

Ages are carried forward by at most a second, also where many agents make heartbeats rarer: what an agent did not say is not
evidence.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from stormjib_runtime.wire import HEARTBEAT_S, Bounds, Cause, Fault, RankPhase, RankState

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from stormjib_runtime.state import Agent, State

FLOOR_S = 2.0
MEDIANS = 3.0
_EXEMPT = frozenset(
    {RankPhase.DATA, RankPhase.EVALUATION, RankPhase.CHECKPOINT, RankPhase.START, RankPhase.END}
)

Seen = tuple[int, RankState, float]
"""(slot, rank that has not exited, seconds to add to its ages)."""


def ranks(state: State, now: float) -> Iterator[Seen]:
    """Every living rank of the generation, as far as agents that are heard report it."""
    for member, agent in state.speaking:
        if not agent.silent(now):
            carry = _carry(agent, now)
            for rank in agent.report.ranks:
                if rank.exit is None:
                    yield member.slot, rank, carry


def _carry(agent: Agent, now: float) -> float:
    return min(now - agent.heard, HEARTBEAT_S)


def short(rank: RankState) -> float:
    """How long a step may last when there is direct evidence beside it."""
    return max(MEDIANS * rank.median_step_s, FLOOR_S)


def stopped(seen: Iterable[Seen]) -> bool | None:
    """Whether no step clock has advanced lately. None where nobody has one."""
    clocks = [(rank, carry) for _, rank, carry in seen if rank.step >= 0]
    if not clocks:
        return None
    return all(rank.step_age_s + carry >= short(rank) for rank, carry in clocks)


def advanced_since(state: State, moment: float, but: int) -> bool:
    """Whether a step was finished after `moment` by a rank of a slot other than `but`."""
    for member, agent in state.speaking:
        if member.slot != but and any(
            rank.step >= 0 and agent.heard - rank.step_age_s > moment for rank in agent.report.ranks
        ):
            return True
    return False


def find(state: State, bounds: Bounds, now: float) -> Fault | None:
    """A rank that hangs, by the best evidence there is."""
    frozen = _frozen(state, now)
    if frozen is not None or _goes_on(state, bounds, now) or not _whole(state, now):
        return frozen
    seen = list(ranks(state, now))
    return (_deadlock(seen) or _backstop(seen, bounds)) if seen else None


def _frozen(state: State, now: float) -> Fault | None:
    """The kernel says that the process is stopped or a zombie."""
    for member, agent in state.speaking:
        for rank in () if agent.silent(now) else agent.report.halted:
            age = rank.process_age_s + _carry(agent, now)
            if age >= short(rank):
                said = f"process state {rank.process} for {age:.1f} s (step {rank.step})"
                return Fault(Cause.RANK_HANG, member.slot, rank.rank, said)
    return None


def _goes_on(state: State, bounds: Bounds, now: float) -> bool:
    """Whether some step is too fresh for any rule below. In a job that is well the first rank says so, out of thousands."""
    return any(
        rank.step >= 0 and rank.step_age_s + carry < min(short(rank), _limit(rank, bounds))
        for _, rank, carry in ranks(state, now)
    )


def _whole(state: State, now: float) -> bool:
    """Whether every member is heard and runs: else the missing one explains why the others stand still."""
    speaking = state.speaking
    return len(speaking) == len(state.members) and not any(agent.silent(now) for _, agent in speaking)


def _deadlock(seen: list[Seen]) -> Fault | None:
    """Every rank says that it is in a step, none finishes it, and none uses the processor.

    Idle time is taken as it was said: whoever begins to compute says nothing until its next heartbeat.
    """
    for _, rank, carry in seen:
        limit = short(rank)
        waits = rank.step >= 0 and rank.phase is RankPhase.STEP  # a first step may wait for anything
        if not waits or rank.step_age_s + carry < limit or rank.idle_s < limit:
            return None
    oldest = max(rank.step_age_s + carry for _, rank, carry in seen)
    return Fault(
        Cause.RANK_HANG, None, None, f"all ranks wait inside a step for {oldest:.1f} s, none computes"
    )


def _backstop(seen: list[Seen], bounds: Bounds) -> Fault | None:
    """No clock moves for far too long, and nobody is known to do something slow."""
    if not bounds.hang.restart or any(rank.listens and rank.phase in _EXEMPT for _, rank, _ in seen):
        return None
    clocks = [one for one in seen if one[1].step >= 0]
    if not clocks or not all(rank.step_age_s + carry > _limit(rank, bounds) for _, rank, carry in clocks):
        return None
    slot, rank, carry = min(clocks, key=lambda one: one[1].step)
    alone = sum(one[1].step == rank.step for one in clocks) == 1
    message = (
        f"no step for {rank.step_age_s + carry:.0f} s (last {rank.step}, median {rank.median_step_s:.3g} s)"
    )
    return Fault(Cause.RANK_HANG, slot if alone else None, rank.rank if alone else None, message)


def _limit(rank: RankState, bounds: Bounds) -> float:
    return max(bounds.hang.factor_percent / 100 * rank.median_step_s, bounds.hang.floor_s)
