"""What becomes of a verdict on the operator's side: words for people, a pod elsewhere, a node kept away from."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import pytest

from fakes.job import (
    after,
    change_pod,
    entry,
    generation,
    heard,
    made,
    now,
    placed,
    running,
    slot_pod,
    state,
    with_spec,
    with_status,
)
from stormjib_health.verdict import Action, Evidence, Rule, Scope, Syndrome, Verdict
from stormjib_operator import bounds
from stormjib_operator.coordinator_client import gist
from stormjib_operator.decide import decide
from stormjib_operator.isolation.resolve import resolve
from stormjib_operator.models import Status
from stormjib_runtime.wire import Cause, Fault

if TYPE_CHECKING:
    from stormjib_operator.observed import Decision, Observed

FROZEN = Verdict(
    3,
    Syndrome.NON_COMMUNICATION_HANG,
    Scope.RANK,
    (3,),
    (1,),
    0.951,
    confirmed=True,
    lasted_s=1.21,
    sentence="rank 3 is stopped",
    evidence=(Evidence("issued", "rank 3", "41", "42"),),
    stack="main: T",
    generation="1.1",
)


def unwanted(current: Observed, **change: object) -> Observed:
    """The rules want slot 1's pod out."""
    return heard(current, unwanted=(slot_pod(current, 1).uid,), verdicts=(FROZEN,), **change)


def test_a_verdict_is_in_the_status_with_node_and_evidence() -> None:
    decision = decide(heard(running(), verdicts=(FROZEN,)), now(3))
    fault = decision.status.faults[0]
    assert (fault.cause, fault.slot, fault.rank, fault.node_name) == ("NonCommunicationHang", 1, 3, "node-1")
    assert fault.message == "rank 3 is stopped"
    assert fault.verdict is not None
    assert (fault.verdict.confidence_percent, fault.verdict.detection_milliseconds) == (95, 1210)
    assert fault.verdict.evidence[0].others == "42"
    assert [event.reason for event in decision.events] == ["NonCommunicationHang"]
    assert decision.status.restarts.total == 0, "nothing was restarted yet"


def test_a_verdict_that_ended_a_generation_is_told_once() -> None:
    first = heard(running(), verdicts=(FROZEN,))
    second = after(first, decide(first, now(3)))
    ended = replace(
        entry(2, Cause.RANK_HANG), fault=Fault(Cause.RANK_HANG, 1, 3, "rank 3 is stopped", FROZEN)
    )
    decision = decide(heard(second, verdicts=(FROZEN,), history=(ended,), generation=generation(2)), now(4))
    assert [fault.cause for fault in decision.status.faults] == ["RankHang"]
    assert decision.status.faults[0].verdict is not None
    third = after(second, decision)
    again = decide(heard(third, verdicts=(FROZEN,), generation=generation(2)), now(5))
    assert again.status.faults == decision.status.faults


def test_the_same_verdict_with_more_behind_it_keeps_its_time() -> None:
    first = heard(running(), verdicts=(FROZEN,))
    second = after(first, decide(first, now(3)))
    decision = decide(heard(second, verdicts=(replace(FROZEN, confidence=0.99),)), now(9))
    (fault,) = decision.status.faults
    assert fault.verdict is not None
    assert (fault.time, fault.verdict.confidence_percent) == (now(3).text, 99)


def test_what_may_still_be_taken_back_is_neither_fault_nor_event_nor_a_reason_to_look() -> None:
    unsure = replace(FROZEN, confidence=0.5)
    decision = decide(heard(running(), verdicts=(unsure,)), now(3))
    assert (decision.status.faults, decision.events) == ((), ())
    calm = state(running())
    assert gist(replace(calm, verdicts=(unsure,))) == gist(calm)
    assert gist(replace(calm, verdicts=(FROZEN,))) != gist(calm)


