"""Who may register, when a generation begins, who is in it, and when the job is over."""

from __future__ import annotations

from dataclasses import replace

import pytest

from fakes.runtime import World, bounds, on_report, running_world
from stormjib_runtime import engine
from stormjib_runtime.admit import completed
from stormjib_runtime.members import LOWER_WAIT_S, START_WAIT_S, choose
from stormjib_runtime.orders import job_state, order_for
from stormjib_runtime.state import Refused, StandDown
from stormjib_runtime.wire import (
    HEARTBEAT_S,
    UNKNOWN_GENERATION,
    AgentPhase,
    Cause,
    Do,
    GenerationId,
    JobPhase,
    RankPhase,
    ResumePoint,
    StorageFinding,
)


def test_a_generation_has_the_lowest_slots_first_and_the_rest_are_spares() -> None:
    world = World(bounds(2, 1, spares=2))
    world.settle()
    assert world.slots == [0, 1]
    assert [agent.phase for agent in world.agents.values()] == [
        AgentPhase.RUNNING,
        AgentPhase.RUNNING,
        AgentPhase.IDLE,
        AgentPhase.IDLE,
    ]
    assert [rank.rank for rank in world.agents[1].ranks] == [2, 3]
    assert world.agents[2].last is not None
    assert world.agents[2].last.do is Do.WAIT


def test_only_the_first_member_prepares_and_the_others_run_with_its_store_and_resume_point() -> None:
    world = World(bounds(2))
    point = ResumePoint(120, GenerationId(1, 0), "d")
    world.agents[0].offers = point
    world.settle()
    assert Do.PREPARE in world.agents[0].did
    assert Do.PREPARE not in world.agents[1].did
    last = world.agents[1].last
    assert last is not None
    assert (last.do, last.store, last.resume) == (Do.RUN, "10.0.0.0:1", point)
    assert world.state.history[-1].resume == point


def test_the_same_report_twice_changes_nothing() -> None:
    world = running_world()
    before = world.state
    world.deliver(0)
    world.deliver(0)
    assert (world.state.version, world.state.history) == (before.version, before.history)


def test_nothing_begins_while_a_zygote_imports() -> None:
    world = World(bounds(2))
    world.agents[1].phase = AgentPhase.STARTING
    world.settle()
    assert world.state.history == ()
    world.agents[1].phase = AgentPhase.IDLE
    world.settle()
    assert world.slots == [0, 1]


def test_fewer_than_all_begin_after_a_wait_and_fewer_than_the_least_never() -> None:
    world = World(bounds(3, 2), agents=2)
    world.settle()
    world.pass_time(START_WAIT_S - 1)
    assert world.state.history == ()
    world.pass_time(2)
    assert world.slots == [0, 1]
    small = World(bounds(3, 2), agents=1)
    small.pass_time(2 * START_WAIT_S)
    assert small.state.history == ()
    assert small.job().phase is JobPhase.WAITING


def test_a_spare_that_is_ready_first_leaves_the_lower_slots_a_moment() -> None:
    world = World(bounds(2, 1, spares=1))
    for slot in (1, 2, 1, 2):
        world.deliver(slot)
    assert world.state.history == ()
    world.settle()
    assert world.slots == [0, 1]
    late = World(bounds(2, 1, spares=1))
    late.cut.add(0)
    late.pass_time(LOWER_WAIT_S + 1)
    assert late.slots == [1, 2], "but a job does not wait for a slot that does not come"


def test_incarnation_zero_begins_nothing_until_the_operator_raises_it() -> None:
    world = World(bounds(2, incarnation=0))
    world.settle()
    assert world.state.history == ()
    world.change(incarnation=4)
    world.settle()
    assert world.state.current == GenerationId(4, 1)


def test_a_storage_that_is_ahead_waits_for_the_operator_to_raise_the_incarnation() -> None:
    world = World(bounds(2))
    for agent in world.agents.values():
        agent.storage = StorageFinding(GenerationId(3, 7), "predecessor")
    world.settle()
    assert world.state.history == ()
    assert world.job().storage == StorageFinding(GenerationId(3, 7), "predecessor")
    world.change(incarnation=4)
    world.settle()
    assert world.state.current == GenerationId(4, 1)
    assert world.state.generation is not None
    assert world.state.generation.parent == GenerationId(3, 7), "the predecessor is continued"


