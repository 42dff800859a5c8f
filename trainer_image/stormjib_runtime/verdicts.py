"""What a verdict of the health engine changes: who is unwanted, what is asked of the operator, whether the generation ends.

Pure. The rules (`stormjib_health.policy`) say which action; here it becomes state. A node that the job cannot do without
is restarted in place until there is another: an order that cannot be obeyed would stop a job that can train.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from stormjib_health import policy
from stormjib_health.verdict import SURE, Accusation, Action, Scope, Syndrome
from stormjib_runtime.members import feasible
from stormjib_runtime.wire import Bounds, Cause, Fault

if TYPE_CHECKING:
    from stormjib_health.verdict import Verdict
    from stormjib_runtime.state import State

VERDICTS_KEPT = 16
LATE = 1.5
"""Heartbeats: an agent that was not heard for so long has missed one."""
UNWANTED_KEPT = 64
ACCUSATIONS_KEPT = 16

_CAUSES = {
    Syndrome.CRASH: Cause.RANK_EXIT,
    Syndrome.NON_COMMUNICATION_HANG: Cause.RANK_HANG,
    Syndrome.COMMUNICATION_HANG: Cause.COMMUNICATION_HANG,
    Syndrome.CORRUPTION: Cause.CORRUPTION,
    Syndrome.DESYNC: Cause.DESYNC,
}
_STEPS_ON = (frozenset(Syndrome) - _CAUSES.keys()) | {Syndrome.CORRUPTION}
"""Trouble with which the job goes on: who shall go leaves as planned, and no step is lost. Ranks that must not go on with
numbers that are wrong end by themselves."""
_TAKES_OUT = frozenset({Action.REPLACE, Action.ISOLATE, Action.SHRINK})


def take(state: State, bounds: Bounds, verdict: Verdict, now: float) -> tuple[State, Fault | None, Action]:
    """The state with the verdict in it; the fault that ends the generation, or None; and the action that the rules chose.

    A verdict about a trouble that is known replaces the one before; what was done about it is not done twice, because it has
    ended the generation, or is in the state already. One about a node whose agent is not heard is only noted: a generation begun now would have that node in it, and the rule for
    silent agents decides within a heartbeat or two, and leaves it out.
    """
    before = _known(state, verdict)
    pods = _pods(state, verdict)
    if _strikes(verdict) and (before is None or not _strikes(before)):
        state = replace(state, strikes=_struck(state, pods))
    action = _action(state, bounds, verdict, pods)
    state = noted(state, verdict)
    if action is Action.NOTE or _unheard(state, verdict, now):
        return state, None, Action.NOTE
    return _acted(state, bounds, verdict, pods, action), _fault(verdict, action), action


def noted(state: State, verdict: Verdict) -> State:
    """The state with the verdict among what was found."""
    others = [one for one in state.verdicts if (one.generation, one.id) != (verdict.generation, verdict.id)]
    return replace(state, verdicts=(*others, verdict)[-VERDICTS_KEPT:])


def allowed(state: State, bounds: Bounds, now: float) -> Bounds:
    """The operator's bounds less what the rules have taken out, as far as a generation remains possible."""
    if state.most is not None:
        bounds = replace(bounds, replicas=max(bounds.min_replicas, min(bounds.replicas, state.most)))
    if not state.unwanted:
        return bounds
    narrow = replace(bounds, excluded=(*bounds.excluded, *state.unwanted))
    return narrow if feasible(state, narrow, now) else bounds


def renewed(state: State, bounds: Bounds) -> State:
    """New bounds: pods that are no more are forgotten, and a new spec may be as large as it says."""
    here = set(bounds.slots.values())
    resized = state.bounds is not None and bounds.spec_generation != state.bounds.spec_generation
    return replace(
        state,
        unwanted=tuple(uid for uid in state.unwanted if uid in here),
        strikes={uid: count for uid, count in state.strikes.items() if uid in here},
        most=None if resized else state.most,
    )


def _strikes(verdict: Verdict) -> bool:
    """It is held against a node: it stopped the job, or a check has confirmed it. A shared machine slows many a rank for a while."""
    return verdict.confidence >= SURE and (verdict.confirmed or verdict.syndrome in _CAUSES)


def _known(state: State, verdict: Verdict) -> Verdict | None:
    same = (one for one in state.verdicts if (one.generation, one.id) == (verdict.generation, verdict.id))
    return next(same, None)


def _pods(state: State, verdict: Verdict) -> tuple[str, ...]:
    """Whom the verdict blames. A link is between two nodes, and neither has to be at fault."""
    if verdict.scope not in (Scope.RANK, Scope.NODE) or verdict.software:
        return ()
    return tuple(member.pod_uid for member in state.members if member.slot in verdict.slots)


def _unheard(state: State, verdict: Verdict, now: float) -> bool:
    agents = (state.agents.get(slot) for slot in verdict.slots)
    return any(agent is None or now - agent.heard > LATE * agent.heartbeat_s for agent in agents)


def _struck(state: State, pods: tuple[str, ...]) -> dict[str, int]:
    return {**state.strikes, **{uid: state.strikes.get(uid, 0) + 1 for uid in pods}}


def _action(state: State, bounds: Bounds, verdict: Verdict, pods: tuple[str, ...]) -> Action:
    strikes = max((state.strikes.get(uid, 0) for uid in pods), default=0)
    return policy.act(verdict, bounds.rules, strikes)


def _acted(state: State, bounds: Bounds, verdict: Verdict, pods: tuple[str, ...], action: Action) -> State:
    if action in _TAKES_OUT:
        unwanted = tuple(dict.fromkeys((*state.unwanted, *pods)))[-UNWANTED_KEPT:]
        state = replace(state, unwanted=unwanted)
    if action is Action.SHRINK:
        state = replace(state, most=max(bounds.min_replicas, len(state.members) - len(pods)))
    if action is Action.ISOLATE:
        state = replace(state, accusations=_accused(state, verdict))
    if action is Action.ROLL_BACK:
        state = _refuse_newest(state)
    return state


def _accused(state: State, verdict: Verdict) -> tuple[Accusation, ...]:
    number = max((one.id for one in state.accusations), default=0)
    weight = policy.weight(verdict)
    told = {(one.generation, one.verdict.id, one.pod_uid) for one in state.accusations}
    new = [
        Accusation(number + 1 + i, verdict.generation, member.slot, member.pod_uid, verdict, weight)
        for i, member in enumerate(one for one in state.members if one.slot in verdict.slots)
        if (verdict.generation, verdict.id, member.pod_uid) not in told
    ]
    return (*state.accusations, *new)[-ACCUSATIONS_KEPT:]


def _refuse_newest(state: State) -> State:
    """What this generation has committed last may hold what is wrong; what it resumed from did not."""
    point = state.committed
    if point is None or point.generation != state.current or point.digest in state.refused:
        return state
    return replace(state, refused=(*state.refused, point.digest))


def _fault(verdict: Verdict, action: Action) -> Fault | None:
    """What ends the generation. Who is slow and shall go leaves as planned."""
    if verdict.syndrome in _STEPS_ON and action in _TAKES_OUT:
        return None
    cause = _CAUSES.get(verdict.syndrome, Cause.SLOW)
    rank = verdict.culprits[0] if verdict.culprits and verdict.scope is Scope.RANK else None
    slot = verdict.slots[0] if verdict.slots and verdict.scope is not Scope.LINK else None
    return Fault(cause, slot, rank, verdict.sentence, verdict)
