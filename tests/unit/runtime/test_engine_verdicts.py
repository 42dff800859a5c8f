"""A verdict becomes an act: who stays, who goes, what is lost, what the operator is asked."""

from __future__ import annotations

from dataclasses import replace

import pytest

from fakes.runtime import FakeAgent, World, bounds, last_fault, running_world
from stormjib_health.verdict import Action, Rule, Scope, Syndrome, Verdict
from stormjib_runtime import engine
from stormjib_runtime.codec import decode, encode
from stormjib_runtime.kept import Kept, keep, revive
from stormjib_runtime.wire import (
    EXIT_ROLL_BACK,
    AgentPhase,
    Bounds,
    GenerationId,
    JobPhase,
    JobState,
    ResumePoint,
)

FROZEN = Verdict(
    1,
    Syndrome.NON_COMMUNICATION_HANG,
    Scope.RANK,
    (2,),
    (1,),
    0.95,
    confirmed=True,
    sentence="rank 2 is stopped",
)
SLOW = Verdict(1, Syndrome.NON_COMMUNICATION_SLOW, Scope.RANK, (2,), (1,), 0.9, confirmed=True, severity=2.0)


def find(world: World, verdict: Verdict) -> None:
    world.state = engine.on_verdict(world.state, str(world.state.current), verdict, world.now)
    world.settle()


def ruled(action: Action, replicas: int = 2, minimum: int = 1, spares: int = 0) -> Bounds:
    return bounds(replicas, minimum, spares, rules=(Rule(action),))


def test_a_hang_restarts_at_once_and_names_its_evidence() -> None:
    world = running_world()
    find(world, FROZEN)
    assert world.causes == ["Start", "RankHang"]
    fault = last_fault(world)
    assert (fault.slot, fault.rank, fault.message) == (1, 2, "rank 2 is stopped")
    assert fault.verdict is not None
    assert fault.verdict.generation == "1.1"
    assert world.slots == [0, 1], "the first time the node stays"
    assert world.job().unwanted == ()


def test_the_second_hang_of_one_node_takes_it_out_and_accuses_it() -> None:
    world = running_world(bounds(2, 1, spares=1))
    find(world, FROZEN)
    world.step_all(20)
    find(world, FROZEN)
    assert world.slots == [0, 2], "the spare has its rank"
    job = world.job()
    assert job.unwanted == ("pod-1",)
    accusation = job.accusations[0]
    assert (accusation.slot, accusation.pod_uid, accusation.generation) == (1, "pod-1", "1.2")
    assert 0 < accusation.weight <= 0.9
    world.pass_time(5, stepping=True)
    assert world.slots == [0, 2], "it does not come back"


def test_slowness_that_no_check_confirmed_is_not_held_against_a_node() -> None:
    world = running_world(bounds(2, 1, spares=1))
    find(world, replace(SLOW, confirmed=False))
    assert world.state.strikes == {}
    find(world, replace(FROZEN, id=2))
    assert world.slots == [0, 1], "its first hang: the node stays"
    assert dict(world.state.strikes) == {"pod-1": 1}


def test_the_same_trouble_told_twice_acts_once() -> None:
    world = running_world(bounds(2, 1, rules=(Rule(Action.NOTE, confirmed=False),)))
    find(world, FROZEN)
    find(world, replace(FROZEN, confidence=0.99))
    job = world.job()
    assert [one.confidence for one in job.verdicts] == [0.99]
    assert dict(world.state.strikes) == {"pod-1": 1}
    assert world.causes == ["Start"]


def test_a_node_is_accused_once_of_one_trouble_however_often_that_is_told() -> None:
    world = running_world(ruled(Action.ISOLATE, 2, 2))
    find(world, SLOW)
    find(world, replace(SLOW, severity=3.0))
    job = world.job()
    assert (len(job.accusations), job.unwanted, world.causes) == (1, ("pod-1",), ["Start"])


