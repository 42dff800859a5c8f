"""Norms, votes, slices and spikes: whoever is wrong is named, and nobody else ever."""

from __future__ import annotations

import math
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from stormjib_health.integrity.norms import suspects
from stormjib_health.integrity.slices import SLICES, parts
from stormjib_health.integrity.spikes import LEAST, Window
from stormjib_health.integrity.votes import NOBODY, dissents, replica_groups, replicas_of
from stormjib_health.wire import Doubt

# --- norms ----------------------------------------------------------------------------------------------------------


def healthy(draw: random.Random, shares: list[int], spread: float) -> list[float]:
    """Norms of gradients of noise: they grow with the root of the share, and vary by `spread` (a log-normal sigma)."""
    return [math.sqrt(share) * math.exp(draw.gauss(0.0, spread)) for share in shares]


@given(seed=st.integers(0, 2**32), world=st.integers(2, 64), least=st.integers(1, 50))
def test_healthy_noise_is_never_suspected(seed: int, world: int, least: int) -> None:
    draw = random.Random(seed)
    shares = [least + draw.randrange(2) for _ in range(world)]
    assert suspects(healthy(draw, shares, spread=0.15), shares) == ()


@given(
    seed=st.integers(0, 2**32),
    world=st.integers(3, 64),
    factor=st.sampled_from([1e-30, 1e-3, 0.1, 10, 1e3, 1e30]),
)
def test_one_rank_that_is_far_off_is_named(seed: int, world: int, factor: float) -> None:
    draw = random.Random(seed)
    norms = healthy(draw, [4] * world, spread=0.02)
    bad = draw.randrange(world)
    norms[bad] *= factor
    (found,) = suspects(norms, [4] * world)
    assert (found.rank, found.kind) == (bad, Doubt.NORM)
    assert found.value == pytest.approx(norms[bad] / 4)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("world", [1, 2, 5])
def test_a_norm_that_is_no_number_names_its_rank_among_any_number(world: int, bad: float) -> None:
    norms = [1.0] * world
    norms[world - 1] = bad
    (found,) = suspects(norms, [3] * world)
    assert (found.rank, found.kind) == (world - 1, Doubt.NOT_FINITE)


def test_of_two_nobody_can_say_which_one_is_wrong() -> None:
    assert suspects([1.0, 1e6], [4, 4]) == ()


def test_a_rank_without_sequences_is_not_compared_but_must_be_finite() -> None:
    assert suspects([1.0, 1.1, 0.9, 0.0], [1, 1, 1, 0]) == ()
    assert [s.rank for s in suspects([1.0, 1.1, 0.9, math.nan], [1, 1, 1, 0])] == [3]


def test_a_gradient_of_zeros_is_far_from_others_unless_all_are() -> None:
    assert [s.rank for s in suspects([1.0, 0.0, 1.1, 0.9], [1] * 4)] == [1]
    assert suspects([0.0] * 4, [1] * 4) == ()


def test_ranks_that_differ_by_their_data_excuse_each_other() -> None:
    assert suspects([1.0, 3.0, 9.0, 27.0, 150.0], [1] * 5) == ()


# --- votes ----------------------------------------------------------------------------------------------------------


@given(data=st.data(), replicas=st.integers(3, 8), shards=st.integers(1, 4))
def test_any_minority_is_named_and_nobody_else(data: st.DataObject, replicas: int, shards: int) -> None:
    groups = replica_groups(replicas * shards, replicas)
    digests = [0] * (replicas * shards)
    wanted: dict[int, int] = {}
    for group in groups:
        for rank in data.draw(st.sets(st.sampled_from(group), max_size=(replicas - 1) // 2)):
            digests[rank] = data.draw(st.integers(1, 3))
            wanted[rank] = 0
        agreed = sum(digests[rank] == 0 for rank in group)
        wanted |= {rank: agreed for rank in group if digests[rank]}
    found = dissents(digests, groups)
    assert {d.accused: d.votes for d in found} == wanted
    assert len(found) == len(wanted)


@pytest.mark.parametrize("digests", [(1, 2), (1, 1, 2, 2), (1, 2, 3), (1, 1, 2, 3)])
def test_a_tie_is_seen_and_names_nobody(digests: tuple[int, ...]) -> None:
    (found,) = dissents(digests, [range(len(digests))])
    assert found.accused == NOBODY


@given(world=st.integers(1, 60), wanted=st.integers(1, 60))
def test_groups_cut_a_world_into_equal_parts(world: int, wanted: int) -> None:
    replicas = replicas_of(world, wanted)
    assert 1 <= replicas <= wanted
    groups = replica_groups(world, replicas)
    assert sorted(rank for group in groups for rank in group) == list(range(world))
    assert {len(group) for group in groups} == {replicas}


# --- slices ---------------------------------------------------------------------------------------------------------


@given(words=st.lists(st.integers(0, 1000), max_size=30))
def test_sixteen_slices_hold_every_word_once_and_are_equal(words: list[int]) -> None:
    seen: set[tuple[int, int]] = set()
    sizes = []
    for index in range(SLICES):
        found = parts(words, index)
        here = {(p.tensor, word) for p in found for word in range(p.begin, p.end)}
        assert not here & seen
        assert len(here) == sum(p.end - p.begin for p in found)
        seen |= here
        sizes.append(len(here))
    assert seen == {(tensor, word) for tensor, length in enumerate(words) for word in range(length)}
    assert max(sizes) - min(sizes) <= 1


# --- spikes ---------------------------------------------------------------------------------------------------------


def learning(steps: int, seed: int, noise: float) -> list[tuple[float, float]]:
    """Loss and norm of a run that learns."""
    draw = random.Random(seed)
    return [
        (1.0 + 4.5 * math.exp(-step / 150) + draw.gauss(0, noise), 0.5 * math.exp(draw.gauss(0, 0.3)))
        for step in range(steps)
    ]


@given(seed=st.integers(0, 2**32), noise=st.sampled_from([0.0, 0.01, 0.05]))
def test_learning_is_no_spike(seed: int, noise: float) -> None:
    window = Window()
    for loss, norm in learning(400, seed, noise):
        assert window.spike(loss, norm) is None
        window.add(loss, norm)


def filled(seed: int = 3) -> Window:
    window = Window()
    for loss, norm in learning(1500, seed, 0.02):
        window.add(loss, norm)
    return window


def test_a_jump_of_the_loss_or_of_the_norm_is_a_spike() -> None:
    window = filled()
    assert window.spike(1.1, 0.5) is None
    jump = window.spike(1.6, 0.5)
    assert jump is not None
    assert (jump.value, round(jump.typical, 1)) == (1.6, 1.0)
    jump = window.spike(1.1, 7.0)
    assert jump is not None
    assert (jump.value, round(jump.typical, 1)) == (7.0, 0.5)
    assert window.spike(0.3, 0.01) is None, "better than ever is no spike"


def test_a_short_window_and_numbers_that_are_none_say_nothing() -> None:
    window = Window()
    for loss, norm in [*learning(LEAST - 1, 5, 0.02), (math.nan, 1.0), (1.0, math.inf)]:
        window.add(loss, norm)
    assert window.spike(1e9, 1e9) is None
