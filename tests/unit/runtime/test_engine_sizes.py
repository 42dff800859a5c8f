"""Allowed sizes: a generation never has any other number of members, whoever is lost or comes back."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fakes.runtime import World, bounds, running_world
from stormjib_runtime.admit import admit_bounds
from stormjib_runtime.state import Refused
from stormjib_runtime.wire import JobPhase


def lose(world: World, *slots: int) -> None:
    world.cut.update(slots)
    world.pass_time(4)
    world.step_all(101)


def test_a_lost_node_takes_a_second_one_out_where_only_odd_sizes_are_allowed() -> None:
    world = running_world(bounds(5, 1, sizes=(1, 3, 5)))
    lose(world, 1)
    assert world.slots == [0, 2, 3], "the last one becomes a spare"
    lose(world, 0)
    assert world.slots[0] == 4, "which takes the place of the next that is lost"
    assert sorted(world.slots) == [2, 3, 4]
    lose(world, 2)
    assert len(world.slots) == 1


def test_it_grows_only_to_an_allowed_size() -> None:
    world = running_world(bounds(5, 1, sizes=(3, 5)))
    lose(world, 3, 4)
    assert world.slots == [0, 1, 2]
    world.cut.discard(4)
    world.settle()
    world.pass_time(30, stepping=True)
    assert world.causes[-1] == "AgentSilent", "four are not allowed, so there is nothing to stop for"
    world.cut.clear()
    world.settle()
    world.pass_time(30, stepping=True)
    assert sorted(world.slots) == [0, 1, 2, 3, 4]
    assert world.causes[-1] == "Grow"


def test_too_few_for_the_smallest_size_wait() -> None:
    world = running_world(bounds(4, 2, sizes=(2, 4)))
    lose(world, 2, 3)
    assert world.slots == [0, 1]
    world.kill(1)
    world.pass_time(30)
    assert world.job().phase is JobPhase.WAITING
    world.cut.discard(3)
    world.settle()
    world.pass_time(1)
    assert world.slots == [0, 3]


def test_a_size_that_is_no_more_allowed_is_left_at_once() -> None:
    world = running_world(bounds(4, 1))
    world.change(sizes=(2, 4))
    assert len(world.slots) == 4
    world.change(sizes=(3,))
    world.pass_time(5, stepping=True)
    assert len(world.slots) == 3
    assert world.causes[-1] == "Shrink"


@given(st.lists(st.integers(1, 8), max_size=8).map(tuple), st.integers(0, 12))
def test_the_largest_allowed_size_is_taken(sizes: tuple[int, ...], count: int) -> None:
    fit = bounds(8, 1, sizes=sizes).fitting(count)
    allowed = set(sizes) or set(range(1, 9))
    assert fit == max((size for size in allowed if size <= count), default=0)


def test_a_generation_has_the_degree_that_was_planned_for_its_size() -> None:
    world = running_world(bounds(4, 1, sizes=(1, 2, 4), replicate={"4": 2, "2": 1}))
    assert world.job().generation.replicate == 2  # type: ignore[union-attr]
    world.change(replicate={"4": 4, "2": 2})
    world.pass_time(5, stepping=True)
    assert world.job().generation.replicate == 2, "what runs stays as it is"  # type: ignore[union-attr]
    lose(world, 1)
    assert (len(world.slots), world.job().generation.replicate) == (2, 2)  # type: ignore[union-attr]
    lose(world, world.slots[-1])
    lose(world, world.slots[-1])
    assert len(world.slots) == 1
    assert world.job().generation.replicate == 0, "nothing was planned for one"  # type: ignore[union-attr]


def test_a_degree_below_one_is_refused() -> None:
    world = running_world(bounds(4, 2))
    with pytest.raises(Refused, match="at least 1"):
        admit_bounds(world.state, bounds(4, 2, version=99, replicate={"4": 0}))


def test_sizes_outside_the_other_bounds_are_refused() -> None:
    world = running_world(bounds(4, 2))
    for sizes in ((1, 4), (4, 5)):
        with pytest.raises(Refused, match="sizes lie between"):
            admit_bounds(world.state, bounds(4, 2, version=99, sizes=sizes))