def test_who_is_slow_leaves_as_planned_and_no_step_is_lost() -> None:
    world = running_world(bounds(2, 1, spares=1))
    find(world, SLOW)
    assert world.causes == ["Start", "Leave"]
    assert world.slots == [0, 2]
    assert world.state.history[-1].fault is None
    assert not world.state.history[-1].counted


def test_a_node_that_the_job_cannot_do_without_trains_on_until_there_is_another() -> None:
    world = running_world(replace(ruled(Action.REPLACE, 2, 2, 1), slots={"0": "pod-0", "1": "pod-1"}))
    find(world, FROZEN)
    assert world.slots == [0, 1]
    assert world.job().unwanted == ("pod-1",), "the operator is told all the same"
    world.step_all(30)
    world.change(slots={"0": "pod-0", "1": "pod-1", "2": "pod-2"})
    world.agents[2] = FakeAgent(2)
    world.settle()
    assert world.slots == [0, 2]
    assert world.causes[-1] == "Leave"


def test_what_concerns_a_pod_is_forgotten_with_the_pod() -> None:
    world = running_world(ruled(Action.REPLACE, 2, 1))
    find(world, FROZEN)
    assert world.slots == [0]
    world.change(slots={"0": "pod-0", "1": "pod-new"})
    assert world.job().unwanted == ()
    assert world.state.strikes == {}


def test_a_node_that_is_not_heard_is_left_to_the_rule_for_silence_which_leaves_it_out() -> None:
    world = running_world(bounds(2, 1, spares=1))
    world.cut.add(1)
    for _ in range(26):
        world.now += 0.1
        world.deliver(0)
        world.deliver(2)
        world.tick()
    cut = replace(
        FROZEN, syndrome=Syndrome.COMMUNICATION_HANG, scope=Scope.NODE, culprits=(1,), confirmed=False
    )
    find(world, cut)
    assert world.causes == ["Start"], "a restart now would take the cut node with it"
    assert [one.syndrome for one in world.job().verdicts] == [Syndrome.COMMUNICATION_HANG]
    world.agents[0].age(3.0)
    world.pass_time(2.0)
    assert world.causes == ["Start", "AgentSilent"]
    assert world.slots == [0, 2]


def test_a_cut_node_that_was_restarted_in_place_is_left_out_after_three_heartbeats() -> None:
    """A verdict may be quicker than the second heartbeat that a cut node misses: then the node is in the next generation,
    where nobody has a step clock that could show that it stands still."""
    world = running_world(bounds(2, 1, spares=1))
    world.cut.add(1)
    find(world, replace(FROZEN, syndrome=Syndrome.COMMUNICATION_HANG, scope=Scope.NODE, confirmed=False))
    assert world.causes == ["Start", "CommunicationHang"]
    assert world.slots == [0, 1]
    world.pass_time(4.0)
    assert world.causes == ["Start", "CommunicationHang", "AgentSilent"]
    assert world.slots == [0, 2]


def test_shrink_spends_no_spare_until_the_spec_changes() -> None:
    world = running_world(ruled(Action.SHRINK, 2, 1, spares=1))
    find(world, FROZEN)
    assert len(world.slots) == 1
    world.step_all(40)
    world.pass_time(5, stepping=True)
    assert len(world.slots) == 1, "the spare is kept"
    world.change(spec_generation=2)
    world.pass_time(5, stepping=True)
    assert len(world.slots) == 2


@pytest.mark.parametrize("syndrome", [Syndrome.CORRUPTION, Syndrome.NON_COMMUNICATION_HANG])
def test_roll_back_refuses_what_this_generation_has_committed_last(syndrome: Syndrome) -> None:
    old = ResumePoint(10, GenerationId(1, 0), "old")
    new = ResumePoint(20, GenerationId(1, 1), "new")
    world = World(ruled(Action.ROLL_BACK))
    world.agents[0].offers = old
    world.settle()
    world.agents[0].committed = new
    world.step_all(25)
    find(world, replace(FROZEN, syndrome=syndrome))
    assert world.state.refused == ("new",)
    world.step_all(26)
    find(world, replace(FROZEN, syndrome=syndrome, id=2))
    assert world.state.refused == ("new",), "what a generation resumed from is good"


