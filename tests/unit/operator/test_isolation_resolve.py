"""Accusations against the operator's own records: what holds becomes evidence, everything else is refused and counted."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest

from fakes.accuser import accusation
from fakes.job import change_pod, generation, heard, now, running, slot_pod, with_status, without
from stormjib_operator import bounds, pods
from stormjib_operator.decide import decide
from stormjib_operator.isolation.models import IsolationSpec, IsolationStatus
from stormjib_operator.isolation.reporter import manifest, merged
from stormjib_operator.isolation.resolve import PER_INCARNATION, PER_PASS, Resolved, resolve
from stormjib_operator.isolation.seen import Isolation
from stormjib_operator.models import Accusations, AvoidedNode
from stormjib_operator.observed import Problem

if TYPE_CHECKING:
    from stormjib_health.verdict import Accusation
    from stormjib_operator.observed import Observed


def said(*accusations: Accusation, job: Observed | None = None) -> Observed:
    """A job that trains, and whose coordinator says this."""
    return heard(job or running(), accusations=accusations)


def uid(job: Observed, slot: int) -> str:
    return slot_pod(job, slot).uid


def true_one(job: Observed, number: int = 1, slot: int = 1, **change: Any) -> Accusation:
    """An accusation that fits the job."""
    return accusation(number, slot, change.pop("pod_uid", uid(job, slot)), **change)


def resolved(job: Observed, *accusations: Accusation) -> Resolved:
    return resolve(said(*accusations, job=job), now(5))


def test_what_fits_becomes_evidence_against_the_node_that_the_operator_knows() -> None:
    job = running()
    found = resolved(job, true_one(job))
    (report,) = found.reports
    assert report.node == "node-1"
    evidence = report.evidence
    assert (evidence.namespace, evidence.job, evidence.slot, evidence.weight_percent) == ("ns", "j", 1, 90)
    assert (evidence.id, evidence.confirmed, evidence.left) == (f"{job.job.uid}/1/1", True, False)
    assert evidence.job_nodes == 3
    assert found.accusations.nodes == (AvoidedNode(node_name="node-1", evidence=evidence.id),)
    assert [event.reason for event in found.events] == ["NodeAccused"]


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"pod_uid": "uid-of-somebody"}, "ForeignPod"),
        ({"pod_uid": "uid-j-0-1"}, "ForeignPod"),
        ({"slot": 77}, "UnknownSlot"),
        ({"slot": -1}, "UnknownSlot"),
        ({"slot": 2**62}, "UnknownSlot"),
        ({"generation": "0.4"}, "OldGeneration"),
        ({"generation": "1.2"}, "OldGeneration"),
        ({"generation": "7.1"}, "OldGeneration"),
        ({"generation": "x" * 60000}, "Malformed"),
        ({"generation": "\u0661.\u0661\u0661"}, "OldGeneration"),
        ({"software": True}, "Software"),
        ({"weight": 0.0}, "Malformed"),
        ({"weight": -1e300}, "Malformed"),
        ({"slots": (0,)}, "Malformed"),
    ],
)
def test_what_does_not_fit_is_refused_counted_and_does_nothing(change: dict[str, Any], reason: str) -> None:
    job = running()
    slot = change.pop("slot", 1)
    told = accusation(1, slot, change.pop("pod_uid", uid(job, 1)), **change)
    found = resolved(job, told)
    assert (found.reports, dict(found.refused)) == ((), {reason: 1})
    assert (found.accusations.refused, found.accusations.newest, found.accusations.nodes) == (1, 1, ())
    assert [event.reason for event in found.events] == ["AccusationRefused"]


def test_no_weight_is_above_nine_tenths() -> None:
    job = running()
    (report,) = resolved(job, true_one(job, weight=1e9)).reports
    assert report.evidence.weight_percent == 90


def test_a_pod_that_never_ran_or_has_no_node_accuses_nobody() -> None:
    job = running()
    for change in ({"started": False}, {"node": ""}, {"name": "j-1-9"}, {"attempt": 4_000}):
        broken = change_pod(job, slot_pod(job, 1), **change)
        assert dict(resolved(broken, true_one(job)).refused) == {"ForeignPod": 1}


def test_a_pod_that_has_just_left_is_still_known() -> None:
    job = running()
    gone = slot_pod(job, 1)
    after = without(job, gone)
    assert dict(resolve(said(true_one(job), job=after), now(5)).refused) == {"UnknownSlot": 1}
    (report,) = resolve(replace(said(true_one(job), job=after), past=(gone,)), now(5)).reports
    assert report.node == "node-1"


def test_the_generation_before_the_running_one_may_still_accuse() -> None:
    job = with_status(running(), generation="1.5")
    for told, count in (("1.5", 1), ("1.4", 1), ("1.3", 1), ("1.2", 0), ("1.6", 0)):
        heard_now = heard(job, accusations=(true_one(job, generation=told),), generation=generation(number=5))
        assert len(resolve(heard_now, now(5)).reports) == count, told


def test_an_accusation_is_looked_at_once() -> None:
    job = running()
    once = resolved(job, true_one(job)).accusations
    again = resolved(with_status(job, isolation=once), true_one(job))
    assert (again.reports, again.refused.total(), again.accusations) == ((), 0, once)


@pytest.mark.parametrize("number", [0, -5, 2**53 + 1, 2**62])
def test_a_number_that_the_status_could_not_hold_changes_no_status(number: int) -> None:
    job = running()
    found = resolved(job, true_one(job, number))
    assert (found.reports, dict(found.refused)) == ((), {"Malformed": 1})
    assert (found.accusations.newest, found.accusations.considered) == (0, 0)


def test_of_several_against_one_node_the_newest_counts() -> None:
    job = running()
    found = resolved(job, true_one(job, 1), true_one(job, 2), true_one(job, 3, weight=0.5))
    assert [report.evidence.weight_percent for report in found.reports] == [50]


def test_a_flood_is_looked_at_a_little_at_a_time_and_then_no_more() -> None:
    job, flood = running(), tuple(accusation(i, 4242, "x") for i in range(1, 5001))
    counts = []
    for _ in range(8):
        found = resolved(job, *flood)
        counts.append(found.accusations.considered)
        job = with_status(job, isolation=found.accusations)
    assert counts == [PER_PASS, 2 * PER_PASS, 3 * PER_PASS, *[PER_INCARNATION] * 5]
    found = resolved(job, *flood)
    assert found.accusations == job.job.status.isolation, "nothing is written any more"
    assert found.refused["TooMany"] == 5000 - PER_INCARNATION
    assert len(found.events) == 1


def test_a_new_coordinator_counts_anew_and_only_by_the_operators_own_number() -> None:
    spent = Accusations(incarnation=0, newest=900, considered=PER_INCARNATION, refused=7)
    job = with_status(running(), isolation=spent)
    found = resolved(job, true_one(job))
    assert len(found.reports) == 1
    assert (found.accusations.incarnation, found.accusations.considered, found.accusations.refused) == (
        1,
        1,
        7,
    )
    held = with_status(running(), isolation=spent.model_copy(update={"incarnation": 1}))
    lying = heard(held, accusations=(true_one(held, 901),), incarnation=2**60)
    assert dict(resolve(lying, now(5)).refused) == {"TooMany": 1}


def test_what_was_answered_is_used_again() -> None:
    kept = Accusations(incarnation=1, newest=1, nodes=(AvoidedNode(node_name="node-1", evidence="e"),))
    job = with_status(running(), isolation=kept)
    assert resolve(replace(job, answered=frozenset({"node-1"})), now(5)).accusations.nodes == ()
    assert resolve(job, now(5)).accusations == kept


# --- what the job itself does --------------------------------------------------------------------------------------------


def avoiding(job: Observed, *nodes: str) -> Observed:
    """The job, which keeps away from these nodes."""
    kept = tuple(AvoidedNode(node_name=node) for node in nodes)
    return replace(job, accusations=Accusations(incarnation=1, newest=1, nodes=kept))


def test_the_slot_gets_a_successor_elsewhere_and_the_accused_pod_trains_no_more() -> None:
    job = avoiding(heard(running()), "node-1")
    decision = decide(job, now(5))
    (made,) = [pod for wave in decision.create for pod in wave]
    assert made["metadata"]["labels"]["stormjib.io/slot"] == "1"
    assert made["metadata"]["annotations"]["stormjib.io/avoids"] == "node-1"
    required = made["spec"]["affinity"]["nodeAffinity"]["requiredDuringSchedulingIgnoredDuringExecution"]
    fields = [term["matchFields"] for term in required["nodeSelectorTerms"]]
    assert fields == [[{"key": "metadata.name", "operator": "NotIn", "values": ["node-1"]}]]
    assert decision.bounds is not None
    assert uid(job, 1) in decision.bounds.excluded, "slots 0 and 2 are enough for one node at least"
    assert decision.delete == (), "the coordinator leaves it out first"


def test_a_job_that_has_nowhere_else_to_go_trains_on() -> None:
    nodes = {"replicas": 3, "minReplicas": 3}
    job = avoiding(heard(running(nodes=nodes), generation=generation(slots=(0, 1, 2))), "node-1")
    status = job.job.status.model_copy(update={"isolation": job.accusations})
    assert bounds.derive(job, status, now(5)).excluded == ()


def test_a_pod_that_waits_for_a_node_that_may_be_used_again_is_made_anew() -> None:
    job = heard(running())
    stuck = slot_pod(job, 1)
    waiting = change_pod(
        job, stuck, node="", avoids=("node-1",), problem=Problem("Unschedulable", "none fits")
    )
    assert [
        p["metadata"]["name"] for w in decide(avoiding(waiting, "node-1"), now(5)).create for p in w
    ] == []
    fresh = [p["metadata"]["name"] for w in decide(avoiding(waiting), now(5)).create for p in w]
    assert len(fresh) == 1


def test_a_job_that_is_stranded_without_the_node_takes_it_back() -> None:
    kept = Accusations(incarnation=1, newest=1, nodes=(AvoidedNode(node_name="node-1"),))
    for least, wanted in ((2, ()), (1, kept.nodes)):
        job = with_status(running(nodes={"replicas": 2, "minReplicas": least}), isolation=kept)
        waiting = change_pod(
            job,
            slot_pod(job, 1),
            node="",
            started=False,
            avoids=("node-1",),
            problem=Problem("Unschedulable", "none fits"),
        )
        assert resolve(heard(waiting), now(59)).accusations == kept
        assert resolve(heard(waiting), now(61)).accusations.nodes == wanted


def test_every_alternative_of_the_templates_own_affinity_is_kept_off_the_node() -> None:
    terms: list[dict[str, Any]] = [
        {"matchExpressions": [{"key": str(i), "operator": "Exists"}]} for i in range(2)
    ]
    spec: dict[str, Any] = {
        "affinity": {
            "nodeAffinity": {"requiredDuringSchedulingIgnoredDuringExecution": {"nodeSelectorTerms": terms}}
        }
    }
    pods._keep_off(spec, ("a", "b"))
    for term in terms:
        assert [field["values"] for field in term["matchFields"]] == [["a"], ["b"]]
        assert term.keys() == {"matchExpressions", "matchFields"}


# --- one entry for each namespace ------------------------------------------------------------------------------------------


def test_a_namespaces_jobs_speak_with_one_voice() -> None:
    job = running()
    (first,) = resolved(job, true_one(job, 1, weight=0.9)).reports
    (second,) = resolved(job, true_one(job, 2, weight=0.3, confirmed=False)).reports
    spec = IsolationSpec(node_name="node-1", evidence=(first.evidence.model_copy(update={"departures": 4}),))
    found = Isolation("node-1", "u", "1", spec, IsolationStatus())
    assert merged(None, first.evidence) == first.evidence
    assert merged(found, first.evidence) is None, "written already"
    both = merged(found, second.evidence)
    assert both is not None
    assert (both.weight_percent, both.confirmed, both.departures, both.left) == (90, True, 4, False)
    over = replace(found, status=IsolationStatus(answered=(first.evidence.id,)))
    anew = merged(over, second.evidence)
    assert anew is not None
    assert (anew.weight_percent, anew.confirmed) == (30, False), "what is answered adds nothing"


def test_the_longest_sentence_fits_the_definition() -> None:
    job = running()
    (report,) = resolved(job, true_one(job, sentence="\x00\n" + "x" * 60000)).reports
    body = manifest(report.node, report.evidence)
    assert len(body["spec"]["reason"]) <= 1024
    assert body["spec"]["evidence"][0]["sentence"].startswith("  x")
