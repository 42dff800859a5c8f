"""The way of a node from the first suspicion to its release: `plan(view, now)`, pure.

    Proposed --weight 100, all limits--> Isolated --marked--> Cooldown --rested--> Verifying --passed twice--> Probation
       |  \\--a limit forbids--> Blocked                           ^                  |  \\--failed 3 times--> NeedsRepair
       \\--preflight passed, or faded--> Released                  \\------failed------/

One pass looks at all NodeIsolations, because the limits are about all of them together. What a pass decides is carried
out in this order: the policy's memory, the NodeIsolations, the nodes. So whatever breaks off, the limits have counted it.
A human's word comes first: a NodeIsolation that was deleted, a taint that was taken away and the label that keeps a node
out all release the node.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from stormjib_operator import names
from stormjib_operator.isolation import limits
from stormjib_operator.isolation.limits import Ledger, age
from stormjib_operator.isolation.models import (
    MAX_EVIDENCE,
    MAX_HISTORY,
    MAX_RECENT,
    Mode,
    Outcome,
    PreflightStatus,
    Recent,
    State,
    Turn,
)
from stormjib_operator.isolation.weigh import ISOLATES, open_evidence, total, weigh

if TYPE_CHECKING:
    from collections.abc import Mapping

    from stormjib_operator.isolation.models import Breaker, IsolationStatus, PolicyStatus
    from stormjib_operator.isolation.seen import Isolation, Node, Preflight, View
    from stormjib_operator.observed import Now

CONFIRMS = 50
"""From this weight on a preflight of ours is run: it adds as much when it fails."""
FADED = 25
"""What weighs less is no suspicion any more."""
PASSES = 2
FAILS = 3
STRIKES = 3
"""A node that is isolated so often although it passes each time needs a human."""
RETRY_S = 30.0
"""After a preflight that could not be run."""
STALE_S = 30.0
"""A decision whose mark was not written in that time is taken anew: the limits must hold when the node is marked."""
AT_A_TIME = 16
"""Preflights that run side by side."""
LOOK_S = 60.0
"""While a node is suspected its evidence fades, which no event tells."""


@dataclass(frozen=True)
class Said:
    """A fact for people, on the node and its NodeIsolation."""

    node: str
    reason: str
    message: str
    warning: bool


@dataclass(frozen=True)
class Plan:
    """What shall be."""

    policy: PolicyStatus
    statuses: Mapping[str, IsolationStatus]
    """Of every NodeIsolation, by its name."""
    mark: tuple[Node, ...] = ()
    unmark: tuple[Node, ...] = ()
    start: tuple[tuple[Node, str], ...] = ()
    """Preflights to be run: the node and the name of the Job."""
    drop: tuple[Preflight, ...] = ()
    """Jobs that nobody waits for."""
    forget: tuple[Isolation, ...] = ()
    """NodeIsolations whose node is gone."""
    said: tuple[Said, ...] = ()
    again_s: float | None = None


def plan(view: View, now: Now) -> Plan:
    """One pass over all NodeIsolations."""
    live = {name: each for name, each in view.isolations.items() if each.spec.node_name in view.nodes}
    gone = tuple(each for name, each in view.isolations.items() if name not in live)
    view = replace(view, isolations=live)
    moved = {name: _moved(view, each, now) for name, each in view.isolations.items()}
    ledger = _decided(view, moved, now)
    statuses = _with_preflights(view, ledger.statuses, now)
    memory = view.policy.status.model_copy(update={"recent": ledger.recent, "breaker": ledger.breaker})
    waited = {s.preflight.job_name for s in statuses.values() if s.preflight is not None}
    return Plan(
        policy=memory,
        statuses=statuses,
        mark=tuple(_to_mark(view, statuses, ledger.breaker)),
        unmark=tuple(_to_unmark(view, statuses)),
        start=tuple(_to_start(view, statuses)),
        drop=tuple(each for each in view.preflights if each.name not in waited),
        forget=gone,
        said=tuple(_told(view, statuses)),
        again_s=_again(view, statuses, now),
    )


# --- what has happened to one node --------------------------------------------------------------------------------------


def _moved(view: View, isolation: Isolation, now: Now) -> IsolationStatus:
    """The status with everything in it that needs no limit: results, times, human words, and what evidence weighs now."""
    node = view.nodes[isolation.spec.node_name]
    status = _heard(view, isolation, now)
    status = _released_by_hand(view, isolation, node, status, now)
    if status.state is State.ISOLATED:
        status = _marked(view, node, status, now)
    elif status.state is State.COOLDOWN and _rested(view, status, now):
        status = _turn(status, State.VERIFYING, "it has rested", now).model_copy(update={"passes": 0})
    elif status.state is State.PROBATION and age(status.since, now) >= view.policy.spec.probation_seconds:
        status = _turn(status, State.RELEASED, "nothing was held against it on probation", now)
    if status.state.marked:
        return status  # with the weights that isolated it
    weights = weigh(isolation, status, node, view.policy.spec, now)
    return _suspected(
        isolation, status.model_copy(update={"weights": weights, "weight_percent": total(weights)}), now
    )


def _heard(view: View, isolation: Isolation, now: Now) -> IsolationStatus:
    """The status with the result of the preflight that it waited for."""
    status = isolation.status
    waited = status.preflight
    found = next((p for p in view.preflights if waited is not None and p.name == waited.job_name), None)
    if waited is None or found is None or found.outcome is Outcome.RUNNING:
        return status
    outcome = found.outcome
    if outcome is Outcome.FAILED and not _undisturbed(isolation, waited):
        outcome = Outcome.UNKNOWN
    status = status.model_copy(
        update={"preflight": None, "last_outcome": outcome, "last_outcome_time": now.text}
    )
    if outcome is Outcome.FAILED:
        return _failed(status, now)
    return _passed(isolation, status, now) if outcome is Outcome.PASSED else status


def _undisturbed(isolation: Isolation, waited: PreflightStatus) -> bool:
    """Whether no accusing namespace has had a pod on the node while the preflight ran: one that loads the node could
    make a healthy node fail."""
    evidence = isolation.spec.evidence
    return all(each.left for each in evidence) and departures(isolation) == waited.departures


def departures(isolation: Isolation) -> int:
    """How often namespaces that accuse the node have left it."""
    return sum(each.departures for each in isolation.spec.evidence)


def _failed(status: IsolationStatus, now: Now) -> IsolationStatus:
    status = status.model_copy(update={"fails": status.fails + 1, "passes": 0, "last_fail_time": now.text})
    if status.state is not State.VERIFYING:
        return status
    if status.fails >= FAILS:
        return _turn(status, State.NEEDS_REPAIR, f"it failed {status.fails} preflights", now)
    return _turn(status, State.COOLDOWN, "it failed a preflight", now)


def _passed(isolation: Isolation, status: IsolationStatus, now: Now) -> IsolationStatus:
    if status.state is not State.VERIFYING:
        return _released(isolation, status, "it passed a preflight", now)
    status = status.model_copy(update={"passes": status.passes + 1})
    if status.passes < PASSES:
        return status
    if status.strikes >= STRIKES:
        words = f"it passed, but it was isolated {status.strikes} times"
        return _turn(status, State.NEEDS_REPAIR, words, now)
    return _given_back(isolation, status, State.PROBATION, f"it passed {status.passes} preflights", now)


def _released_by_hand(
    view: View, isolation: Isolation, node: Node, status: IsolationStatus, now: Now
) -> IsolationStatus:
    if not status.state.marked:
        return status
    if node.labels.get(names.ISOLATION_LABEL) == "disabled":
        return _released(isolation, status, "a label keeps it out of isolation", now)
    if status.state is not State.ISOLATED and not any(t["key"] == names.TAINT for t in node.taints):
        return _released(isolation, status, "its taint was taken away by hand", now)
    return status


def _marked(view: View, node: Node, status: IsolationStatus, now: Now) -> IsolationStatus:
    """Isolated until the mark is on the node. A decision whose mark may not be written any more is taken back."""
    if any(taint["key"] == names.TAINT for taint in node.taints) and node.suspected:
        return _turn(status, State.COOLDOWN, "it is marked and rests", now)
    words = "" if node.marked else _taken_back(view, node, status, now)
    return _turn(status, State.PROPOSED, words, now) if words else status


def _taken_back(view: View, node: Node, status: IsolationStatus, now: Now) -> str:
    policy = view.policy.spec
    if policy.mode is not Mode.TAINT or policy.pause_requests or view.policy.status.breaker.open:
        return "the policy was changed, or the breaker has opened"
    if age(status.isolated_time, now) >= STALE_S:
        return "the node could not be marked for too long"
    return limits.held_by_other(node, policy)


def _rested(view: View, status: IsolationStatus, now: Now) -> bool:
    return age(status.since, now) >= view.policy.spec.cooldown_seconds


def _suspected(isolation: Isolation, status: IsolationStatus, now: Now) -> IsolationStatus:
    """Proposed, or Released where nothing is left that speaks against the node."""
    if status.weight_percent < FADED:
        if status.state in (State.PROPOSED, State.BLOCKED):
            return _released(isolation, status, "what speaks against it weighs too little", now)
        return status
    blocked = status.state is State.BLOCKED and status.weight_percent >= ISOLATES
    if blocked or (status.state is State.PROPOSED and status.history):
        return status
    return _turn(status, State.PROPOSED, isolation.spec.reason, now)


def _released(isolation: Isolation, status: IsolationStatus, words: str, now: Now) -> IsolationStatus:
    return _given_back(isolation, status, State.RELEASED, words, now)


def _given_back(
    isolation: Isolation, status: IsolationStatus, state: State, words: str, now: Now
) -> IsolationStatus:
    """Out of suspicion: all that was said so far is answered."""
    answered = tuple(each.id for each in isolation.spec.evidence)[:MAX_EVIDENCE]
    quiet = {"answered": answered, "passes": 0, "fails": 0, "preflight": None}
    return _turn(status.model_copy(update=quiet), state, words, now)


def _turn(status: IsolationStatus, state: State, words: str, now: Now) -> IsolationStatus:
    """The status in that state, with the change in its history; nothing where it stands there for that reason already."""
    words = words[:1024]
    if (status.state, status.reason) == (state, words) and status.history:
        return status
    turn = Turn(time=now.text, state=state, message=words)
    history = (turn, *status.history)[:MAX_HISTORY]
    since = status.since if status.state is state and status.since else now.text
    return status.model_copy(update={"state": state, "reason": words, "since": since, "history": history})


# --- who is isolated -------------------------------------------------------------------------------------------------


def _decided(view: View, moved: dict[str, IsolationStatus], now: Now) -> Ledger:
    """The ledger after every node that weighs enough was isolated, or a limit forbade it; the heaviest come first."""
    memory = view.policy.status
    breaker = limits.reset(memory.breaker, view.policy.reset, now)
    ledger = Ledger(view, moved, memory.recent, breaker)
    wanted = [name for name, status in moved.items() if _wanted(status)]
    believed = sum(limits.believable(ledger, view.isolations[name], now) for name in wanted)
    lately = limits.lately(ledger, now) - set(wanted)
    ledger = replace(ledger, breaker=limits.tripped(ledger, believed + len(lately), now))
    for name in sorted(wanted, key=lambda n: (-moved[n].weight_percent, moved[n].since or now.text, n)):
        ledger = _isolated(ledger, view.isolations[name], now)
    return ledger


def _wanted(status: IsolationStatus) -> bool:
    return status.state in (State.PROPOSED, State.BLOCKED) and status.weight_percent >= ISOLATES


def _isolated(ledger: Ledger, isolation: Isolation, now: Now) -> Ledger:
    """The ledger with the node isolated, or blocked."""
    status = ledger.statuses[isolation.name]
    refusal = limits.forbids(ledger, isolation, now)
    if refusal is not None:
        blocked = _turn(status, State.BLOCKED, f"{refusal.reason}: {refusal.message}", now)
        return replace(ledger, statuses={**ledger.statuses, isolation.name: blocked})
    words = isolation.spec.reason or "what speaks against it weighs enough"
    begun = _turn(status, State.ISOLATED, words, now)
    zero = {"strikes": status.strikes + 1, "passes": 0, "fails": 0, "isolated_time": now.text}
    return replace(
        ledger,
        statuses={**ledger.statuses, isolation.name: begun.model_copy(update=zero | {"preflight": None})},
        recent=(Recent(node_name=isolation.spec.node_name, time=now.text), *ledger.recent)[:MAX_RECENT],
    )


# --- preflights ---------------------------------------------------------------------------------------------------------


def _with_preflights(
    view: View, statuses: Mapping[str, IsolationStatus], now: Now
) -> dict[str, IsolationStatus]:
    """The statuses with a preflight begun wherever one is due."""
    made, free = dict(statuses), AT_A_TIME - sum(s.preflight is not None for s in statuses.values())
    for name in sorted(statuses):
        isolation, status = view.isolations[name], statuses[name]
        if free > 0 and status.preflight is None and _due(view, isolation, status, now):
            free -= 1
            begun = PreflightStatus(
                job_name=job_name(isolation.uid, status.runs + 1),
                departures=departures(isolation),
            )
            made[name] = status.model_copy(update={"preflight": begun, "runs": status.runs + 1})
    return made


def job_name(uid: str, run: int) -> str:
    """The name of a preflight Job: of the NodeIsolation's uid, so that no later one of the same node finds an old Job."""
    return f"preflight-{uid[:13]}-{run}"


