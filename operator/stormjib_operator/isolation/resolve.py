"""From a coordinator's accusations to evidence against nodes: pure.

Whatever a coordinator says is a tenant's word. A node is found only in what the operator knows by itself: the pods that
it has made and seen run. What does not fit is refused and counted, and nothing else happens.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from stormjib_operator import budget, names, slots
from stormjib_operator.isolation.models import Evidence
from stormjib_operator.models import Accusations, AvoidedNode
from stormjib_operator.observed import Event
from stormjib_runtime.wire import GenerationId

if TYPE_CHECKING:
    from stormjib_health.verdict import Accusation
    from stormjib_operator.observed import Now, Observed, Pod

PER_PASS = 16
PER_INCARNATION = 64
"""A coordinator is listened to so often: what accuses more has a fault of its own."""
RECENT_GENERATIONS = 2
"""A verdict may be told when the generation after it has begun, or the next."""
MAX_ID = 2**53
"""The API server takes no greater number."""
MAX_AVOIDED = 16
MAX_PERCENT = 90


@dataclass(frozen=True)
class Report:
    """One accusation that holds: the node is the operator's own finding."""

    node: str
    evidence: Evidence


@dataclass(frozen=True)
class Resolved:
    """What one pass makes of a job's accusations."""

    accusations: Accusations
    """For the job's status."""
    reports: tuple[Report, ...] = ()
    refused: Counter[str] = field(default_factory=Counter)
    """How many were refused, for which reason."""
    events: tuple[Event, ...] = ()


class _Refused(Exception):
    """An accusation does not hold; its text is the reason."""


def resolve(seen: Observed, now: Now) -> Resolved:
    """What to make of the accusations that no pass has looked at yet."""
    before, state = _current(seen, now), seen.state
    if state is None:
        return Resolved(before)
    fresh = sorted((a for a in state.accusations if before.newest < a.id <= MAX_ID), key=lambda a: a.id)
    room = max(0, PER_INCARNATION - before.considered)
    taken = fresh[: min(PER_PASS, room)]
    absurd = sum(not 0 < a.id <= MAX_ID for a in state.accusations)
    refused = +Counter({"TooMany": 0 if room else len(fresh), "Malformed": absurd})
    reports: dict[str, Report] = {}
    for accusation in taken:
        try:
            report = _report(seen, accusation, now)
        except _Refused as reason:
            refused[str(reason)] += 1
        else:
            reports[report.node] = report  # of several against one node the newest
    return Resolved(
        accusations=_with_unwanted(seen, _after(before, taken, refused, reports)),
        reports=tuple(reports.values()),
        refused=refused,
        events=(*(_accused(each) for each in reports.values()), *(_told(reason) for reason in refused)),
    )


def _current(seen: Observed, now: Now) -> Accusations:
    """The status as it is, without nodes whose case is over, and counted anew for a new coordinator."""
    old, state = seen.job.status.isolation, seen.state
    kept = tuple(each for each in old.nodes if each.node_name not in seen.answered)
    kept = () if slots.stranded(seen, now) else kept
    old = old.model_copy(update={"nodes": kept}) if kept != old.nodes else old
    ours = seen.job.status.coordinator.incarnation  # not the state's own word
    if state is None or ours == old.incarnation or not state.accusations:
        return old
    return old.model_copy(update={"incarnation": ours, "newest": 0, "considered": 0})


def _after(
    before: Accusations,
    taken: list[Accusation],
    refused: Counter[str],
    reports: dict[str, Report],
) -> Accusations:
    if not taken:
        return before
    fresh = [AvoidedNode(node_name=r.node, evidence=r.evidence.id) for r in reports.values()]
    kept = [each for each in before.nodes if each.node_name not in reports]
    return before.model_copy(
        update={
            "newest": taken[-1].id,
            "considered": before.considered + len(taken),
            "refused": before.refused + refused.total(),
            "nodes": tuple([*kept, *fresh][-MAX_AVOIDED:]),
        }
    )


