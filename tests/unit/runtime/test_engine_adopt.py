"""A coordinator that comes new to a running job, and one whose container restarted."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import pytest

from fakes.runtime import JOB, FakeAgent, World, bounds, running_world
from stormjib_runtime import kept
from stormjib_runtime.adopt import ADOPT_S
from stormjib_runtime.codec import decode, encode
from stormjib_runtime.wire import (
    EXIT_STOPPED,
    AgentPhase,
    Cause,
    GenerationId,
    JobPhase,
    ResumePoint,
    StorageFinding,
)

if TYPE_CHECKING:
    from pathlib import Path


def new_pod(world: World) -> None:
    """The coordinator's node is gone; the operator makes another one with the next incarnation."""
    held = world.state.bounds
    if held is None:
        raise RuntimeError("no bounds")
    world.state = kept.fresh(JOB, held.incarnation + 1, world.now)
    world.set_bounds(replace(held, incarnation=held.incarnation + 1))


def new_container(world: World, starts: int = 1) -> None:
    """The coordinator's process is killed and starts again from its file."""
    record = decode(kept.Kept, encode(kept.keep(world.state, starts)))
    world.state = kept.revive(record, world.now)


@pytest.mark.parametrize("successor", [new_pod, new_container])
def test_a_successor_adopts_what_runs_and_begins_nothing(successor: object) -> None:
    world = running_world(bounds(2, 1, spares=1), step=40)
    ran = [list(agent.ran) for agent in world.agents.values()]
    new_pod(world) if successor is new_pod else new_container(world)
    world.settle()
    world.pass_time(30, stepping=True)
    assert world.state.current == GenerationId(1, 1)
    assert [agent.ran for agent in world.agents.values()] == ran, "no rank was started anew"
    assert world.job().phase is JobPhase.RUNNING
    assert world.job().step > 40
    assert world.causes == ["Start"], "the operator is told of it"


def test_after_adoption_the_next_generation_is_the_first_of_the_new_incarnation() -> None:
    world = running_world()
    new_pod(world)
    world.settle()
    world.agents[1].rank(0, exit=-9)
    world.settle()
    assert world.state.current == GenerationId(2, 1)
    assert world.state.generation is not None
    assert world.state.generation.parent == GenerationId(1, 1)
    assert world.agents[0].ran == ["1.1", "2.1"]


def test_a_restarted_container_goes_on_with_the_number() -> None:
    world = running_world()
    world.agents[1].rank(0, exit=-9)
    world.settle()
    new_container(world)
    world.settle()
    world.step_all(12)
    world.agents[1].rank(0, exit=-9)
    world.settle()
    assert [str(entry.generation.id) for entry in world.state.history] == ["1.1", "1.2", "1.3"]


def test_orders_of_a_successor_have_higher_versions() -> None:
    world = running_world()
    version = world.agents[0].version
    new_container(world)
    world.settle()
    assert world.agents[0].version > version
    container = world.agents[0].version
    new_pod(world)
    world.settle()
    assert world.agents[0].version > container


def test_a_crash_between_the_fault_and_the_next_generation_keeps_the_fault() -> None:
    world = running_world(bounds(2, 2))
    world.kill(0)
    world.pass_time(1)
    assert world.causes == ["Start"]
    new_container(world)
    world.come_back(0)
    world.settle()
    assert world.causes == ["Start", "ContainerExit"]
    assert world.state.history[-1].counted


def test_a_crash_after_the_number_was_kept_and_before_anybody_was_told_takes_the_next_number() -> None:
    world = running_world()
    world.agents[1].rank(0, exit=-9)
    for agent in world.agents.values():
        agent.obey = lambda order: None  # type: ignore[method-assign]
    world.deliver(1)
    assert world.state.current == GenerationId(1, 2)
    new_container(world)
    for agent in world.agents.values():
        agent.__dict__.pop("obey")
    world.settle()
    assert world.state.current == GenerationId(1, 3)
    assert world.agents[0].ran == ["1.1", "1.3"]


def test_a_rank_killed_while_no_coordinator_was_there_is_recovered() -> None:
    world = running_world(bounds(2, 1, spares=1))
    world.agents[0].rank(1, exit=-9)
    new_pod(world)
    world.settle()
    assert world.causes == ["Start", "RankExit"]
    assert world.slots == [0, 1], "nobody was mistaken for lost"


def test_a_member_that_is_late_is_not_mistaken_for_lost() -> None:
    world = running_world(bounds(2, 1, spares=1))
    new_pod(world)
    world.cut.add(1)
    world.agents[0].rank(1, exit=-9)
    world.settle()
    world.pass_time(ADOPT_S - 3)
    assert world.causes == []
    assert world.job().phase is JobPhase.RUNNING
    world.cut.clear()
    world.settle()
    assert world.slots == [0, 1]


def test_a_member_that_never_comes_is_replaced() -> None:
    world = running_world(bounds(2, 1, spares=1))
    new_pod(world)
    world.cut.add(1)
    world.pass_time(ADOPT_S + 3)
    assert world.slots == [0, 2]
    assert world.causes[-1] == "AgentSilent"


def test_the_newest_generation_wins_though_an_older_one_is_heard_first() -> None:
    world = running_world(bounds(1, 1, spares=1))
    world.cut.add(0)
    world.pass_time(4)
    world.step_all(30)
    assert world.slots == [1]
    new_pod(world)
    world.cut.clear()
    world.deliver(0)
    assert world.phase(0) is AgentPhase.RUNNING
    world.agents[0].rank(0, exit=1)
    world.deliver(0)
    assert world.state.history == (), "nothing begins before the others were heard"
    world.deliver(1)
    world.settle()
    assert world.state.current == GenerationId(1, 2)
    assert world.phase(0) is AgentPhase.IDLE
    assert world.agents[1].ran == ["1.2"]