def _due(view: View, isolation: Isolation, status: IsolationStatus, now: Now) -> bool:
    pause = {Outcome.PASSED: float(view.policy.spec.cooldown_seconds), Outcome.UNKNOWN: RETRY_S}
    if status.state is State.VERIFYING:
        pause[Outcome.PASSED] = 0.0  # the second pass follows the first
    elif not _doubtful(view, isolation, status):
        return False
    last = status.last_outcome
    return last is None or age(status.last_outcome_time, now) >= pause.get(last, 0.0)


def _doubtful(view: View, isolation: Isolation, status: IsolationStatus) -> bool:
    """Whether a preflight would tell: the suspicion is neither light nor heavy enough, and whoever accuses has left."""
    node = view.nodes[isolation.spec.node_name]
    said = open_evidence(isolation, status)
    return (
        status.state is State.PROPOSED
        and CONFIRMS <= status.weight_percent < ISOLATES
        and all(each.left for each in isolation.spec.evidence)
        and bool(said)
        and not limits.held_by_other(node, view.policy.spec)
    )


# --- acts ---------------------------------------------------------------------------------------------------------------


def _to_mark(view: View, statuses: Mapping[str, IsolationStatus], breaker: Breaker) -> list[Node]:
    """Nodes whose mark is missing, or half of it; of an open breaker only the latter, though it were decided before."""
    nodes = [view.isolations[n].spec.node_name for n, s in statuses.items() if s.state is State.ISOLATED]
    return [view.nodes[name] for name in nodes if view.nodes[name].marked or not breaker.open]


