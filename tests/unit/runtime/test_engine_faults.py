"""What ends a generation, who is to blame, what it costs, and what does not end one."""

from __future__ import annotations

import pytest

from fakes.runtime import World, bounds, last_fault, running_world
from stormjib_runtime.engine import AUDIBLE, REST_S
from stormjib_runtime.faults import CONFIRM_S, MESSAGE_BYTES
from stormjib_runtime.wire import (
    EXIT_RESUME_FAILED,
    EXIT_STOPPED,
    HEARTBEAT_S,
    AgentPhase,
    Cause,
    Do,
    GenerationId,
    JobPhase,
    ResumePoint,
)

PEER_GONE = "RuntimeError: Connection closed by peer [10.0.0.1]:4711"


def test_who_only_lost_a_peer_is_not_named_while_the_peer_may_yet_be_heard_of() -> None:
    world = running_world()
    world.agents[0].rank(0, exit=1, last_lines=PEER_GONE)
    world.deliver(0)
    assert world.causes == ["Start"]
    world.now += 0.1
    world.agents[1].rank(1, exit=1, last_lines="ValueError: bad batch")
    world.deliver(1)
    world.settle()
    fault = last_fault(world)
    assert (fault.slot, fault.rank) == (1, 3)


def test_where_everybody_only_lost_a_peer_the_first_is_named_in_a_moment() -> None:
    world = running_world()
    world.agents[0].rank(0, exit=1, last_lines=PEER_GONE)
    world.deliver(0)
    world.now += 0.31
    world.tick()
    world.settle()
    assert last_fault(world).rank == 0


# --- exits ----------------------------------------------------------------------------------------------------------


def test_a_killed_rank_is_one_generation_though_the_others_exit_too() -> None:
    world = running_world()
    world.agents[1].rank(0, exit=-9, last_lines="boom")
    world.deliver(1)
    for slot in (0, 1):
        world.agents[slot].all_ranks(exit=1)
        world.deliver(slot)
    world.settle()
    assert world.causes == ["Start", "RankExit"]
    assert (last_fault(world).slot, last_fault(world).rank) == (1, 2)
    assert last_fault(world).message == "exit -9\nboom"
    assert world.state.history[-1].counted
    assert world.slots == [0, 1]
    assert world.agents[0].ran == ["1.1", "1.2"]


def test_a_signal_is_a_better_culprit_than_an_exit_code() -> None:
    world = running_world()
    world.agents[0].rank(0, exit=1)
    world.agents[0].rank(1, exit=-11)
    world.deliver(0)
    assert (last_fault(world).rank, last_fault(world).message) == (1, "exit -11")


def test_the_message_keeps_the_last_lines_within_its_limit() -> None:
    world = running_world()
    world.agents[0].rank(0, exit=1, last_lines="é" * 3000 + "the end")
    world.deliver(0)
    assert len(last_fault(world).message.encode()) <= MESSAGE_BYTES
    assert last_fault(world).message.endswith("the end")


def test_a_stop_that_nobody_asked_for_is_an_exit() -> None:
    world = running_world()
    world.agents[0].rank(0, exit=EXIT_STOPPED)
    world.deliver(0)
    assert last_fault(world).cause is Cause.RANK_EXIT


def test_old_ranks_end_before_the_next_generation_is_prepared() -> None:
    world = running_world()
    world.agents[0].rank(0, exit=-9)
    world.deliver(0)
    world.deliver(0)
    assert world.phase(0) is AgentPhase.IDLE, "slot 1 may still hold steps that the storage does not"
    world.deliver(1)
    world.deliver(1)
    world.deliver(0)
    assert world.phase(0) is AgentPhase.PREPARED
    assert world.agents[1].last is not None
    assert world.agents[1].last.do is Do.WAIT
    assert world.agents[1].ranks == ()


@pytest.mark.parametrize("heard", [True, False])
def test_nobody_waits_long_for_the_steps_of_a_node_that_does_not_come_to_rest(heard: bool) -> None:
    """A rank that no signal ends, in a slot that is replaced; or an agent that is not heard any more."""
    world = running_world(bounds(2, 2, spares=1))
    stuck = world.agents[1]
    stuck._end = lambda phase: None  # type: ignore[method-assign]
    world.change(excluded=("pod-1",))
    world.settle()
    if not heard:
        world.cut.add(1)
    limit = REST_S if heard else AUDIBLE * HEARTBEAT_S
    world.pass_time(limit - 1)
    assert (world.phase(0), world.phase(2)) == (AgentPhase.IDLE, AgentPhase.IDLE)
    world.pass_time(2)
    assert world.slots == [0, 2]
    assert world.phase(0) is AgentPhase.RUNNING


