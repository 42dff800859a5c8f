"""Planned ends: leave, resize, suspend, grow. Nobody is blamed, nothing is counted, no step is lost."""

from __future__ import annotations

from dataclasses import replace

import pytest

from fakes.runtime import World, bounds, running_world
from stormjib_runtime.wire import AgentPhase, Do, JobPhase, Order, ResumePoint


def order(world: World, slot: int) -> Order:
    last = world.agents[slot].last
    if last is None:
        raise RuntimeError(f"agent of slot {slot} got no order")
    return last


def leave(world: World, slot: int) -> None:
    for agent in world.agents.values():
        agent.slow_stop = True
    world.agents[slot].leaving = True
    world.deliver(slot)
    world.settle()


def finish_stop(world: World) -> None:
    for slot, agent in world.agents.items():
        agent.slow_stop = False
        if agent.phase is AgentPhase.RUNNING:
            agent.stop(order(world, slot))
    world.settle()


def test_a_leaver_stops_everybody_after_the_same_step_and_only_the_leaver_is_told_to_go() -> None:
    world = running_world(bounds(2, 1, spares=1), step=100)
    leave(world, 0)
    stops = [order(world, slot) for slot in (0, 1)]
    assert [stop.do for stop in stops] == [Do.STOP, Do.STOP]
    assert {stop.stop_after for stop in stops} == {105}, "half a second of steps of 0.1 s"
    assert [stop.end_leaving for stop in stops] == [True, False]
    assert world.job().phase is JobPhase.STOPPING
    assert world.agents[1].ranks[0].exit is None


def test_the_spare_takes_the_leavers_rank_and_the_leaver_is_let_go() -> None:
    world = running_world(bounds(2, 1, spares=1))
    leave(world, 0)
    assert world.causes == ["Start"]
    finish_stop(world)
    assert world.slots == [2, 1]
    assert world.causes == ["Start", "Leave"]
    assert not world.state.history[-1].counted
    assert world.state.history[-1].fault is None
    assert order(world, 0).do is Do.FINISH


def test_a_leave_without_a_spare_shrinks_the_job_and_below_the_least_number_it_waits() -> None:
    world = running_world(bounds(2, 1))
    leave(world, 1)
    finish_stop(world)
    assert world.slots == [0]
    last = running_world(bounds(1, 1))
    leave(last, 0)
    finish_stop(last)
    assert last.causes == ["Start"]
    assert last.job().phase is JobPhase.WAITING
    assert order(last, 0).do is Do.FINISH


def test_a_spare_that_leaves_disturbs_nobody() -> None:
    world = running_world(bounds(2, 1, spares=1))
    leave(world, 2)
    assert order(world, 2).do is Do.FINISH
    assert world.job().phase is JobPhase.RUNNING


def test_a_leaver_that_is_gone_before_it_stopped_does_not_hold_up_the_others() -> None:
    world = running_world(bounds(2, 1, spares=1))
    leave(world, 0)
    world.kill(0)
    world.settle()
    assert world.slots == [2, 1]
    assert world.causes == ["Start", "Leave"]


def test_a_stop_that_is_never_reached_ends_after_its_deadline() -> None:
    world = running_world(bounds(2, 1, spares=1))
    for agent in world.agents.values():
        agent.all_ranks(phase="Data")
    leave(world, 0)
    world.pass_time(50, stepping=True)
    assert world.causes == ["Start"]
    world.pass_time(20, stepping=True)
    assert world.causes == ["Start", "Leave"]


def test_exits_of_a_script_that_does_not_listen_are_no_fault_under_a_stop() -> None:
    world = running_world(bounds(2, 1, spares=1))
    for agent in world.agents.values():
        agent.all_ranks(listens=False)
    leave(world, 0)
    world.agents[0].all_ranks(exit=-15)
    world.agents[1].all_ranks(exit=1)
    world.settle()
    assert world.causes == ["Start"]
    finish_stop(world)
    assert world.causes == ["Start", "Leave"]


def test_a_fault_under_a_stop_is_still_one_generation_without_the_leaver() -> None:
    world = running_world(bounds(2, 1, spares=1))
    leave(world, 0)
    world.agents[1].rank(0, exit=-9)
    world.settle()
    finish_stop(world)
    assert world.slots == [2, 1]
    assert world.causes == ["Start", "RankExit"]


def test_zero_exits_under_a_stop_are_complete_only_for_a_script_that_listens() -> None:
    for listens, phase in ((True, JobPhase.COMPLETE), (False, JobPhase.STARTING)):
        world = running_world(bounds(2, 1, spares=1))
        for agent in world.agents.values():
            agent.all_ranks(listens=listens)
        leave(world, 0)
        for slot in (0, 1):
            world.agents[slot].all_ranks(exit=0)
        finish_stop(world)
        assert world.job().phase is phase


def test_the_job_grows_at_the_next_checkpoint_when_an_agent_comes_back() -> None:
    world = running_world()
    world.cut.add(0)
    world.pass_time(4)
    assert world.slots == [1]
    world.step_all(101)
    world.cut.clear()
    world.agents[1].slow_stop = True
    world.settle()
    world.pass_time(0.2)
    assert order(world, 1).do is Do.STOP
    assert order(world, 1).stop_after == 120, "a multiple of the interval, far enough ahead"
    finish_stop(world)
    assert world.slots == [1, 0], "the others keep their node ranks"
    assert world.causes == ["Start", "AgentSilent", "Grow"]