def _with_unwanted(seen: Observed, accusations: Accusations) -> Accusations:
    """Nodes whose pods the rules of the job want replaced, though they ask for no isolation: the job's own business."""
    wanted = frozenset(seen.state.unwanted) if seen.state is not None else frozenset()
    nodes = [pod.node for pod in (*seen.slot_pods(), *seen.past) if pod.uid in wanted and pod.node]
    known = {each.node_name for each in accusations.nodes}
    fresh = [AvoidedNode(node_name=node) for node in dict.fromkeys(nodes) if node not in known]
    if not fresh:
        return accusations
    return accusations.model_copy(update={"nodes": tuple([*accusations.nodes, *fresh][-MAX_AVOIDED:])})


# --- one accusation -------------------------------------------------------------------------------------------------


def _report(seen: Observed, accusation: Accusation, now: Now) -> Report:
    """Raises _Refused with the reason."""
    verdict = accusation.verdict
    if verdict.software:
        raise _Refused("Software")
    percent = min(MAX_PERCENT, round(100 * accusation.weight))
    if percent < 1 or accusation.slot not in verdict.slots:
        raise _Refused("Malformed")
    _timely(seen, accusation, now)
    pod = _pod(seen, accusation)
    job = seen.job
    return Report(
        pod.node,
        Evidence(
            namespace=job.namespace,
            id=f"{job.uid}/{job.status.coordinator.incarnation}/{accusation.id}",
            job=job.name,
            slot=pod.slot,
            pod_uid=pod.uid,
            generation=accusation.generation,
            syndrome=verdict.syndrome.value,
            confirmed=verdict.confirmed,
            weight_percent=percent,
            sentence=_printable(verdict.sentence),
            time=now.text,
            job_nodes=job.spec.nodes.slots,
        ),
    )


def _timely(seen: Observed, accusation: Accusation, now: Now) -> None:
    """Of the running generation, or of one just before it, as the operator itself has counted them."""
    try:
        told = GenerationId.parse(accusation.generation)
    except ValueError as error:
        raise _Refused("Malformed") from error
    newest, counted = budget.newest(budget.settle(seen, now)[0]), budget.newest(seen.job.status)
    just_before = told.incarnation == newest.incarnation and newest.number - told.number <= RECENT_GENERATIONS
    if told > newest or not (just_before or told >= counted):
        raise _Refused("OldGeneration")


def _pod(seen: Observed, accusation: Accusation) -> Pod:
    """The pod of ours that was in that slot: made by us under a name that we have given, and seen on a node."""
    known = [pod for pod in (*seen.slot_pods(), *seen.past) if pod.slot == accusation.slot]
    if not known:
        raise _Refused("UnknownSlot")
    pod = next((pod for pod in known if pod.uid == accusation.pod_uid), None)
    if pod is None or not 0 <= pod.attempt <= seen.job.status.attempts:
        raise _Refused("ForeignPod")
    if pod.name != names.slot_pod(seen.job.name, pod.slot, pod.attempt) or not (pod.node and pod.started):
        raise _Refused("ForeignPod")
    return pod


def _printable(text: str) -> str:
    return "".join(c if c.isprintable() else " " for c in text[:1000])


# --- events ---------------------------------------------------------------------------------------------------------


def _accused(report: Report) -> Event:
    said = report.evidence
    words = f"slot {said.slot} on node {report.node}: {said.syndrome}: {said.sentence}"
    return Event("NodeAccused", words[:1000], warning=True)


_WORDS = {
    "Software": "a fault of the program is blamed on no node",
    "Malformed": "it names no slot, generation or weight that could be",
    "OldGeneration": "it speaks of a generation that does not run",
    "UnknownSlot": "it names a slot that the job does not have",
    "ForeignPod": "it names a pod that is not this job's in that slot",
    "TooMany": f"the coordinator has made more than {PER_INCARNATION} of them",
}


def _told(reason: str) -> Event:
    return Event("AccusationRefused", f"{reason}: {_WORDS[reason]}", warning=True, once=True)
