"""Trials are drawn before anything runs: repeatable, in their shares, and never with the seeds that thresholds were fixed on."""

from __future__ import annotations

import pytest

from bench.lab import draws
from stormjib_fault.catalogue import FAULTS, ROWS, make, of_row
from stormjib_fault.words import Draw, FaultError, Refused
from stormjib_fault.world import Place, World
from stormjib_health.verdict import Scope, Syndrome


def world(ranks: int) -> World:
    places = tuple(Place(r, 100 + r, r, f"n{r}", f"10.77.0.{10 + r}", f"node{r}") for r in range(ranks))
    return World(places)


def test_the_same_seed_draws_the_same_and_another_one_does_not() -> None:
    assert draws.draw("F6", 1003) == draws.draw("F6", 1003)
    assert len({draws.draw("F6", seed).draw for seed in range(40)}) == 40


def test_a_hundred_trials_of_each_syndrome_and_twenty_of_each_other_row() -> None:
    trials = draws.plan(ROWS, 100)
    assert len({one.id for one in trials}) == len(trials)
    for rows in draws.BODY.values():
        assert sum(one.row in rows for one in trials) >= 100
    for row in set(ROWS) - {row for rows in draws.BODY.values() for row in rows}:
        assert sum(one.row == row for one in trials) == 20


def test_every_fault_of_a_row_is_tried_in_every_size_that_it_allows() -> None:
    trials = draws.plan(ROWS, 100)
    for fault in FAULTS.values():
        mine = [one for one in trials if one.draw.fault == fault.name]
        assert mine, fault.name
        assert min(one.ranks for one in mine) >= fault.least_ranks
    for rows in draws.BODY.values():
        assert {one.ranks for one in trials if one.row in rows} == set(draws.WORLDS)


def test_seeds_of_tuning_and_of_measuring_are_disjoint() -> None:
    tuned = {one.id for one in draws.plan(ROWS, 500, draws.TUNE)}
    assert not tuned & {one.id for one in draws.plan(ROWS, 500, draws.MEASURE)}


def test_trials_of_one_laboratory_stand_together() -> None:
    kinds = [(draws.skewed(one), one.ranks) for one in draws.plan(ROWS, 50)]
    assert kinds == sorted(kinds)


@pytest.mark.parametrize("fault", FAULTS.values(), ids=list(FAULTS))
def test_what_is_drawn_is_in_range_and_on_a_link_that_is_used(fault: type) -> None:
    for ranks in (2, 4, 8):
        for seed in range(50):
            draw = FAULTS[fault.name].drawn(seed, ranks)  # type: ignore[attr-defined]
            low, high = FAULTS[draw.fault].severities
            assert 0 <= draw.victim < ranks
            assert draw.peer in ((draw.victim + 1) % ranks, (draw.victim - 1) % ranks)
            assert low * 0.999 <= draw.severity <= high * 1.001


@pytest.mark.parametrize("name", FAULTS)
def test_truths_are_in_the_words_of_health(name: str) -> None:
    truth = make(world(4), Draw(name, victim=2, peer=3)).truth()
    assert truth.syndrome in {"", *Syndrome}
    assert truth.scope in set(Scope)
    assert {answer.scope for answer in truth.answers} <= set(Scope)
    assert truth.harmless or truth.culprits


def test_between_two_nodes_a_node_and_its_link_are_one_and_of_two_desynchronised_ranks_none_is_wrong() -> (
    None
):
    two, four = (
        make(world(2), Draw("link-down", 0, 1)).truth(),
        make(world(4), Draw("link-down", 0, 1)).truth(),
    )
    assert [(a.scope, a.who) for a in two.answers] == [("Node", (0,)), ("Link", (0, 1))]
    assert [(a.scope, a.who) for a in four.answers] == [("Node", (0,))]
    desync = make(world(2), Draw("skip", 1)).truth()
    assert {(a.scope, a.who) for a in desync.answers} == {("Rank", (0,)), ("Rank", (1,)), ("Job", ())}
    assert desync.software
    assert desync.slots == ()


def test_unknown_names_are_refused_with_those_there_are() -> None:
    with pytest.raises(FaultError, match="no row 'F99'; rows: F1, F2"):
        of_row("F99")
    with pytest.raises(FaultError, match="no fault 'nonsense'; faults: kill"):
        make(world(2), Draw("nonsense", 0))
    with pytest.raises(Refused, match="rank 7 does not run here; ranks here: 0, 1"):
        make(world(2), Draw("kill", 7)).arm()