def test_the_incarnation_is_raised_only_before_the_first_generation() -> None:
    world = running_world()
    with pytest.raises(Refused, match="no longer be raised"):
        world.change(incarnation=2)


@pytest.mark.parametrize(
    "change",
    [
        {"min_replicas": 0},
        {"min_replicas": 3},
        {"processes": 0},
        {"slots": {"x": "pod-0"}},
    ],
)
def test_malformed_bounds_are_refused(change: dict[str, object]) -> None:
    with pytest.raises(Refused) as error:
        running_world().change(**change)
    assert error.value.status == 400


def test_older_bounds_are_refused_and_the_same_ones_are_not() -> None:
    world = running_world()
    held = world.state.bounds
    assert held is not None
    world.set_bounds(held)
    with pytest.raises(Refused, match="not above"):
        world.set_bounds(replace(held, replicas=5))


def test_a_pod_that_is_not_of_its_slot_is_refused() -> None:
    world = World(bounds(2))
    world.agents[1].pod_uid = "another"
    assert world.refused(1) == 403
    world.agents[1].slot, world.agents[1].pod_uid = 7, "pod-7"
    assert world.refused(1) == 403


def test_another_job_or_protocol_is_refused() -> None:
    world = World(bounds(2))
    report = world.agents[0].report()
    for wrong, status in ((replace(report, job_uid="x"), 403), (replace(report, protocol=2), 409)):
        with pytest.raises(Refused) as error:
            on_report(world.state, wrong, world.now)
        assert error.value.status == status


def test_an_older_agent_number_is_refused() -> None:
    world = running_world()
    world.come_back(1)
    world.settle()
    world.agents[1].number = 1
    assert world.refused(1) == 409


def test_a_late_report_of_the_same_agent_changes_nothing() -> None:
    world = World(bounds(2))
    world.deliver(0)
    late = world.agents[0].report()
    world.settle()
    world.step_all(5)
    after = on_report(world.state, late, world.now)
    assert after is world.state


def test_a_late_report_of_an_older_generation_changes_nothing_whatever_order_it_names() -> None:
    world = running_world()
    world.agents[1].rank(0, exit=-9)
    late = replace(world.agents[1].report(), order_version=1 << 50)
    world.settle()
    world.step_all(11)
    assert on_report(world.state, late, world.now) is world.state
    assert world.causes == ["Start", "RankExit"]


def test_who_is_in_a_generation_need_not_be_said_to_somebody_who_knows() -> None:
    world = running_world()
    report = world.agents[1].report()
    assert report.generation is not None
    brief = replace(report, generation=report.generation.brief(world.state.generation))
    assert brief.generation is not None
    assert (brief.generation.id, brief.generation.members) == (report.generation.id, ())
    assert completed(world.state, brief) == report
    assert report.generation.brief(None) == report.generation
    unknown = replace(brief.generation, id=GenerationId(1, 9))
    with pytest.raises(Refused, match=r"generation 1\.9 is not known here") as error:
        completed(world.state, replace(brief, generation=unknown))
    assert error.value.status == UNKNOWN_GENERATION


def test_an_agent_that_is_behind_may_be_brief_about_the_generation_that_it_told_of() -> None:
    world = running_world()
    behind = world.agents[1].report()
    world.agents[0].rank(0, exit=-9)
    world.deliver(0)
    world.now += 5
    world.tick()
    world.deliver(0)
    assert world.state.generation != behind.generation
    assert behind.generation is not None
    brief = replace(behind, generation=behind.generation.brief(behind.generation))
    assert completed(world.state, brief) == behind


def test_a_report_that_is_only_heard_decides_nothing_until_the_next_tick() -> None:
    world = running_world()
    world.agents[1].rank(0, exit=-9)
    state = engine.heard(world.state, world.agents[1].report(), world.now)
    assert (state.generation, state.stage) == (world.state.generation, world.state.stage)
    assert state.revision > world.state.revision, "somebody has to decide"
    assert engine.on_tick(state, world.now).current > state.current


def test_many_agents_are_asked_for_fewer_heartbeats_and_called_silent_later() -> None:
    world = World(bounds(1250, 1250))
    for slot in world.agents:
        world.state = engine.heard(world.state, world.agents[slot].report(), world.now)
    order = order_for(world.state, 1249)
    assert order.heartbeat_s == pytest.approx(3.75)
    last = world.state.agents[1249]
    assert not last.silent(world.now + 11.2)
    assert last.silent(world.now + 11.3)
    few = running_world()
    assert order_for(few.state, 0).heartbeat_s == HEARTBEAT_S
    assert few.state.agents[0].silent(few.now + 3.1)


