"""How a job is held, and how it ends: nothing of it may go on by itself, and nothing is left behind."""

from __future__ import annotations

from stormjib_operator import bounds, incarnation, slots, status
from stormjib_operator.models import ConditionStatus, CoordinatorStatus, Status
from stormjib_operator.names import Type
from stormjib_operator.observed import Decision, Now, Observed, Pod
from stormjib_operator.status import Fact
from stormjib_runtime.wire import JobPhase

FINISH_S = 30.0
"""Agents end by themselves once they learn that the job is over; after so long their pods are deleted."""
SUSPEND_S = 30.0
"""Beside the pods' own grace period: how long a suspended job may take to save and stop."""

_TRUE, _FALSE, _UNKNOWN = ConditionStatus.TRUE, ConditionStatus.FALSE, ConditionStatus.UNKNOWN
LOOK_S = 3.0
"""While something is waited for that an event of a watch usually tells: the same again, if the watch has a gap."""
ENDS = (JobPhase.COMPLETE, JobPhase.EXHAUSTED)
"""Phases of the coordinator after which nothing trains any more."""


def suspending(base: Status) -> bool:
    """A suspension that has begun is carried through, even if it is taken back: the template may have changed since."""
    condition = base.condition(Type.SUSPENDED)
    return condition is not None and condition.reason == "Suspending"


def suspend(seen: Observed, base: Status, now: Now) -> Decision:
    if all(pod.deleting for pod in seen.pods):  # one on a dead node may stay so for ever
        accused = tuple(each for each in base.isolation.nodes if each.evidence)
        left = {
            "slots": (),
            "template": "",
            "isolation": base.isolation.model_copy(update={"nodes": accused}),
        }
        empty = base.model_copy(update=left | {"coordinator": _parked(base)})
        facts = (
            Fact(Type.SUSPENDED, _TRUE, "Suspended", "the job is held; set suspend: false to go on"),
            Fact(Type.RUNNING, _FALSE, "Suspended", "the job is held"),
            Fact(Type.SCHEDULED, _FALSE, "Suspended"),
            Fact(Type.DEGRADED, _FALSE, "Suspended"),
        )
        return Decision(status=status.conditions(seen, empty, now, *facts))
    since = _since(base, Type.SUSPENDED, "Suspending", now)
    saved = seen.state is not None and seen.state.phase is JobPhase.SUSPENDED
    late = since >= SUSPEND_S + _grace(seen)
    # Unknown, so that the condition has turned, and its time says since when we wait.
    begun = Fact(Type.SUSPENDED, _UNKNOWN, "Suspending", "ranks save and stop, then the pods are deleted")
    final = status.conditions(seen, base, now, begun)
    return Decision(
        status=final,
        delete=_living(seen) if saved or late or base.generation is None else (),
        bounds=bounds.derive(seen, final, now, suspend=True),
        target=incarnation.target(seen, final),
        again_s=LOOK_S,
    )


def _parked(base: Status) -> CoordinatorStatus:
    return CoordinatorStatus(cluster_ip=base.coordinator.cluster_ip)


def _grace(seen: Observed) -> float:
    return float(seen.job.spec.template["spec"].get("terminationGracePeriodSeconds", 30))


def _since(base: Status, kind: Type, reason: str, now: Now) -> float:
    condition = base.condition(kind)
    if condition is None or condition.reason != reason:
        return 0.0
    return now.since(condition.last_transition_time)


def _living(seen: Observed) -> tuple[Pod, ...]:
    return tuple(pod for pod in seen.pods if not pod.deleting)


def end(seen: Observed, base: Status, now: Now) -> Decision:
    """Write down how it ended; the next pass tells the agents."""
    state = seen.state
    fact = Fact(Type.COMPLETE, _TRUE, "Complete", "every rank has ended with exit code 0")
    if state is not None and state.phase is JobPhase.EXHAUSTED:
        fact = Fact(Type.FAILED, _TRUE, "RestartBudgetSpent", _last_words(seen, base))
    training = slots.members(state)
    ended = base.model_copy(
        update={
            "completion_time": now.text,
            # Slots that did not train lose their pods; those that did are kept for their logs.
            "slots": tuple(entry for entry in base.slots if entry.slot in training),
        }
    )
    final = status.conditions(seen, ended, now, fact)
    return Decision(
        status=final,
        bounds=bounds.derive(seen, base, now, finish=True),
        target=incarnation.target(seen, final),
        again_s=0.0,
    )


def _last_words(seen: Observed, base: Status) -> str:
    fault = seen.state.last_fault if seen.state else None
    spent = f"{base.restarts.counted} of {seen.job.spec.recovery.max_restarts} restarts are spent"
    if fault is None:
        return spent
    where = f" of rank {fault.rank}" if fault.rank is not None else ""
    return f"{spent}; the last fault was {fault.cause}{where}: {fault.message}"


def finish(seen: Observed, base: Status, now: Now) -> Decision:
    """Let agents exit, then remove the coordinator and whatever does not end by itself."""
    kept = {entry.slot for entry in base.slots}
    trained = [pod for pod in seen.slot_pods() if pod.slot in kept]
    late = now.since(base.completion_time) >= FINISH_S
    done = late or all(pod.over for pod in trained)
    verdict = [Fact(Type(c.type), c.status, c.reason, c.message) for c in base.conditions]
    final = status.conditions(seen, base, now, *verdict)
    remove = [pod for pod in _living(seen) if pod not in trained or not pod.over]
    return Decision(
        status=final,
        delete=tuple(remove) if done else (),
        bounds=None if done else bounds.derive(seen, final, now, finish=True),
        target=None if done else incarnation.target(seen, final),
        again_s=None if done else LOOK_S,
    )
