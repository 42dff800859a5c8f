"""Which pod stands for which slot, who may register for it, and who gets a successor.

Everything follows from the slot table in the status (slot -> attempt, uid once seen) and the pods that are there. The
table is written before a pod is created, so a create can be repeated: its name says which attempt it is.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from stormjib_operator.models import SlotStatus
from stormjib_operator.observed import Event, Now, Observed, Pod

if TYPE_CHECKING:
    from stormjib_operator.models import Status
    from stormjib_runtime.wire import AgentView, JobState

SILENT_S = 10.0
"""An agent that is silent so long and no member of the running generation has lost its node: its pod is replaced.
Longer than every wait of the coordinator, so that the coordinator has decided before."""
START_S = 30.0
"""So long after the job's start its spares are no members, even if they are ready before the others."""
STRANDED_S = 60.0
"""So long a slot's pod waits for another node, if the job cannot go on without it: longer than a preflight takes."""
PACE_S = 10.0
"""A pod that failed before a container of it ran (a node that refuses it) is replaced no sooner than this after it was
made: its successor may well fail the same way, and must not do so a hundred times a second."""


@dataclass(frozen=True)
class Assignment:
    """The new slot table and what follows from it."""

    table: tuple[SlotStatus, ...]
    attempts: int
    missing: tuple[SlotStatus, ...] = ()
    """Slots whose pod is to be created."""
    delete: tuple[Pod, ...] = ()
    events: tuple[Event, ...] = ()
    again_s: float | None = None


def avoided(status: Status) -> tuple[str, ...]:
    """Nodes that the job keeps away from."""
    return tuple(each.node_name for each in status.isolation.nodes)


def assign(seen: Observed, now: Now, avoid: tuple[str, ...] = ()) -> Assignment:
    """Bring the slot table to the wanted size, and give every slot that lost its pod, or whose pod is on a node to be
    avoided, the next attempt."""
    status, counter = seen.job.status, _Attempts(seen)
    kept = _resized(seen, counter)
    table, events, waits = [], [], []
    for entry in kept:
        reason, wait = _lost(seen, entry, now)
        reason = reason or _misplaced(seen, entry, avoid)
        if wait is not None:
            waits.append(wait)
        if reason:
            events.append(Event("SlotReplaced", f"slot {entry.slot}: {reason}", warning=True))
            entry = SlotStatus(slot=entry.slot, attempt=counter.next())
        table.append(_with_uid(seen, entry))
    known = {(entry.slot, entry.attempt) for entry in table}
    surplus = tuple(p for p in seen.slot_pods() if (p.slot, p.attempt) not in known and not p.deleting)
    present = {(pod.slot, pod.attempt) for pod in seen.slot_pods()}
    return Assignment(
        table=tuple(table),
        attempts=max(counter.value, status.attempts),
        missing=tuple(entry for entry in table if (entry.slot, entry.attempt) not in present),
        delete=tuple(pod for pod in surplus if pod.over or not (_training(seen, pod) or _blind(seen))),
        events=tuple(events),
        again_s=min(waits, default=None),
    )


def registered(seen: Observed, table: tuple[SlotStatus, ...]) -> dict[str, str]:
    """Which pod may register for each slot: one that is leaving keeps its slot while it trains, and until its successor
    has started; an agent that nobody listens to would not learn that it may go, and would block its node for the whole
    grace period."""
    uids: dict[str, str] = {}
    for entry in table:
        pods = [pod for pod in seen.slot_pods() if pod.slot == entry.slot and not pod.over]
        current = [pod for pod in pods if pod.attempt == entry.attempt]
        waiting = not any(pod.started for pod in current)
        leaving = [pod for pod in pods if pod.attempt != entry.attempt and (waiting or _training(seen, pod))]
        for pod in (leaving or current)[:1]:
            uids[str(entry.slot)] = pod.uid
    gone = (pod for pod in seen.slot_pods() if pod.deleting and not pod.over)
    return {str(pod.slot): pod.uid for pod in gone} | uids  # slots that are no more have to hear it, too


def kept_back(seen: Observed, table: tuple[SlotStatus, ...], now: Now) -> tuple[str, ...]:
    """Pods of spares, while the job's first members are still coming up: which slots train shall not be a race, because
    the coordinator was put beside a spare."""
    starting = seen.job.status.generation is None and now.since(seen.job.status.start_time) < START_S
    if not starting:
        return ()
    numbers = sorted(entry.slot for entry in table)[seen.job.spec.nodes.replicas :]
    return tuple(pod.uid for pod in seen.slot_pods() if pod.slot in numbers)


def members(state: JobState | None) -> frozenset[int]:
    """Slots that train in the running generation."""
    if state is None or state.generation is None:
        return frozenset()
    return frozenset(member.slot for member in state.generation.members)


