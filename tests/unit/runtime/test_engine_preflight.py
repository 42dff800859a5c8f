"""A node that its preflight found unfit takes no part, and nobody waits for it."""

from __future__ import annotations

from fakes.runtime import World, bounds, running_world
from stormjib_runtime.members import START_WAIT_S
from stormjib_runtime.orders import order_for
from stormjib_runtime.wire import AgentPhase

WHY = "memory 0.02 GB/s is slow: any node does 0.1"


def unfit(world: World, slot: int) -> None:
    """As such an agent reports: its zygote is there, and it stays STARTING."""
    world.agents[slot].phase, world.agents[slot].preflight = AgentPhase.STARTING, WHY


def test_a_spare_takes_the_place_of_an_unfit_node_at_the_start() -> None:
    world = World(bounds(2, minimum=2, spares=1))
    unfit(world, 0)
    world.pass_time(START_WAIT_S)
    assert world.slots == [1, 2]


def test_without_enough_fit_nodes_the_job_waits() -> None:
    world = World(bounds(2, minimum=2))
    unfit(world, 1)
    world.pass_time(2 * START_WAIT_S)
    assert world.state.generation is None


def test_an_agent_that_calls_itself_idle_and_unfit_is_not_used() -> None:
    world = World(bounds(2, minimum=1))
    world.agents[1].preflight = WHY
    world.pass_time(START_WAIT_S + 5)
    assert world.slots == [0]


def test_a_lost_member_that_comes_back_unfit_is_not_waited_for() -> None:
    world = running_world(bounds(2, minimum=1))
    world.kill(1)
    world.pass_time(1)
    world.agents[1].restart()
    unfit(world, 1)
    world.deliver(1)
    world.settle()
    assert world.slots == [0]


def test_a_lost_member_whose_preflight_is_under_way_is_waited_for() -> None:
    world = running_world(bounds(2, minimum=1))
    world.kill(1)
    world.pass_time(1)
    world.agents[1].restart()
    world.agents[1].phase = AgentPhase.STARTING
    world.deliver(1)
    world.settle()
    before = world.state.generation
    assert before is not None
    world.pass_time(3)
    assert world.state.generation == before
    world.agents[1].phase = AgentPhase.IDLE
    world.deliver(1)
    world.settle()
    assert world.slots == [0, 1]
    assert world.state.generation != before


def measuring(slots: int) -> World:
    """Slots 0 and 1 train, the others are spares; all have a measuring server."""
    world = running_world(bounds(2, minimum=2, spares=slots - 2))
    for slot, agent in world.agents.items():
        agent.measures = f"10.0.0.{slot}:9"
    world.settle()
    return world


def peers(world: World, slot: int) -> tuple[str, ...]:
    """What an agent that starts in this slot is told."""
    world.agents[slot].restart()
    world.agents[slot].phase = AgentPhase.STARTING
    world.deliver(slot)
    return order_for(world.state, slot).peers


def test_a_starting_agent_is_told_two_peers_that_train() -> None:
    world = measuring(5)
    assert peers(world, 3) == ("10.0.0.0:9", "10.0.0.1:9")
    assert order_for(world.state, 2).peers == ()  # it is ready: nothing to check


def test_peers_that_are_lost_unfit_or_have_no_server_are_not_told() -> None:
    world = measuring(5)
    world.agents[0].measures = ""
    world.agents[2].preflight = WHY
    world.kill(4)
    world.settle()
    assert peers(world, 3) == ("10.0.0.1:9",)


def test_before_the_first_generation_the_next_slots_are_told() -> None:
    world = World(bounds(4, minimum=4))
    for slot, agent in world.agents.items():
        agent.measures, agent.phase = f"10.0.0.{slot}:9", AgentPhase.STARTING
    world.settle()
    assert order_for(world.state, 1).peers == ("10.0.0.2:9", "10.0.0.3:9")
    assert order_for(world.state, 3).peers == ("10.0.0.0:9", "10.0.0.1:9")


def test_an_address_that_is_none_is_not_passed_on() -> None:
    world = measuring(3)
    world.agents[0].measures = "9" * 65
    world.settle()
    assert peers(world, 2) == ("10.0.0.1:9",)