def _to_unmark(view: View, statuses: Mapping[str, IsolationStatus]) -> list[Node]:
    """Nodes that bear our mark and should not: also where somebody has deleted the NodeIsolation."""
    kept = {view.isolations[name].spec.node_name for name, status in statuses.items() if status.state.marked}
    return [node for name, node in view.nodes.items() if node.marked and name not in kept]


def _to_start(view: View, statuses: Mapping[str, IsolationStatus]) -> list[tuple[Node, str]]:
    there = {each.name for each in view.preflights}
    waited = {name: s.preflight.job_name for name, s in statuses.items() if s.preflight is not None}
    due = [(view.isolations[name].spec.node_name, job) for name, job in waited.items() if job not in there]
    return [(view.nodes[node], job) for node, job in due]


_WARNINGS = (State.BLOCKED, State.ISOLATED, State.NEEDS_REPAIR)
_REASONS = {
    State.BLOCKED: "IsolationBlocked",
    State.ISOLATED: "NodeIsolated",
    State.NEEDS_REPAIR: "NeedsRepair",
}


def _told(view: View, statuses: Mapping[str, IsolationStatus]) -> list[Said]:
    """Every change of state since the last pass, oldest first."""
    said = []
    for name, status in statuses.items():
        before, node = view.isolations[name].status.history, view.isolations[name].spec.node_name
        said += [_say(node, turn) for turn in reversed(status.history) if turn not in before]
    return said


def _say(node: str, turn: Turn) -> Said:
    reason = _REASONS.get(turn.state, f"Isolation{turn.state.value}")
    return Said(node, reason, turn.message or turn.state.value, turn.state in _WARNINGS)


def _again(view: View, statuses: Mapping[str, IsolationStatus], now: Now) -> float | None:
    policy = view.policy.spec
    rest = {State.COOLDOWN: policy.cooldown_seconds, State.PROBATION: policy.probation_seconds}
    waits: list[float] = []
    for status in statuses.values():
        if status.state in rest:
            waits.append(rest[status.state] - age(status.since, now))
        elif status.state in (State.PROPOSED, State.BLOCKED):
            waits.append(LOOK_S)
        if status.last_outcome_time and status.preflight is None and status.state in _WAITING:
            pause = RETRY_S if status.last_outcome is Outcome.UNKNOWN else policy.cooldown_seconds
            waits.append(pause - age(status.last_outcome_time, now))
    return min((max(wait, 0.2) for wait in waits), default=None)


_WAITING = (State.PROPOSED, State.VERIFYING)