def test_a_newer_generation_that_is_heard_late_is_still_adopted() -> None:
    world = running_world(bounds(1, 1, spares=1))
    world.cut.add(0)
    world.pass_time(4)
    world.step_all(30)
    new_pod(world)
    world.cut = {1}
    world.pass_time(ADOPT_S + 1, stepping=True)
    assert world.state.current == GenerationId(1, 1)
    world.cut.clear()
    world.settle()
    assert world.state.current == GenerationId(1, 2)
    assert world.agents[1].ran == ["1.2"]


def test_a_generation_that_is_only_prepared_is_taken_over_and_run() -> None:
    world = World(bounds(2))
    for slot in (0, 1, 0):
        world.deliver(slot)
        if world.agents[0].phase is AgentPhase.PREPARED:
            break
    world.deliver(0) if world.agents[0].phase is not AgentPhase.PREPARED else None
    assert world.phase(0) is AgentPhase.PREPARED
    new_pod(world)
    world.settle()
    assert world.state.current == GenerationId(1, 1)
    assert world.agents[1].ran == ["1.1"]


def test_a_generation_that_one_member_has_left_is_not_joined_again() -> None:
    world = running_world()
    world.agents[1].phase, world.agents[1].ranks, world.agents[1].generation = AgentPhase.IDLE, (), None
    new_pod(world)
    world.settle()
    assert world.agents[1].ran == ["1.1", "2.1"], "1.1 was not run a second time"
    assert not world.state.history[-1].counted


def test_a_planned_stop_that_the_predecessor_had_asked_for_is_no_fault() -> None:
    world = running_world(bounds(2, 1, spares=1))
    for agent in world.agents.values():
        agent.slow_stop = True
    world.agents[0].leaving = True
    world.settle()
    for slot in (0, 1):
        world.agents[slot].all_ranks(exit=EXIT_STOPPED)
    new_pod(world)
    for agent in world.agents.values():
        agent.slow_stop = False
    world.settle()
    assert world.slots == [2, 1]
    assert world.causes == ["Start", "Leave"]


def test_nobody_runs_and_nothing_was_begun_is_an_ordinary_start() -> None:
    world = World(bounds(2, incarnation=2))
    world.settle()
    assert world.state.current == GenerationId(2, 1)
    assert world.causes == ["Start"]


def test_a_complete_job_stays_complete() -> None:
    for successor in (new_pod, new_container):
        world = running_world()
        for agent in world.agents.values():
            agent.all_ranks(exit=0)
        world.settle()
        successor(world)
        world.settle()
        assert world.job().phase is JobPhase.COMPLETE
        world.change(finish=True)
        world.settle()
        assert not any(agent.alive for agent in world.agents.values())


def test_the_parent_is_what_the_storage_has_where_that_is_newer() -> None:
    world = World(bounds(2, incarnation=2))
    for agent in world.agents.values():
        agent.storage = StorageFinding(GenerationId(1, 9), JOB)
    world.settle()
    assert world.state.generation is not None
    assert world.state.generation.parent == GenerationId(1, 9)


def test_nobody_can_claim_a_generation_in_which_it_is_not() -> None:
    world = running_world()
    generation = world.state.generation
    assert generation is not None
    liar = world.agents[0]
    liar.generation = replace(generation, id=GenerationId(1, 99))
    world.deliver(0)
    assert world.state.current == GenerationId(1, 1), "none of ours can be unknown here"
    new_pod(world)
    stranger = FakeAgent(1, phase=AgentPhase.RUNNING, generation=replace(generation, id=GenerationId(1, 98)))
    stranger.number = 2
    world.agents = {1: stranger}
    world.deliver(1)
    world.pass_time(ADOPT_S + 40)
    assert world.state.history[0].generation.id == GenerationId(2, 1)
    assert world.state.history[0].generation.parent is None


# --- the file -------------------------------------------------------------------------------------------------------


def test_the_file_survives_and_counts_its_starts(tmp_path: Path) -> None:
    world = running_world()
    kept.save(tmp_path, kept.keep(world.state, 3))
    state, starts = kept.begin(tmp_path, JOB, 1, 5.0)
    assert starts == 3
    assert (state.number, state.history, state.bounds) == (1, world.state.history, world.state.bounds)
    assert sorted(path.name for path in tmp_path.iterdir()) == [kept.FILE]


def test_a_raised_incarnation_outlives_the_environment_it_was_started_with(tmp_path: Path) -> None:
    world = World(bounds(2, incarnation=4))
    kept.save(tmp_path, kept.keep(world.state, 1))
    assert kept.begin(tmp_path, JOB, 1, 0.0)[0].incarnation == 4
    assert kept.begin(tmp_path, JOB, 5, 0.0)[0].incarnation == 5
    assert kept.begin(tmp_path, "another job", 1, 0.0)[0].bounds is None


def test_a_file_that_cannot_be_read_stops_everything(tmp_path: Path) -> None:
    (tmp_path / kept.FILE).write_bytes(b'{"job_uid":')
    with pytest.raises(kept.Unreadable, match="cannot be read"):
        kept.begin(tmp_path, JOB, 1, 0.0)


def test_refused_points_and_fruitless_generations_are_kept() -> None:
    world = World(bounds(2, restarts_left=9))
    world.agents[0].offers = ResumePoint(5, GenerationId(1, 0), "d")
    world.settle()
    world.agents[0].rank(0, exit=84)
    world.settle()
    world.agents[0].rank(0, exit=1)
    world.settle()
    new_container(world)
    assert world.state.refused == ("d",)
    assert world.state.barren == 1
    assert world.state.last_fault is not None
    assert world.state.last_fault.cause is Cause.RANK_EXIT
