"""What shall be, from what is: `decide(observed, now)`. No clock, no I/O, no memory; the same input, the same answer.

A list of early returns in the order in which a person would ask: is the job being deleted, is it over, is it held,
else keep it running.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from stormjib_operator import bounds, budget, children, endings, incarnation, planning, pods, slots, status
from stormjib_operator.models import ConditionStatus
from stormjib_operator.names import Type
from stormjib_operator.names import revision as revision_name
from stormjib_operator.observed import FOREIGN, Decision, Event, Manifest, Now, Observed
from stormjib_operator.see import name_of

if TYPE_CHECKING:
    from stormjib_operator.models import CoordinatorStatus, SlotStatus, Status


def decide(seen: Observed, now: Now) -> Decision:
    """One pass over one job."""
    if seen.job.deleting:
        return Decision(seen.job.status)  # the garbage collector removes the children
    settled, events = budget.settle(seen, now)
    base = status.figures(seen, settled, now)
    if seen.accusations is not None:
        base = base.model_copy(update={"isolation": seen.accusations})
    decision = _next(seen, base, now)
    return replace(decision, events=(*events, *decision.events, *_turns(seen, decision.status)))


def _next(seen: Observed, base: Status, now: Now) -> Decision:
    if base.holds(Type.COMPLETE) or base.holds(Type.FAILED):
        return endings.finish(seen, base, now)
    if seen.state is not None and seen.state.phase in endings.ENDS:
        return endings.end(seen, base, now)
    if seen.job.spec.suspend or endings.suspending(base):
        return endings.suspend(seen, base, now)
    return _run(seen, base, now)


# --- it runs --------------------------------------------------------------------------------------------------------


def _run(seen: Observed, base: Status, now: Now) -> Decision:
    if seen.rendered is None:
        found = planning.plan(seen.job.spec)
        return _start(seen, base, now) if found is None or found.fits else _wait(seen, base, now)
    succession = incarnation.succeed(seen, now)
    avoid = slots.avoided(base)
    assignment = slots.assign(seen, now, avoid)
    coordinator = _with_address(seen, succession.coordinator)
    wanted = base.model_copy(
        update={
            "incarnation": succession.incarnation,
            "coordinator": coordinator,
            "attempts": assignment.attempts,
            "slots": assignment.table,
        }
    )
    final = status.conditions(seen, wanted, now)
    applied = _applied(seen, coordinator, now)
    return Decision(
        status=final,
        delete=(*succession.delete, *assignment.delete),
        apply=applied,
        create=_waves(seen, succession.create, assignment.missing, coordinator, avoid, now),
        bounds=bounds.derive(seen, final, now),
        target=incarnation.target(seen, final),
        events=(*succession.events, *assignment.events),
        again_s=_soonest(
            assignment.again_s, _retry(seen, now), _placing(seen), _taken(seen), _told(seen, applied)
        ),
    )


def _start(seen: Observed, base: Status, now: Now) -> Decision:
    """Before any pod: keep the pods as they are rendered now, and write down what they will be called."""
    rendered, overruled = pods.render(seen.job, seen.render)
    named = base.model_copy(
        update={
            "template": revision_name(seen.job.name, seen.job.uid, seen.job.generation),
            "start_time": base.start_time or now.text,
        }
    )
    words = f"the template overrules security defaults: {'; '.join(overruled)}"
    wave = [children.token_secret(seen), children.revision(seen.job, rendered)]
    return Decision(
        status=status.conditions(seen, named, now),
        create=(_allowed(seen, wave, now),),
        events=(Event("SecurityDefaultsOverruled", words, warning=True),) if overruled else (),
        again_s=_retry(seen, now) if seen.refusals else 0.0,
    )


def _wait(seen: Observed, base: Status, now: Now) -> Decision:
    """Nothing is made for a job whose model has room nowhere; a change of the spec is looked at at once."""
    words = "the model has room on no allowed number of nodes; the condition Feasible says why"
    fact = status.Fact(Type.RUNNING, ConditionStatus.FALSE, status.NOTHING_FITS, words)
    return Decision(status=status.conditions(seen, base, now, fact))


def _with_address(seen: Observed, coordinator: CoordinatorStatus) -> CoordinatorStatus:
    if seen.service is None or not seen.service.cluster_ip:
        return coordinator
    return coordinator.model_copy(update={"cluster_ip": seen.service.cluster_ip})


def _applied(seen: Observed, coordinator: CoordinatorStatus, now: Now) -> tuple[Manifest, ...]:
    """Service and NetworkPolicy, where they are not what we want; not while a deleted job still owns the name."""
    service = children.service(seen.job, coordinator.incarnation, coordinator.cluster_ip)
    policy = children.network_policy(seen.job, seen.render)
    pairs = ((service, seen.service.applied if seen.service else None), (policy, seen.policy_applied))
    wanted = [each for each, there in pairs if there not in (FOREIGN, children.applied(each))]
    return _allowed(seen, wanted, now)


def _waves(
    seen: Observed,
    coordinator_missing: bool,
    missing: tuple[SlotStatus, ...],
    coordinator: CoordinatorStatus,
    avoid: tuple[str, ...],
    now: Now,
) -> tuple[tuple[Manifest, ...], ...]:
    """Pods to create: the coordinator, then members, then spares, so that the scheduler puts a spare beside it."""
    if seen.rendered is None or not coordinator.cluster_ip:
        return ()  # the Service's address goes into every pod; the pass that has it comes next
    job, rendered = seen.job, seen.rendered
    spares = _spare_slots(seen)
    first = (
        [pods.coordinator_pod(job, rendered, coordinator.incarnation, coordinator.avoid_node_name, spares)]
        if coordinator_missing
        else []
    )
    ip = coordinator.cluster_ip
    made = {e.slot: pods.slot_pod(job, rendered, e.slot, e.attempt, ip, avoid) for e in missing}
    waves = (
        first,
        [pod for slot, pod in made.items() if slot not in spares],
        [pod for slot, pod in made.items() if slot in spares],
    )
    return tuple(_allowed(seen, wave, now) for wave in waves)


def _allowed(seen: Observed, wave: list[Manifest], now: Now) -> tuple[Manifest, ...]:
    """Without what the API server refused a moment ago."""
    refused = {name for name, refusal in seen.refusals.items() if refusal.retry_at > now.seconds}
    return tuple(each for each in wave if name_of(each) not in refused)


def _spare_slots(seen: Observed) -> frozenset[int]:
    """Slots that do not train; before the first generation those with the highest numbers."""
    table = [entry.slot for entry in seen.job.status.slots] or list(range(seen.job.spec.nodes.slots))
    training = slots.members(seen.state) or frozenset(sorted(table)[: seen.job.spec.nodes.replicas])
    return frozenset(table) - training


def _retry(seen: Observed, now: Now) -> float | None:
    return min((max(0.05, r.retry_at - now.seconds) for r in seen.refusals.values()), default=None)


def _placing(seen: Observed) -> float | None:
    """A coordinator that avoids a node is looked at again: no event tells that a wait is over."""
    pod = incarnation.current(seen)
    return incarnation.AVOID_S if pod is not None and pod.unschedulable else None


def _taken(seen: Observed) -> float | None:
    """Names that the garbage collector will free soon."""
    blocked = seen.policy_applied == FOREIGN or (seen.service is not None and seen.service.applied == FOREIGN)
    return 0.3 if blocked else None


def _told(seen: Observed, applied: tuple[Manifest, ...]) -> float | None:
    """Straight on where the Service was just applied; else soon enough for progress."""
    if any(each["kind"] == "Service" for each in applied) and not seen.refusals:
        return 0.0
    return status.PROGRESS_S if seen.state is not None else None


def _soonest(*waits: float | None) -> float | None:
    return min((wait for wait in waits if wait is not None), default=None)


# --- events ---------------------------------------------------------------------------------------------------------

_TOLD = {
    Type.SUSPENDED: False,
    Type.COMPLETE: False,
    Type.FAILED: True,
    Type.DEGRADED: True,
}


def _turns(seen: Observed, final: Status) -> tuple[Event, ...]:
    """Events for conditions that became true, and for what the coordinator and its agents have to say."""
    old = seen.job.status
    told = [
        Event(condition.reason, condition.message or condition.reason, warning=_TOLD[kind])
        for kind in _TOLD
        if (condition := final.condition(kind)) is not None and final.holds(kind) and not old.holds(kind)
    ]
    blocked = final.condition(Type.SCHEDULED)
    before = old.condition(Type.SCHEDULED)
    if (
        blocked is not None
        and blocked.reason == "CreateRefused"
        and (not before or before.reason != blocked.reason)
    ):
        told.append(Event("CreateRefused", blocked.message, warning=True))
    told += _planned(old, final)
    said = seen.state.events if seen.state else ()
    return (*told, *(_said(text) for text in said))


def _planned(old: Status, final: Status) -> list[Event]:
    """The planner has begun to reject sizes, or all of them."""
    before, found = old.condition(Type.FEASIBLE), final.condition(Type.FEASIBLE)
    if found is None or found.reason == "AllFit" or (before is not None and before.reason == found.reason):
        return []
    return [Event(found.reason, found.message, warning=found.reason == status.NOTHING_FITS)]


def _said(text: str) -> Event:
    """`slot 1: ZygoteUnfit: not Python` is the event ZygoteUnfit; what has no such word is a Notice."""
    where, _, rest = text.partition(": ")
    reason, _, message = (rest if where.startswith("slot ") else text).partition(": ")
    message = f"{where}: {message}" if message and where.startswith("slot ") else message
    if reason.isidentifier() and message:
        return Event(reason, message, once=True)
    return Event("Notice", text, once=True)
