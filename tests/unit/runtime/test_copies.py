"""Who keeps copies of whose staged steps."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from fakes.runtime import FakeAgent, World, bounds
from stormjib_runtime.copies import Copies, copying_token, keepers
from stormjib_runtime.members import ADDRESS_CHARS
from stormjib_runtime.wire import Cause, Generation, GenerationId, Member


def generation(*nodes: str, silent: int = -1) -> Generation:
    """Members in slots 10, 11, ... on these nodes; one of them may take no copies."""
    members = tuple(
        Member(10 + i, 1, f"pod-{i}", "10.0.0.1", 8, "" if i == silent else f"10.0.0.{i}:1", node)
        for i, node in enumerate(nodes)
    )
    return Generation(GenerationId(1, 1), None, members, Cause.START)


def pairs(one: Generation) -> dict[int, int]:
    return {slot: member.slot for slot, member in keepers(one).items()}


def test_each_keeps_the_copies_of_the_one_before() -> None:
    assert pairs(generation("a", "b", "c")) == {10: 11, 11: 12, 12: 10}


def test_who_shares_a_node_is_passed_over_and_still_each_keeps_one() -> None:
    assert pairs(generation("a", "a", "b", "b")) == {10: 12, 11: 13, 12: 10, 13: 11}
    assert pairs(generation("a", "a", "a", "b", "b", "b")) == {10: 13, 11: 14, 12: 15, 13: 10, 14: 11, 15: 12}


def test_where_not_all_can_be_apart_the_most_are() -> None:
    found = pairs(generation("a", "a", "b"))
    assert sorted(found.values()) == [10, 11, 12]
    assert found[12] != 12


@pytest.mark.parametrize("nodes", [("a", "a"), ("", "")])
def test_on_one_node_or_on_unknown_ones_it_is_the_next(nodes: tuple[str, ...]) -> None:
    assert pairs(generation(*nodes)) == {10: 11, 11: 10}


def test_nobody_keeps_copies_of_itself() -> None:
    for count in range(1, 9):
        found = pairs(generation(*("same" for _ in range(count))))
        assert all(slot != keeper for slot, keeper in found.items())
        assert len(found) == (count if count > 1 else 0)


def test_who_takes_no_copies_is_left_out() -> None:
    assert pairs(generation("a", "b", "c", silent=1)) == {10: 12, 12: 10}
    assert pairs(generation("a", "b", silent=0)) == {}


def test_a_thousand_members_take_no_time() -> None:
    nodes = [f"node-{i // 8}" for i in range(1000)]
    found = keepers(generation(*nodes))
    assert all(found[10 + i].node != node for i, node in enumerate(nodes))


def test_a_generation_tells_where_its_members_take_copies() -> None:
    """What an agent has reported, unless it is too long to be an address."""
    world = World(bounds(2), agents=0)
    for slot, copies in enumerate(("10.0.0.7:4711", "x" * (ADDRESS_CHARS + 1))):
        world.agents[slot] = FakeAgent(slot, copies=copies, node="n")
    world.settle()
    assert [(member.copies, member.node) for member in world.state.members] == [
        ("10.0.0.7:4711", "n"),
        ("", ""),
    ]


def test_the_token_of_the_agents_is_not_that_of_the_copies() -> None:
    assert copying_token("secret") != copying_token("another")
    assert "secret" not in copying_token("secret")


@pytest.mark.parametrize("address", ["host:80", "1.2.3.4", "1.2.3.4:0", "1.2.3.4:99999", "[fe80::1%eth0]:1"])
def test_a_keeper_is_an_ip_address_and_a_port_or_nothing_is_given(address: str) -> None:
    """The address is what a pod of the job has said."""
    events: list[str] = []
    settings: Any = SimpleNamespace(slot=10, processes=8)
    none: Any = None
    copies = Copies(none, settings, {}, none, events.append)
    members = (
        Member(10, 1, "pod-0", "10.0.0.1", 8, "10.0.0.1:1", "a"),
        Member(11, 1, "pod-1", "10.0.0.2", 8, address, "b"),
    )
    copies.begin(Generation(GenerationId(1, 1), None, members, Cause.START))
    assert (copies._wanted["host"], copies._wanted["port"]) == ("", 0)
    assert [event.partition(":")[0] for event in events] == ["CopiesFailed"]
    assert "slot 11 keeps no copies of slot 10" in events[0]
    copies.begin(generation("a", "b"))
    assert (copies._wanted["host"], copies._wanted["port"]) == ("10.0.0.1", 1)
    assert len(events) == 1