def test_a_resume_point_that_cannot_be_loaded_is_refused_and_not_counted() -> None:
    world = World(bounds(2))
    bad, good = (ResumePoint(step, GenerationId(1, 0), f"digest-{step}") for step in (120, 100))
    world.agents[0].offers = bad
    world.settle()
    world.agents[0].offers = good
    world.agents[1].rank(0, exit=1)
    world.agents[1].rank(1, exit=EXIT_RESUME_FAILED)
    world.deliver(1)
    world.agents[0].all_ranks(exit=1)
    world.settle()
    assert world.causes[-1] == "ResumeOlder"
    assert not world.state.history[-1].counted
    assert world.agents[0].last is not None
    assert world.state.refused == ("digest-120",)
    assert world.state.history[-1].resume == good
    assert world.job().phase is JobPhase.STARTING, "no backoff"


def test_a_point_that_is_offered_again_although_refused_is_an_exit_and_counts() -> None:
    world = World(bounds(2))
    world.settle()
    world.agents[0].rank(0, exit=EXIT_RESUME_FAILED)
    world.settle()
    assert world.state.last_fault is not None
    assert world.state.last_fault.cause is Cause.RANK_EXIT, "there was nothing to resume from"


# --- containers -----------------------------------------------------------------------------------------------------


def test_a_killed_container_with_a_spare_goes_on_at_once_on_its_node_rank() -> None:
    world = running_world(bounds(2, 1, spares=1))
    world.kill(0)
    assert world.causes == ["Start"], "a link that was only reset is back within milliseconds"
    world.pass_time(CONFIRM_S + 0.1)
    assert world.slots == [2, 1]
    assert last_fault(world).cause is Cause.CONTAINER_EXIT
    world.come_back(0)
    world.settle()
    assert len(world.causes) == 2


def test_exits_behind_a_lost_connection_blame_the_container() -> None:
    world = running_world(bounds(2, 1, spares=1))
    world.kill(0)
    world.agents[1].all_ranks(exit=1)
    world.settle()
    assert (last_fault(world).cause, last_fault(world).slot) == (Cause.CONTAINER_EXIT, 0)
    world.pass_time(2)
    assert len(world.causes) == 2


def test_a_connection_that_is_made_again_is_no_fault() -> None:
    world = running_world()
    world.kill(0)
    world.agents[0].alive = True
    world.deliver(0)
    world.pass_time(3, stepping=True)
    assert world.causes == ["Start"]


def test_while_the_others_advance_a_lost_connection_restarts_nothing() -> None:
    world = running_world(bounds(2, 1, spares=1))
    world.kill(0)
    world.agents[0].alive = False
    for _ in range(40):
        world.now += 0.1
        world.agents[1].step(world.agents[1].ranks[0].step + 1)
        world.deliver(1)
        world.deliver(2)
        world.tick()
    assert world.causes == ["Start"]
    world.pass_time(4)
    assert world.causes[-1] in ("ContainerExit", "AgentSilent")


def test_without_a_spare_a_dead_container_has_five_seconds_and_keeps_its_rank() -> None:
    world = running_world()
    world.kill(0)
    world.pass_time(3)
    assert world.causes == ["Start"]
    assert world.agents[1].ranks == (), "its peers were ended at once"
    world.come_back(0)
    world.settle()
    assert world.slots == [0, 1]
    assert world.causes == ["Start", "ContainerExit"]


def test_a_container_that_does_not_come_back_is_left_out_after_five_seconds() -> None:
    world = running_world()
    world.kill(0)
    world.pass_time(4.5)
    assert world.causes == ["Start"]
    world.pass_time(1.5)
    assert world.slots == [1]
    assert world.causes == ["Start", "ContainerExit"]


def test_a_container_that_is_back_but_still_imports_is_waited_for() -> None:
    world = running_world()
    world.kill(0)
    world.pass_time(2)
    world.agents[0].restart()
    world.agents[0].phase = AgentPhase.STARTING
    world.deliver(0)
    world.pass_time(6)
    assert world.causes == ["Start"]
    world.agents[0].phase = AgentPhase.IDLE
    world.settle()
    assert world.slots == [0, 1]