def test_a_higher_incarnation_heard_from_an_agent_stands_this_coordinator_down() -> None:
    world = running_world()
    world.agents[0].incarnation = 2
    with pytest.raises(StandDown):
        world.deliver(0)


def test_an_agent_that_returns_with_an_older_generation_becomes_a_spare() -> None:
    world = running_world(bounds(2, 1, spares=1))
    world.cut.add(0)
    world.pass_time(5)
    assert world.slots == [2, 1]
    world.cut.clear()
    assert world.phase(0) is AgentPhase.RUNNING
    world.settle()
    assert world.phase(0) is AgentPhase.IDLE
    assert world.agents[0].ranks == ()
    assert world.state.current == GenerationId(1, 2), "its return begins nothing"


def test_all_ranks_at_zero_is_complete_and_agents_leave_once_the_operator_knows() -> None:
    world = running_world()
    world.agents[0].all_ranks(exit=0)
    world.settle()
    assert world.job().phase is JobPhase.RUNNING, "some are done, others run: wait"
    world.agents[1].all_ranks(exit=0)
    world.settle()
    assert world.job().phase is JobPhase.COMPLETE
    assert all(agent.alive for agent in world.agents.values())
    world.pass_time(5)
    world.change(finish=True)
    world.settle()
    assert not any(agent.alive for agent in world.agents.values())
    assert world.causes == ["Start"]


def test_finish_ends_nothing_that_still_runs() -> None:
    world = running_world()
    world.change(finish=True)
    world.settle()
    assert world.job().phase is JobPhase.RUNNING


def test_progress_and_loss_are_told() -> None:
    world = running_world(step=7)
    world.agents[0].rank(0, loss=2.5)
    world.deliver(0)
    assert (world.job().step, world.job().loss) == (7, 2.5)
    assert world.job().phase is JobPhase.RUNNING


def test_events_of_agents_are_told_once() -> None:
    world = World(bounds(2))
    world.agents[1].events = ("ZygoteUnfit: two threads",)
    world.settle()
    world.pass_time(3)
    assert world.job().events == ("slot 1: ZygoteUnfit: two threads",)


def test_history_is_answered_above_a_generation() -> None:
    world = running_world()
    for step in (11, 12):
        world.agents[1].rank(0, exit=1)
        world.settle()
        world.step_all(step)
    told = [entry.generation.id for entry in job_state(world.state, world.now, GenerationId(1, 1)).history]
    assert [str(generation) for generation in told] == ["1.2", "1.3"]


def test_orders_grow_and_an_unchanged_order_keeps_its_version() -> None:
    world = running_world()
    version = world.state.version
    world.pass_time(10, stepping=True)
    assert world.state.version == version
    world.agents[0].rank(0, exit=3)
    world.settle()
    assert world.state.version > version


@pytest.mark.parametrize(
    ("before", "returning", "new", "size", "chosen"),
    [
        ((), (), (3, 0, 1), 2, (0, 1)),
        ((0, 1), (0, 1), (2,), 2, (0, 1)),
        ((0, 1), (1,), (2,), 2, (2, 1)),
        ((0, 1), (1,), (), 2, (1,)),
        ((1,), (1,), (0,), 2, (1, 0)),
        ((2, 1), (2, 1), (0,), 2, (2, 1)),
        ((0, 1, 2), (0, 1, 2), (), 2, (0, 1)),
        ((0, 1, 2), (1, 2), (5,), 2, (1, 2)),
        ((0, 1, 2), (1,), (5,), 3, (5, 1)),
        ((0, 1), (), (4, 5, 6), 2, (4, 5)),
    ],
)
def test_a_spare_takes_the_place_of_the_lost_and_the_others_keep_theirs(
    before: tuple[int, ...],
    returning: tuple[int, ...],
    new: tuple[int, ...],
    size: int,
    chosen: tuple[int, ...],
) -> None:
    assert choose(before, returning, new, size) == chosen


def test_the_phase_of_a_rank_is_no_news() -> None:
    world = running_world()
    revision = world.state.revision
    world.agents[0].all_ranks(phase=RankPhase.DATA, step=11)
    world.deliver(0)
    assert world.state.revision == revision
    assert world.job().step == 11
    assert world.state.history[-1].generation.cause is Cause.START
