"""Time without progress: silence, frozen processes, deadlocks, clocks that stand still, and what restarts nothing."""

from __future__ import annotations

from dataclasses import replace

import pytest

from fakes.runtime import World, bounds, last_fault, running_world
from stormjib_runtime.hang import ranks, stopped
from stormjib_runtime.wire import HEARTBEAT_S, Cause, Hang, RankPhase

# --- silence --------------------------------------------------------------------------------------------------------


def test_a_silent_agent_is_replaced_when_the_others_stand_still() -> None:
    world = running_world(bounds(2, 1, spares=1))
    world.cut.add(0)
    world.pass_time(2.5)
    assert world.causes == ["Start"]
    world.pass_time(1.5)
    assert world.slots == [2, 1]
    assert last_fault(world).cause is Cause.AGENT_SILENT
    assert not world.state.history[-1].counted


def test_silence_alone_is_no_fault_while_the_others_advance() -> None:
    world = running_world(bounds(2, 1, spares=1))
    world.cut.add(0)
    world.pass_time(60, stepping=True)
    assert world.causes == ["Start"]
    world.cut.clear()
    world.pass_time(2, stepping=True)
    assert world.causes == ["Start"]


def test_without_a_spare_a_silent_agent_is_left_out_at_once() -> None:
    world = running_world()
    world.cut.add(0)
    world.pass_time(4)
    assert world.slots == [1]


def test_a_silent_agent_is_waited_for_where_nothing_else_can_be_done() -> None:
    world = running_world(bounds(2, 2))
    world.cut.add(0)
    world.pass_time(20)
    assert world.causes == ["Start"]
    world.cut.clear()
    world.pass_time(2, stepping=True)
    assert world.causes == ["Start"], "it was only cut, and trains on"


def test_without_step_clocks_silence_needs_thirty_seconds() -> None:
    world = World(bounds(2, 1, spares=1))
    world.settle()
    world.cut.add(0)
    world.pass_time(28)
    assert world.causes == ["Start"]
    world.pass_time(4)
    assert world.causes == ["Start", "AgentSilent"]


def test_in_a_generation_of_one_agent_three_missed_heartbeats_decide() -> None:
    world = running_world(bounds(1, 1, spares=1))
    world.cut.add(0)
    world.pass_time(4)
    assert world.slots == [1]


def test_when_all_are_silent_it_is_the_coordinator_that_is_cut() -> None:
    world = running_world()
    world.cut.update({0, 1})
    world.pass_time(120)
    assert world.causes == ["Start"]


def test_a_pod_that_the_operator_has_replaced_counts_as_lost_once_the_others_stand_still() -> None:
    world = running_world(bounds(2, 2))
    world.cut.add(0)
    world.pass_time(5)
    assert world.causes == ["Start"]
    world.cut.clear()
    world.agents[0].restart()
    world.agents[0].pod_uid = "pod-0b"
    world.agents[0].number = 1
    world.change(slots={"0": "pod-0b", "1": "pod-1"})
    world.settle()
    assert world.slots == [0, 1]
    assert world.causes == ["Start", "AgentSilent"]


# --- hangs ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("letter", ["T", "Z"])
def test_a_stopped_process_is_named_after_two_seconds(letter: str) -> None:
    world = running_world()
    world.agents[1].rank(1, process=letter)
    world.pass_time(1.5)
    assert world.causes == ["Start"]
    world.pass_time(1.5)
    assert world.causes == ["Start", "RankHang"]
    assert (last_fault(world).slot, last_fault(world).rank) == (1, 3)


def test_long_steps_give_a_stopped_process_three_medians() -> None:
    world = World(bounds(2))
    world.settle()
    for agent in world.agents.values():
        agent.median = 3.0
    world.step_all(5)
    world.agents[1].rank(1, process="T")
    world.pass_time(8)
    assert world.causes == ["Start"]
    world.pass_time(2)
    assert world.causes == ["Start", "RankHang"]


def test_all_ranks_idle_inside_a_step_is_a_deadlock() -> None:
    world = running_world()
    world.pass_time(1.9)
    assert world.causes == ["Start"]
    world.pass_time(2.2)
    assert world.causes == ["Start", "RankHang"]
    assert last_fault(world).slot is None


def test_a_step_that_computes_is_slow_and_no_deadlock() -> None:
    world = running_world()
    for _ in range(10):
        world.agents[1].rank(0, idle_s=0.0)
        world.pass_time(1)
    assert world.causes == ["Start"]


@pytest.mark.parametrize(
    "phase",
    [RankPhase.DATA, RankPhase.EVALUATION, RankPhase.CHECKPOINT, RankPhase.START, RankPhase.END],
)
def test_slow_work_that_a_rank_names_restarts_nothing(phase: RankPhase) -> None:
    world = running_world()
    world.agents[0].rank(0, phase=phase)
    world.pass_time(200)
    assert world.causes == ["Start"]


def silent_script(world: World) -> None:
    """Ranks that write the step clock and nothing else."""
    for agent in world.agents.values():
        agent.listens = False
        agent.all_ranks(phase=RankPhase.UNKNOWN, listens=False)


def test_a_clock_that_stands_still_restarts_at_the_floor() -> None:
    world = running_world()
    silent_script(world)
    world.pass_time(58)
    assert world.causes == ["Start"]
    world.pass_time(4)
    assert world.causes == ["Start", "RankHang"]


def test_hang_restart_off_restarts_nothing_without_direct_evidence() -> None:
    world = running_world(bounds(2, hang=Hang(restart=False)))
    silent_script(world)
    world.pass_time(200)
    assert world.causes == ["Start"]


def test_a_rank_that_never_wrote_its_clock_never_hangs() -> None:
    world = World(bounds(2))
    world.settle()
    silent_script(world)
    world.pass_time(200)
    assert world.causes == ["Start"]


def test_one_clock_that_stands_still_while_others_advance_restarts_nothing() -> None:
    world = running_world()
    silent_script(world)
    for _ in range(100):
        world.agents[1].step(world.agents[1].ranks[0].step + 1)
        silent_script(world)
        world.pass_time(1)
    assert world.causes == ["Start"]


def test_the_one_that_lags_behind_is_named() -> None:
    world = running_world()
    silent_script(world)
    world.agents[1].rank(1, step=9)
    world.pass_time(63)
    assert (last_fault(world).slot, last_fault(world).rank) == (1, 3)


def test_rare_heartbeats_of_a_large_job_do_not_make_ranks_look_stopped() -> None:
    world = running_world()
    world.step_all(5)
    agents = {slot: replace(agent, heartbeat_s=2.5) for slot, agent in world.state.agents.items()}
    state = replace(world.state, agents=agents)
    seen = list(ranks(state, world.now + 2.4))
    assert [carry for _, _, carry in seen] == [HEARTBEAT_S] * len(seen)
    assert stopped(seen) is False