def test_a_higher_agent_number_alone_proves_that_the_container_died() -> None:
    world = running_world()
    world.come_back(1)
    world.settle()
    assert world.causes == ["Start", "ContainerExit"]
    assert world.state.members[1].agent == 2


def test_below_the_least_number_the_job_waits() -> None:
    world = running_world(bounds(2, 2))
    world.kill(0)
    world.pass_time(60)
    assert world.causes == ["Start"]
    assert world.job().phase is JobPhase.WAITING
    world.come_back(0)
    world.settle()
    assert world.slots == [0, 1]


# --- preparing ------------------------------------------------------------------------------------------------------


def test_a_storage_that_cannot_be_opened_is_counted_and_told() -> None:
    world = World(bounds(2, restarts_left=2))
    world.agents[0].prepare_error = "read-only file system"
    world.settle()
    assert world.job().phase is JobPhase.BACKOFF
    world.pass_time(30)
    assert world.causes == ["Start", "PrepareFailed", "PrepareFailed"]
    assert world.job().phase is JobPhase.EXHAUSTED
    fault = world.job().last_fault
    assert fault is not None
    assert fault.message == "read-only file system"


def test_the_first_member_dies_while_it_prepares() -> None:
    world = World(bounds(2, 1, spares=1))
    for slot in (1, 2, 0):
        world.deliver(slot)
    assert world.phase(0) is AgentPhase.PREPARED
    world.kill(0)
    world.pass_time(2)
    assert world.slots == [2, 1]
    assert world.phase(1) is AgentPhase.RUNNING


def test_preparing_that_never_ends_fails() -> None:
    world = World(bounds(2))
    world.agents[0].obey = lambda order: None  # type: ignore[method-assign]
    world.settle()
    world.pass_time(122)
    assert world.state.last_fault is not None
    assert world.state.last_fault.cause is Cause.PREPARE_FAILED


# --- what restarts cost ---------------------------------------------------------------------------------------------


def test_the_budget_is_spent_and_then_the_job_is_exhausted() -> None:
    world = running_world(bounds(2, restarts_left=2))
    for step in range(11, 14):
        world.agents[0].rank(0, exit=1, last_lines="ValueError: x")
        world.settle()
        world.step_all(step)
    assert world.causes == ["Start", "RankExit", "RankExit"]
    assert world.job().phase is JobPhase.EXHAUSTED
    assert world.agents[1].ranks == ()
    fault = world.job().last_fault
    assert fault is not None
    assert "ValueError: x" in fault.message
    assert all(agent.alive for agent in world.agents.values())
    world.change(finish=True)
    world.settle()
    assert not any(agent.alive for agent in world.agents.values())


def test_a_budget_counted_by_the_operator_is_not_spent_twice() -> None:
    world = running_world(bounds(2, restarts_left=1))
    world.agents[0].rank(0, exit=1)
    world.settle()
    world.step_all(11)
    world.change(restarts_left=1, counted_above=GenerationId(1, 2))
    world.agents[0].rank(0, exit=1)
    world.settle()
    assert world.causes == ["Start", "RankExit", "RankExit"]


def test_more_restarts_wake_an_exhausted_job() -> None:
    world = running_world(bounds(2, restarts_left=0))
    world.agents[0].rank(0, exit=1)
    world.settle()
    assert world.job().phase is JobPhase.EXHAUSTED
    world.change(restarts_left=1)
    world.settle()
    assert world.causes == ["Start", "RankExit"]


def test_what_is_not_counted_goes_on_with_an_empty_budget() -> None:
    world = running_world(bounds(2, 1, spares=1, restarts_left=0))
    world.cut.add(0)
    world.pass_time(5)
    assert world.slots == [2, 1]


def test_the_first_restart_after_progress_is_at_once_and_fruitless_ones_wait_longer_each_time() -> None:
    world = running_world(bounds(2, restarts_left=9, backoff_initial_s=1.0, backoff_max_s=3.0))
    waits = []
    for _ in range(5):
        world.agents[0].rank(0, exit=1)
        world.settle()
        began, count = world.now, len(world.causes)
        done = 0.0
        while world.state.number == count and world.job().phase is JobPhase.BACKOFF:
            world.pass_time(0.1)
            done = world.now - began
        waits.append(round(done, 1))
    assert waits == [0.0, 1.0, 2.0, 3.0, 3.0]
    world.step_all(50)
    world.agents[0].rank(0, exit=1)
    world.settle()
    assert world.phase(0) is AgentPhase.RUNNING, "progress resets the delay"
