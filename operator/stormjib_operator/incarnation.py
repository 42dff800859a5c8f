"""Which coordinator decides for the job: when it is lost, and what number its successor gets.

An incarnation is written to the status before its pod is created, and only ever grows. The pod is named after the
incarnation with which it was made; a predecessor's checkpoints may raise the number later, without a new pod.
"""

from __future__ import annotations

from dataclasses import dataclass

from stormjib_operator import pods
from stormjib_operator.models import CoordinatorStatus, Status
from stormjib_operator.observed import Event, Now, Observed, Pod, Target

UNREADY_S = 30.0
"""A coordinator whose container is down is left to the kubelet for so long: a restarted container goes on with the
same incarnation, which costs nothing."""
AVOID_S = 15.0
"""A coordinator that finds no node but the one it must avoid for so long may go there: a cut node would have been
marked by the API by now."""


@dataclass(frozen=True)
class Succession:
    """The coordinator that shall be."""

    incarnation: int
    coordinator: CoordinatorStatus
    create: bool = False
    delete: tuple[Pod, ...] = ()
    events: tuple[Event, ...] = ()


def succeed(seen: Observed, now: Now) -> Succession:
    """The coordinator's record brought up to date: first, seen, raised or replaced."""
    status = seen.job.status
    old = status.coordinator
    if old.incarnation == 0:
        first = _above_foreign(seen, status.incarnation + 1)
        return Succession(first, old.model_copy(update={"incarnation": first}), create=True)
    pod = current(seen)
    lost = _lost(seen, pod, now)
    if lost:
        return _replaced(seen, pod, lost)
    record = old if pod is None else old.model_copy(update={"pod_uid": pod.uid, "node_name": pod.node})
    raised, events = _raised(seen)
    return Succession(
        raised, record, create=pod is None, delete=_others(seen, old.incarnation), events=events
    )


def adopting(seen: Observed, now: Now) -> bool:
    """Whether a new coordinator has not yet learned from the agents what they run: nothing is known, nothing is wrong."""
    pod, state = current(seen), seen.state
    young = pod is not None and now.seconds - pod.created < UNREADY_S
    return young and seen.job.status.generation is not None and (state is None or state.generation is None)


def current(seen: Observed) -> Pod | None:
    """The pod of the coordinator that the status names."""
    wanted = seen.job.status.coordinator.incarnation
    return next((pod for pod in seen.coordinators() if pod.incarnation == wanted), None)


def target(seen: Observed, final: Status) -> Target | None:
    """The stream to have: from the pod of the coordinator that the status names, as soon as it has an address."""
    for pod in seen.coordinators():
        if pod.incarnation == final.coordinator.incarnation and pod.ip and not pod.deleting and not pod.over:
            return Target(pod.uid, seen.job.uid, pods.coordinator_url(pod.ip), pod.ready, final.generation)
    return None


def _lost(seen: Observed, pod: Pod | None, now: Now) -> str:
    """Why the coordinator needs a successor, or ""."""
    record = seen.job.status.coordinator
    if pod is None:
        return "its pod is gone" if record.pod_uid else ""
    if pod.deleting:
        return "its pod is being deleted"
    if pod.over:
        return f"its pod ended as {pod.phase}"
    heard = seen.link.pod_uid == pod.uid
    if heard and seen.link.lost:
        return f"it has not answered for {seen.link.silent_s:.1f} s"
    # One that was never heard may lack its image: another pod would lack it too.
    if heard and seen.state is not None and not pod.ready and seen.link.silent_s >= UNREADY_S:
        return f"its container has been down for {seen.link.silent_s:.0f} s"
    if pod.unschedulable and record.avoid_node_name and now.seconds - pod.created >= AVOID_S:
        return "no node but the one it had to avoid can take it"
    return ""


def _replaced(seen: Observed, pod: Pod | None, why: str) -> Succession:
    status = seen.job.status
    number = _above_foreign(seen, status.incarnation + 1)
    stuck = pod is not None and pod.unschedulable
    record = CoordinatorStatus(
        incarnation=number,
        avoid_node_name="" if stuck else status.coordinator.node_name,
        cluster_ip=status.coordinator.cluster_ip,
    )
    event = Event(
        "CoordinatorReplaced",
        f"coordinator {status.coordinator.incarnation} on node {status.coordinator.node_name or 'none'}: {why}; "
        f"incarnation {number} takes over, the ranks go on",
        warning=True,
    )
    return Succession(number, record, create=True, delete=_others(seen, number), events=(event,))


def _others(seen: Observed, incarnation: int) -> tuple[Pod, ...]:
    return tuple(pod for pod in seen.coordinators() if pod.incarnation != incarnation and not pod.deleting)


def _above_foreign(seen: Observed, number: int) -> int:
    """A number whose pod name is not taken by a deleted job of the same name."""
    return max([number, *(pod.incarnation + 1 for pod in seen.foreign)])


def _raised(seen: Observed) -> tuple[int, tuple[Event, ...]]:
    """Our incarnation, above what was found on the storage (a deleted job of this name), unless we have begun."""
    number, state = seen.job.status.incarnation, seen.state
    finding = state.storage if state else None
    if state is None or finding is None or state.generation is not None:
        return number, ()
    if finding.generation.incarnation < number:
        return number, ()
    raised = finding.generation.incarnation + 1
    words = f"the storage holds generation {finding.generation} of a job before; incarnation {raised} goes on from it"
    return raised, (Event("StorageFound", words),)