WRONG = Verdict(
    1,
    Syndrome.CORRUPTION,
    Scope.RANK,
    (2,),
    (1,),
    0.95,
    confirmed=True,
    sentence="rank 2 is the one that differs",
)


def rolled_back(world: World) -> None:
    """Every rank ends because its numbers are in doubt."""
    for agent in world.agents.values():
        if agent.phase is AgentPhase.RUNNING:
            agent.all_ranks(exit=EXIT_ROLL_BACK)
    world.settle()


def test_ranks_that_doubt_their_numbers_are_restarted_without_the_one_they_accuse() -> None:
    world = running_world(bounds(2, 1, spares=1))
    rolled_back(world)
    assert world.causes == ["Start"], "what they found comes with the next sample"
    find(world, WRONG)
    assert world.causes == ["Start", "Corruption"]
    assert world.slots == [0, 2]
    assert last_fault(world).rank == 2
    assert [one.slot for one in world.job().accusations] == [1]


def test_ranks_that_doubt_their_numbers_are_restarted_also_if_nobody_says_why() -> None:
    world = running_world(bounds(2, 1, spares=1))
    rolled_back(world)
    world.now += 0.9
    world.tick()
    world.settle()
    assert world.causes == ["Start", "Corruption"]
    assert world.slots == [0, 1]


def test_a_rank_whose_wrong_step_was_done_again_leaves_as_planned() -> None:
    world = running_world(bounds(2, 1, spares=1))
    find(world, WRONG)
    assert world.causes == ["Start", "Leave"]
    assert world.slots == [0, 2]


def test_fail_ends_the_job_for_good_also_after_a_restart_of_the_coordinator() -> None:
    world = running_world(ruled(Action.FAIL))
    find(world, FROZEN)
    assert world.job().phase is JobPhase.EXHAUSTED
    assert all(agent.phase is AgentPhase.IDLE for agent in world.agents.values())
    kept = decode(Kept, encode(keep(world.state, 1)))
    again = revive(kept, world.now)
    assert engine.exhausted(again, kept.bounds or bounds(), again.stage)  # type: ignore[arg-type]


def test_a_program_error_costs_no_node_whatever_the_rules_say() -> None:
    world = running_world(ruled(Action.ISOLATE, 2, 1, spares=1))
    desync = Verdict(1, Syndrome.DESYNC, Scope.RANK, (2,), (1,), 0.9, confirmed=True, software=True)
    for number in range(3):
        find(world, replace(desync, id=number))
        world.step_all(10 * number)
    job = world.job()
    assert (job.unwanted, job.accusations, world.slots) == ((), (), [0, 1])
    assert world.causes == ["Start", "Desync", "Desync", "Desync"]


def test_what_is_found_of_a_generation_that_is_over_is_noted_and_no_more() -> None:
    world = running_world()
    world.agents[1].rank(0, exit=-9)
    world.settle()
    before = world.state
    world.state = engine.on_verdict(before, "1.1", FROZEN, world.now)
    world.settle()
    assert [one.generation for one in world.job().verdicts] == ["1.1"]
    assert (world.state.stage, world.state.current) == (before.stage, before.current)
    assert (world.state.strikes, world.causes) == ({}, ["Start", "RankExit"])


def test_everything_survives_the_way_to_the_operator_and_the_disk() -> None:
    world = running_world(bounds(2, 1, spares=1, rules=(Rule(Action.ISOLATE),)))
    find(world, FROZEN)
    job = world.job()
    assert decode(JobState, encode(job)) == job
    kept = decode(Kept, encode(keep(world.state, 1)))
    again = revive(kept, world.now)
    assert (again.unwanted, again.accusations, dict(again.strikes)) == (
        world.state.unwanted,
        world.state.accusations,
        dict(world.state.strikes),
    )