def test_growing_waits_until_a_checkpoint_is_near() -> None:
    world = running_world(bounds(2, 1, interval_steps=1000), step=10)
    world.cut.add(1)
    world.pass_time(4)
    world.step_all(30)
    world.cut.clear()
    world.settle()
    world.pass_time(5, stepping=True)
    assert world.causes == ["Start", "AgentSilent"]
    world.step_all(990)
    world.pass_time(0.2)
    assert world.causes[-1] == "Grow"


def test_a_script_that_does_not_listen_grows_right_behind_a_checkpoint() -> None:
    world = running_world()
    world.agents[1].listens = False
    world.cut.add(0)
    world.pass_time(4)
    world.step_all(30)
    world.cut.clear()
    world.settle()
    world.pass_time(3, stepping=True)
    assert world.causes == ["Start", "AgentSilent"]
    step = world.agents[1].ranks[0].step
    world.agents[1].committed = ResumePoint(step - 1, world.state.current, "d")
    world.settle()
    assert world.causes[-1] == "Grow"


def test_a_leave_while_the_job_is_about_to_grow_is_one_generation_and_a_leave() -> None:
    world = running_world(bounds(2, 1, spares=1))
    world.change(replicas=3)
    for agent in world.agents.values():
        agent.slow_stop = True
    world.settle()
    world.pass_time(0.2)
    assert world.job().phase is JobPhase.STOPPING
    leave(world, 0)
    assert order(world, 0).end_leaving
    finish_stop(world)
    assert world.slots == [2, 1]
    assert world.causes == ["Start", "Leave"]


def test_nobody_grows_before_the_first_step() -> None:
    world = running_world()
    world.cut.add(0)
    world.pass_time(4)
    world.cut.clear()
    world.settle()
    world.pass_time(1)
    assert world.slots == [1]


@pytest.mark.parametrize(("replicas", "cause", "slots"), [(1, "Shrink", [0]), (3, "Grow", [0, 1, 2])])
def test_a_resize_is_planned_and_not_counted(replicas: int, cause: str, slots: list[int]) -> None:
    world = running_world(bounds(2, 1, spares=1))
    world.change(replicas=replicas)
    world.settle()
    world.pass_time(0.2)
    assert world.slots == slots
    assert world.causes == ["Start", cause]
    assert not world.state.history[-1].counted


def test_an_excluded_pod_leaves_as_planned_and_is_a_member_no_more() -> None:
    world = running_world(bounds(2, 1, spares=1))
    world.change(excluded=("pod-1",))
    world.settle()
    assert world.slots == [0, 2]
    world.agents[0].rank(0, exit=1)
    world.settle()
    world.pass_time(2)
    assert world.slots == [0, 2]


def test_suspend_stops_at_a_step_and_resume_goes_on() -> None:
    world = running_world(step=50)
    world.change(suspend=True)
    world.settle()
    assert world.job().phase is JobPhase.SUSPENDED
    assert all(agent.ranks == () for agent in world.agents.values())
    world.pass_time(100)
    assert world.causes == ["Start"]
    world.change(suspend=False)
    world.settle()
    assert world.causes == ["Start", "Resume"]
    assert world.job().phase is JobPhase.STARTING


def test_a_member_that_never_began_has_nothing_to_stop() -> None:
    world = World(bounds(2))
    world.deliver(0)
    world.deliver(1)  # from here on slot 1 does not hear that generation 1.1 runs
    world.cut.add(1)
    world.settle()
    assert world.phase(0) is AgentPhase.RUNNING
    world.cut.clear()
    world.change(suspend=True)
    world.pass_time(3)
    assert world.agents[1].ran == []
    assert world.job().phase is JobPhase.SUSPENDED, "before the stop's minute is over"


def test_a_job_that_is_born_suspended_starts_when_it_is_resumed() -> None:
    world = World(bounds(2, suspend=True))
    world.settle()
    assert world.job().phase is JobPhase.SUSPENDED
    world.change(suspend=False)
    world.settle()
    assert world.causes == ["Start"]


def test_a_fault_is_still_paid_for_after_a_suspension() -> None:
    world = running_world(bounds(2, restarts_left=0))
    world.agents[0].rank(0, exit=1)
    world.settle()
    world.change(suspend=True)
    world.settle()
    assert world.job().phase is JobPhase.SUSPENDED
    world.change(suspend=False)
    world.settle()
    assert world.job().phase is JobPhase.EXHAUSTED


def test_suspend_while_preparing_prepares_no_further() -> None:
    world = World(bounds(2))
    world.agents[0].offers = None
    for slot in (0, 1):
        world.deliver(slot)
    world.change(suspend=True)
    world.settle()
    assert world.job().phase is JobPhase.SUSPENDED
    assert world.phase(0) is AgentPhase.IDLE
    assert world.state.bounds == replace(bounds(2), version=2, suspend=True)
