"""A coordinator that may be the one that is cut off begins nothing: a member or the operator has to be heard."""

from __future__ import annotations

from fakes.runtime import bounds, on_report, running_world


def test_cut_off_beside_a_spare_it_waits_and_harms_nobody() -> None:
    world = running_world(bounds(2, 1, spares=1))
    before = world.state.current
    world.cut |= {0, 1}
    world.operator_away = True
    world.pass_time(60)
    assert world.state.current == before, "the spare must not train beside the members on the other side"
    world.cut.clear()
    world.step_all(50)
    world.pass_time(2, stepping=True)
    assert world.state.current == before, "healed: they were never ended"


def test_with_the_operator_heard_the_spare_takes_over_from_members_that_are_all_gone() -> None:
    world = running_world(bounds(2, 1, spares=1))
    world.cut |= {0, 1}
    world.pass_time(35)  # nobody's step clock can be heard
    assert world.slots == [2]
    assert world.causes[-1] == "AgentSilent"


def test_a_member_that_is_heard_is_witness_enough_without_the_operator() -> None:
    world = running_world(bounds(2, 1, spares=1))
    world.cut.add(0)
    world.operator_away = True
    world.pass_time(10)
    assert world.slots == [2, 1]


def test_an_operator_last_heard_when_the_members_were_is_no_witness() -> None:
    world = running_world(bounds(2, 1, spares=1))
    world.pass_time(1, stepping=True)
    world.cut |= {0, 1}
    world.tick()
    world.operator_away = True
    before = world.state.current
    world.pass_time(60)
    assert world.state.current == before


def test_one_late_word_of_a_healed_link_is_no_witness() -> None:
    world = running_world(bounds(2, 1, spares=1))
    world.operator_away = True
    on_its_way = world.agents[0].report()
    world.cut |= {0, 1}
    world.pass_time(20)
    before = world.state.current
    world.state = on_report(world.state, on_its_way, world.now)
    for _ in range(100):
        world.now += 0.1
        world.tick()
    assert world.state.current == before, "the members report to the next coordinator by now"
