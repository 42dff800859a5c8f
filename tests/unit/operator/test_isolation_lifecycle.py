"""The way of a node, pass by pass: what isolates, what does not, the way back, and a human's word."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from fakes.isolation import READY, evidence, node, world
from stormjib_operator import names
from stormjib_operator.isolation.models import Mode, Outcome, PolicyStatus, State

TRUSTED: dict[str, Any] = {"trusted_namespaces": ("a",)}


def isolated(**change: Any) -> Any:
    """A world in which n0 is isolated and rests."""
    made = world(**TRUSTED | change)
    made.accuse("n0", evidence(confirmed=True))
    made.look(2)
    assert made.state("n0") is State.COOLDOWN
    assert made.marked() == {"n0"}
    return made


def test_a_confirmed_verdict_of_a_trusted_namespace_isolates_at_once() -> None:
    made = world(**TRUSTED)
    made.accuse("n0", evidence(confirmed=True))
    plan = made.look()
    assert [each.name for each in plan.mark] == ["n0"]
    assert [(s.node, s.reason) for s in plan.said] == [("n0", "IsolationProposed"), ("n0", "NodeIsolated")]
    assert [turn.state for turn in made.isolations["n0"].status.history] == [State.ISOLATED, State.PROPOSED]


@pytest.mark.parametrize("change", [{"confirmed": True}, {"confirmed": False}, {"weight": 90}])
def test_one_namespace_alone_never_isolates(change: dict[str, Any]) -> None:
    made = world()
    made.accuse("n0", evidence(**change))
    made.look(3)
    assert made.state("n0") is State.PROPOSED
    assert made.marked() == set()


def test_an_unconfirmed_verdict_of_a_trusted_namespace_needs_the_preflight_too() -> None:
    made = world(**TRUSTED)
    made.accuse("n0", evidence())
    made.look(2)
    assert made.state("n0") is State.PROPOSED


def test_a_preflight_waits_until_the_namespace_has_left_the_node() -> None:
    made = world()
    made.accuse("n0", evidence(left=False))
    assert made.look().start == ()
    made.accuse("n0", evidence(left=True))
    assert [n.name for n, _ in made.look().start] == ["n0"]


def test_a_failed_preflight_adds_the_rest() -> None:
    made = world()
    made.accuse("n0", evidence())
    made.look()
    assert made.ends("n0", Outcome.FAILED)
    made.look(3)
    assert made.state("n0") is State.COOLDOWN
    assert made.preflights == {}
    kept = {each.source: each.percent for each in made.isolations["n0"].status.weights}
    assert kept == {"Namespace/a": 90, "Preflight": 50}, "what isolated it stays to be read"


def test_a_passed_preflight_releases_and_the_same_evidence_weighs_nothing_any_more() -> None:
    made = world()
    made.accuse("n0", evidence())
    made.look()
    made.ends("n0", Outcome.PASSED)
    made.look(3)
    assert (made.state("n0"), made.isolations["n0"].status.weight_percent) == (State.RELEASED, 0)
    made.accuse("n0", evidence(seconds=1))
    made.look()
    assert made.state("n0") is State.PROPOSED, "what is new counts again"
    assert not any(p.outcome is Outcome.RUNNING for p in made.preflights.values()), "but not at once"


def test_a_fail_counts_for_nothing_where_the_namespace_came_back_meanwhile() -> None:
    made = world()
    made.accuse("n0", evidence())
    made.look()
    made.accuse("n0", evidence(departures=1))
    made.ends("n0", Outcome.FAILED)
    made.look(2)
    assert (made.state("n0"), made.isolations["n0"].status.fails) == (State.PROPOSED, 0)
    assert made.isolations["n0"].status.last_outcome is Outcome.UNKNOWN


def test_a_preflight_that_could_not_run_says_nothing_and_is_tried_again_later() -> None:
    made = world()
    made.accuse("n0", evidence())
    made.look()
    made.ends("n0", Outcome.UNKNOWN)
    again = made.look().again_s
    assert again is not None
    assert again <= 30
    assert made.preflights == {}
    made.seconds += 31
    assert len(made.look().start) == 1


def test_a_job_of_another_namespace_adds_the_rest() -> None:
    made = world()
    made.accuse("n0", evidence("a", weight=60))
    made.accuse("n0", evidence("b", weight=50))
    made.look(2)
    assert made.state("n0") is State.COOLDOWN


def test_a_condition_of_another_party_adds_the_rest_but_nothing_alone() -> None:
    bad = {"type": "AcceleratedHardwareReady", "status": "False"}
    made = world()
    made.change("n0", conditions=(READY, bad))
    made.look()
    assert made.marked() == set()
    made.accuse("n0", evidence(weight=50))
    made.look(2)
    assert made.state("n0") is State.COOLDOWN


def test_a_light_suspicion_gets_no_preflight_and_fades() -> None:
    made = world()
    made.accuse("n0", evidence(weight=40))
    assert made.look().start == ()
    made.seconds += 86400
    made.look()
    assert made.state("n0") is State.RELEASED


def test_evidence_halves_with_each_half_life() -> None:
    made = world(mode=Mode.REPORT_ONLY)
    made.accuse("n0", evidence(weight=80, left=False))
    weights = []
    for _ in range(3):
        made.look()
        weights.append(made.isolations["n0"].status.weight_percent)
        made.seconds += 86400
    assert weights == [80, 40, 20]
    assert made.state("n0") is State.RELEASED, "below a quarter it is no suspicion"


def test_report_only_does_everything_but_write_to_nodes() -> None:
    made = world(mode=Mode.REPORT_ONLY)
    made.accuse("n0", evidence())
    made.look()
    made.ends("n0", Outcome.FAILED)
    plan = made.look()
    assert made.state("n0") is State.BLOCKED
    assert made.reason("n0").startswith("ReportOnly")
    assert [s.reason for s in plan.said] == ["IsolationBlocked"]
    assert made.look(3).mark == ()
    made.spec = made.spec.model_copy(update={"mode": Mode.TAINT})
    made.look(2)
    assert made.marked() == {"n0"}


def test_the_way_back_is_rest_two_passes_and_probation() -> None:
    made = isolated()
    made.seconds += 599
    assert made.look().start == ()
    made.seconds += 2
    assert len(made.look().start) == 1
    made.ends("n0", Outcome.PASSED)
    assert len(made.look().start) == 1, "the second follows at once"
    assert made.marked() == {"n0"}
    made.ends("n0", Outcome.PASSED)
    made.look()
    assert (made.state("n0"), made.marked()) == (State.PROBATION, set())
    made.seconds += 86400
    made.look()
    assert made.state("n0") is State.RELEASED


def test_three_fails_on_the_way_back_need_a_human() -> None:
    made = isolated()
    for _ in range(3):
        assert made.state("n0") is State.COOLDOWN
        made.seconds += 601
        made.look()
        made.ends("n0", Outcome.FAILED)
        made.look()
    assert made.state("n0") is State.NEEDS_REPAIR
    made.seconds += 30 * 86400
    assert made.look(3).start == ()
    assert made.marked() == {"n0"}
    del made.isolations["n0"]
    made.look()
    assert made.marked() == set()


def test_a_node_that_is_isolated_the_third_time_is_not_given_back_by_itself() -> None:
    made = isolated(cooldown_seconds=1)
    for strike in (2, 3):
        made.seconds += 2
        made.look()
        for _ in range(2):
            made.ends("n0", Outcome.PASSED)
            made.look()
        assert made.state("n0") is State.PROBATION
        made.seconds += 700
        made.accuse("n0", evidence(seconds=made.seconds, confirmed=True))
        made.look(2)
        assert made.isolations["n0"].status.strikes == strike
    made.seconds += 2
    made.look()
    for _ in range(2):
        made.ends("n0", Outcome.PASSED)
        made.look()
    assert made.state("n0") is State.NEEDS_REPAIR


def test_deleting_the_nodeisolation_releases_the_node_and_drops_its_preflight() -> None:
    made = isolated(cooldown_seconds=1)
    made.seconds += 2
    made.look()
    assert made.preflights
    del made.isolations["n0"]
    made.look()
    assert (made.marked(), made.preflights) == (set(), {})


def test_a_taint_taken_away_by_hand_releases_the_node() -> None:
    made = isolated()
    made.change("n0", taints=())
    made.look()
    assert (made.state("n0"), made.marked()) == (State.RELEASED, set())


def test_the_label_that_keeps_a_node_out_releases_it_and_keeps_it_out() -> None:
    made = isolated()
    made.change("n0", labels={names.ISOLATION_LABEL: "disabled"})
    made.look()
    assert (made.state("n0"), made.marked()) == (State.RELEASED, set())
    made.accuse("n0", evidence(seconds=1, confirmed=True))
    made.look(2)
    assert (made.state("n0"), made.marked()) == (State.BLOCKED, set())
    assert made.reason("n0").startswith("NotOurs")


def test_a_pause_lets_nothing_in_and_everything_out() -> None:
    made = isolated()
    made.spec = made.spec.model_copy(update={"pause_requests": ("upgrade",)})
    made.accuse("n1", evidence(confirmed=True, job="other"))
    made.look()
    assert made.reason("n1") == "Paused: paused: upgrade"
    del made.isolations["n0"]
    made.look()
    assert made.marked() == set()


def test_a_decision_whose_mark_was_not_written_is_taken_back_when_somebody_else_cordons_the_node() -> None:
    made = world(**TRUSTED)
    made.accuse("n0", evidence(confirmed=True))
    made.look(writes=2)  # the policy and the NodeIsolation, not the node
    assert (made.state("n0"), made.marked()) == (State.ISOLATED, set())
    made.change("n0", unschedulable=True)
    made.look(2)
    assert (made.state("n0"), made.marked()) == (State.BLOCKED, set())


def test_a_decision_whose_mark_was_not_written_for_long_is_taken_anew() -> None:
    """Else three decisions of long ago and three of now would be six marks at once."""
    made = world(**TRUSTED)
    made.accuse("n0", evidence(confirmed=True))
    made.look(writes=2)
    made.seconds += 700
    made.look(writes=1)
    assert len(made.memory.recent) == 2, "decided twice, counted twice"
    made.look(3)
    assert made.state("n0") is State.COOLDOWN


def test_half_a_mark_is_completed() -> None:
    made = world(**TRUSTED)
    made.accuse("n0", evidence(confirmed=True))
    made.look(writes=3)
    assert (made.marked(), made.nodes["n0"].suspected) == ({"n0"}, False)
    made.look(2)
    assert (made.state("n0"), made.nodes["n0"].suspected) == (State.COOLDOWN, True)


def test_a_nodeisolation_whose_node_is_gone_is_forgotten() -> None:
    made = isolated()
    del made.nodes["n0"]
    assert [each.name for each in made.look().forget] == ["n0"]


def test_the_same_twice_is_the_same() -> None:
    made = isolated()
    before = made.isolations["n0"].status
    plan = made.look(3)
    assert made.isolations["n0"].status == before
    assert (plan.mark, plan.unmark, plan.start, plan.drop, plan.said) == ((), (), (), (), ())


def test_a_history_keeps_its_last_twenty_turns() -> None:
    made = isolated(cooldown_seconds=1, probation_seconds=10**6)
    made.spec = made.spec.model_copy(
        update={"limits": made.spec.limits.model_copy(update={"window_seconds": 1})}
    )
    for _ in range(30):
        made.change("n0", taints=())
        made.look()
        made.seconds += 5
        made.accuse("n0", evidence(seconds=made.seconds, confirmed=True))
        made.look(2)
    assert len(made.isolations["n0"].status.history) == 20


def test_a_nodes_record_of_isolations_outlives_its_nodeisolation() -> None:
    made = isolated(max_per_window=1)
    del made.isolations["n0"]
    made.look()
    made.accuse("n1", evidence(confirmed=True, job="other"))
    made.look()
    assert made.reason("n1").startswith("RateLimit")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"unschedulable": True}, "it is cordoned"),
        ({"taints": ({"key": "other", "effect": "NoSchedule"},)}, "taint other"),
        ({"taints": ({"key": "node.kubernetes.io/not-ready", "effect": "NoExecute"},)}, "not-ready"),
        ({"labels": {}}, "labels"),
        (
            {"labels": {names.ISOLATION_LABEL: "enabled", "node-role.kubernetes.io/control-plane": ""}},
            "control-plane",
        ),
    ],
)
def test_a_node_that_is_not_ours_is_left_alone(change: dict[str, Any], words: str) -> None:
    made = world(**TRUSTED)
    made.change("n0", **change)
    made.accuse("n0", evidence(confirmed=True))
    made.look(2)
    assert made.marked() == set()
    assert made.reason("n0").startswith("NotOurs")
    assert words in made.reason("n0")


def test_a_taint_of_the_whole_pool_is_no_obstacle() -> None:
    made = world(**TRUSTED)
    made.change("n0", taints=({"key": "nvidia.com/gpu", "effect": "NoSchedule"},))
    made.accuse("n0", evidence(confirmed=True))
    made.look(2)
    assert made.marked() == {"n0"}


def test_only_so_much_of_the_fleet() -> None:
    made = world(60, max_per_window=64, **TRUSTED)
    for number in range(5):
        made.accuse(f"n{number}", evidence(confirmed=True, job=f"job{number}"))
    made.look(2)
    assert len(made.marked()) == 3
    assert "FleetLimit" in made.reason("n4")


def test_only_so_many_in_a_window() -> None:
    made = world(200, window_seconds=600, max_per_window=2, **TRUSTED)
    for number in range(3):
        made.accuse(f"n{number}", evidence(confirmed=True, job=f"job{number}"))
    made.look(2)
    assert (len(made.marked()), "RateLimit" in made.reason("n2")) == (2, True)
    made.seconds += 601
    made.look(2)
    assert len(made.marked()) == 3


def test_two_nodes_of_one_rack_are_the_racks_fault() -> None:
    made = world(200, **TRUSTED)
    for name in ("n0", "n1"):
        made.nodes[name] = node(name, "r1")
        made.accuse(name, evidence(confirmed=True, job=f"job-{name}"))
    made.look(2)
    assert made.marked() == {"n0"}
    assert made.reason("n1").startswith("DomainLimit")


def test_one_job_gets_only_so_many_nodes_isolated() -> None:
    made = world(200, max_nodes_per_job=1, **TRUSTED)
    made.accuse("n0", evidence(confirmed=True))
    made.look(2)
    made.seconds += 700
    made.accuse("n1", evidence(confirmed=True, seconds=700))
    made.look(2)
    assert made.marked() == {"n0"}
    assert made.reason("n1").startswith("JobLimit")


def test_a_job_that_accuses_many_of_its_nodes_at_a_time_is_not_believed() -> None:
    made = world(200, **TRUSTED)
    for number in range(4):
        made.accuse(f"n{number}", evidence(confirmed=True, job_nodes=16))
    made.look(2)
    assert made.marked() == set()
    assert all("Correlated" in made.reason(f"n{number}") for number in range(4))
    assert made.memory.breaker.open is False, "a program's fault needs no human"


def test_nodes_that_training_jobs_need_are_not_taken() -> None:
    made = world(4, **TRUSTED)
    made.accuse("n0", evidence(confirmed=True, least_nodes=4))
    made.look(2)
    assert made.marked() == set()
    assert made.reason("n0") == "NoCapacity: 3 healthy nodes would stay; training jobs need 4"


def test_the_breaker_opens_stays_open_and_is_closed_by_its_number_only() -> None:
    made = world(10, **TRUSTED)
    for number in range(3):
        made.accuse(f"n{number}", evidence(confirmed=True, job=f"job{number}"))
    made.look(2)
    assert made.marked() == set()
    assert (made.memory.breaker.open, made.memory.breaker.trip) == (True, 1)
    for number in (1, 2):
        del made.isolations[f"n{number}"]
    made.seconds += 86400
    made.reset = "2"
    made.look()
    assert made.memory.breaker.open
    made.reset = "1"
    made.accuse("n0", evidence(confirmed=True, seconds=made.seconds))
    made.look()
    assert (made.memory.breaker.open, made.reason("n0")[:13]) == (False, "StormCooldown")
    made.seconds += 601
    made.look(2)
    assert made.marked() == {"n0"}


def test_a_node_that_bears_our_mark_without_a_nodeisolation_counts() -> None:
    """Between two writes: the fleet's limit sees what is, not only what is written down."""
    made = isolated()
    made.isolations["n0"] = replace(made.isolations["n0"], status=made.isolations["n0"].status)
    made.memory = PolicyStatus()
    del made.isolations["n0"]
    made.accuse("n1", evidence(confirmed=True))
    plan = made.look(writes=2)
    assert plan.mark == ()
    assert made.reason("n1").startswith("FleetLimit")