class _Attempts:
    """The job's one attempt counter; it skips the names of a deleted job's pods that are still there."""

    def __init__(self, seen: Observed) -> None:
        taken = (pod.attempt for pod in (*seen.foreign, *seen.slot_pods()))
        self.value = max((seen.job.status.attempts, *taken))

    def next(self) -> int:
        self.value += 1
        return self.value


def _resized(seen: Observed, counter: _Attempts) -> list[SlotStatus]:
    """The table with as many slots as wanted: new ones take the lowest free numbers, and only slots that do not train
    go, the highest first; a slot that trains goes once the coordinator has left it out."""
    table = {entry.slot: entry for entry in seen.job.status.slots}
    wanted, training = seen.job.spec.nodes.slots, members(seen.state)
    for slot in sorted(table, reverse=True):
        if len(table) > wanted and slot not in training and not _blind(seen):
            del table[slot]
    free = (slot for slot in range(wanted + len(table)) if slot not in table)
    while len(table) < wanted:
        slot = next(free)
        table[slot] = SlotStatus(slot=slot, attempt=counter.next())
    return [table[slot] for slot in sorted(table)]


def _lost(seen: Observed, entry: SlotStatus, now: Now) -> tuple[str, float | None]:
    """Why the slot needs the next attempt, or "", and how long to wait where it is too soon."""
    pod = _pod(seen, entry)
    if pod is None:
        return (f"pod {entry.pod_uid} is gone", None) if entry.pod_uid else ("", None)
    if pod.over:
        wait = 0.0 if pod.started else PACE_S - (now.seconds - pod.created)
        text = f": {pod.problem.message}" if pod.problem else ""
        return ("", wait) if wait > 0 else (f"pod {pod.name} ended as {pod.phase}{text}", None)
    if pod.deleting:
        return f"pod {pod.name} is being deleted", None
    view = _view(seen.state, pod)
    if view is not None and not view.member and view.silent_s >= SILENT_S:
        return f"pod {pod.name} on node {pod.node} has been silent for {view.silent_s:.0f} s", None
    return "", None


def _misplaced(seen: Observed, entry: SlotStatus, avoid: tuple[str, ...]) -> str:
    """Why the slot's pod should be elsewhere, or nothing."""
    pod = _pod(seen, entry)
    if pod is None:
        return ""
    if pod.node in avoid and not set(avoid) <= set(pod.avoids):
        return f"node {pod.node} is suspected of faulty hardware"
    if pod.unschedulable and not set(pod.avoids) <= set(avoid):
        return "a node that was suspected may be used again"
    return ""


def accused(seen: Observed, status: Status) -> tuple[str, ...]:
    """Pods on nodes to be avoided that shall train no more: as soon as enough others have started, so that a job that
    has no other place goes on where it is."""
    avoid = avoided(status)
    live = [pod for pod in seen.slot_pods() if not pod.over and not pod.deleting]
    return tuple(pod.uid for pod in live if pod.node in avoid) if _enough(seen, avoid) else ()


def stranded(seen: Observed, now: Now) -> bool:
    """Whether the job cannot go on without a node that it avoids: a doubtful node is better than none."""
    avoid = avoided(seen.job.status)
    waiting = [pod for pod in seen.slot_pods() if pod.unschedulable and set(pod.avoids) & set(avoid)]
    late = any(now.seconds - pod.created >= STRANDED_S for pod in waiting)
    return late and not _enough(seen, avoid)


def _enough(seen: Observed, avoid: tuple[str, ...]) -> bool:
    """Whether as many slots as the job needs at least have started on other nodes."""
    live = [pod for pod in seen.slot_pods() if not pod.over and not pod.deleting]
    others = {pod.slot for pod in live if pod.started and pod.node not in avoid}
    return len(others) >= seen.job.spec.nodes.least


def _with_uid(seen: Observed, entry: SlotStatus) -> SlotStatus:
    pod = _pod(seen, entry)
    return entry if pod is None or pod.uid == entry.pod_uid else entry.model_copy(update={"pod_uid": pod.uid})


def _pod(seen: Observed, entry: SlotStatus) -> Pod | None:
    fits = (p for p in seen.slot_pods() if (p.slot, p.attempt) == (entry.slot, entry.attempt))
    return next(fits, None)


def _view(state: JobState | None, pod: Pod) -> AgentView | None:
    if state is None:
        return None
    return next((view for view in state.agents if view.pod_uid == pod.uid), None)


def _blind(seen: Observed) -> bool:
    """Whether somebody may be training and we cannot see who (no coordinator, or one that has not adopted the running
    generation yet): then nothing is taken away."""
    unseen = seen.state is None or seen.state.generation is None
    return unseen and seen.job.status.generation is not None


def _training(seen: Observed, pod: Pod) -> bool:
    """Whether the pod is a member of the running generation, as far as the coordinator knows."""
    view = _view(seen.state, pod)
    return view is not None and view.member and not pod.over