def test_who_died_first_is_told_with_the_end_of_the_generation_and_only_there() -> None:
    crash = replace(FROZEN, syndrome=Syndrome.CRASH, culprits=(1,), slots=(0,), sentence="rank 1 went first")
    alone = decide(heard(running(), verdicts=(crash,)), now(3))
    assert alone.status.faults == ()
    ended = heard(running(), verdicts=(crash,), history=(entry(2),), generation=generation(2))
    first = decide(ended, now(4))
    (fault,) = first.status.faults
    assert (fault.cause, fault.rank, fault.slot, fault.node_name) == ("RankExit", 1, 0, "node-0")
    assert fault.verdict is not None
    assert fault.message == "exit 1", "its last lines stay"
    again = heard(
        after(ended, first), verdicts=(crash,), history=(entry(2), entry(3)), generation=generation(3)
    )
    assert [bool(one.verdict) for one in decide(again, now(5)).status.faults] == [False, True]


def test_texts_of_tenants_are_cut_to_what_the_api_takes() -> None:
    rude = replace(
        FROZEN,
        sentence="x" * 9999,
        stack="y" * 9999,
        evidence=(Evidence("n" * 999, "w" * 999, "v" * 999),) * 99,
        culprits=(-5, *range(99)),
        confidence=7.0,
    )
    nameless = replace(FROZEN, generation="../..")
    status = decide(heard(running(), verdicts=(rude, nameless)), now(3)).status
    assert len(status.faults) == 1
    assert Status.model_validate(status.model_dump(by_alias=True)) == status


def looked(current: Observed, at: float) -> Decision:
    """One pass, as the shell does it: first what becomes of accusations and of pods that are not wanted."""
    return decide(replace(current, accusations=resolve(current, now(at)).accusations), now(at))


def test_a_pod_that_does_not_train_any_more_is_replaced_on_another_node() -> None:
    current = running()
    decision = looked(unwanted(current, generation=generation(2, slots=(0, 2))), 3)
    assert made(decision) == ["j-1-4"]
    assert [pod.name for pod in decision.delete] == ["j-1-2"]
    assert [each.node_name for each in decision.status.isolation.nodes] == ["node-1"]
    pod = decision.create[1][0]["spec"] if decision.create[1] else decision.create[2][0]["spec"]
    terms = pod["affinity"]["nodeAffinity"]["requiredDuringSchedulingIgnoredDuringExecution"]
    (field,) = terms["nodeSelectorTerms"][0]["matchFields"]
    assert (field["operator"], field["values"]) == ("NotIn", ["node-1"])


def test_a_pod_that_the_job_cannot_do_without_goes_once_its_successor_has_started() -> None:
    current = running(nodes={"replicas": 2, "minReplicas": 2, "spares": 0})
    first = unwanted(current)
    decision = looked(first, 3)
    assert (made(decision), decision.delete) == (["j-1-3"], ())
    assert decision.bounds is not None
    assert decision.bounds.slots["1"] == "uid-j-1-2", "it trains on"
    assert decision.bounds.excluded == ()
    second = after(first, decision)
    come = change_pod(second, slot_pod(second, 1), **vars(placed(slot_pod(second, 1))) | {"node": "node-3"})
    views = state(current).agents
    third = decide(heard(come, agents=views), now(5))
    assert third.bounds is not None
    assert third.bounds.excluded == ("uid-j-1-2",), "now it leaves as planned"


def test_the_avoided_node_stays_known_when_its_pod_is_gone_and_is_forgotten_when_the_job_is_held() -> None:
    first = unwanted(running(), generation=generation(2, slots=(0, 2)))
    second = after(first, looked(first, 3))
    calm = heard(second, generation=generation(2, slots=(0, 2)))
    assert [each.node_name for each in looked(calm, 4).status.isolation.nodes] == ["node-1"]
    held = with_spec(replace(calm, pods=()), suspend=True)
    held = with_status(held, isolation=calm.job.status.isolation)
    assert looked(held, 5).status.isolation.nodes == ()


@pytest.mark.parametrize("percent", [0, 150])
def test_rules_reach_the_coordinator_in_their_order(percent: int) -> None:
    rules = [
        {"action": "Note", "syndromes": ["CommunicationSlow"], "minSeverityPercent": percent},
        {"action": "Isolate", "scopes": ["Node"], "confirmed": True, "minStrikes": 2},
    ]
    current = running(recovery={"rules": rules})
    assert bounds.derive(current, current.job.status, now()).rules == (
        Rule(Action.NOTE, syndromes=(Syndrome.COMMUNICATION_SLOW,), severity=percent / 100),
        Rule(Action.ISOLATE, scopes=(Scope.NODE,), confirmed=True, strikes=2),
    )
