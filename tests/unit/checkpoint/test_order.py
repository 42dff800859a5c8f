"""The order is a permutation, a pure function of seed and step, over any number of sources, and says so in its cursor."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from stormjib_checkpoint.errors import FormatError
from stormjib_checkpoint.order import MOST_WEIGHT, Micro, Order, Permutation, Source

SEEDS = st.integers(0, 2**63 - 1)


def one(n: int, batch: int, seed: int) -> Order:
    return Order((Source("text", n),), Micro(1, batch), seed)


@st.composite
def orders(draw: st.DrawFn) -> Order:
    """Up to four sources of a few samples, with weights of all kinds."""
    sizes = draw(st.lists(st.tuples(st.integers(1, 40), st.integers(1, 12)), min_size=1, max_size=4))
    sources = tuple(Source(f"s{i}", n, weight) for i, (n, weight) in enumerate(sizes))
    return Order(sources, Micro(draw(st.integers(1, 4)), draw(st.integers(1, 9))), draw(SEEDS))


@given(n=st.integers(1, 3000), seed=SEEDS, epoch=st.integers(0, 50))
def test_permutation_hits_every_sample_once(n: int, seed: int, epoch: int) -> None:
    permutation = Permutation.of(n, seed, epoch)
    assert sorted(permutation(i) for i in range(n)) == list(range(n))


@given(n=st.integers(2, 10**12), seed=SEEDS, data=st.data())
def test_permutation_of_a_huge_set_stays_inside_and_apart(n: int, seed: int, data: st.DataObject) -> None:
    a, b = data.draw(st.integers(0, n - 1)), data.draw(st.integers(0, n - 1))
    permutation = Permutation.of(n, seed, 0)
    assert 0 <= permutation(a) < n
    assert (permutation(a) == permutation(b)) == (a == b)


def test_the_order_never_changes() -> None:
    """A checkpoint holds a position, not the samples: another order would train some twice and others never."""
    assert one(163593, 16, 0).ids(1)[:4] == [151452, 161249, 48067, 77423]
    assert one(1000, 4, 7).ids(251) == [1864, 1356, 1023, 1926]
    mixed = Order((Source("code", 1000, 7), Source("prose", 50, 3)), Micro(2, 3), 7)
    assert [mixed.place(i) for i in mixed.ids(99)] == [
        (1, 35),
        (0, 877),
        (0, 589),
        (0, 581),
        (0, 208),
        (0, 917),
    ]


def test_seed_and_epoch_change_the_order() -> None:
    orders = [
        [Permutation.of(500, seed, epoch)(i) for i in range(500)] for seed, epoch in ((0, 0), (1, 0), (0, 1))
    ]
    assert len({tuple(order) for order in orders}) == 3


@given(n=st.integers(1, 200), batch=st.integers(1, 40), seed=SEEDS)
def test_a_run_takes_every_sample_once_per_epoch_and_no_id_twice(n: int, batch: int, seed: int) -> None:
    order = one(n, batch, seed)
    steps = 2 * n // batch + 1
    fed = [i for step in range(1, steps + 1) for i in order.ids(step)]
    assert len(set(fed)) == len(fed) == steps * batch
    assert sorted(i % n for i in fed[:n]) == list(range(n))
    assert order.cursor(steps)["next"] == len(fed)


@given(order=orders(), steps=st.integers(1, 30))
def test_each_source_is_drawn_without_a_gap_and_as_often_as_its_weight_says(order: Order, steps: int) -> None:
    fed = [i for step in range(1, steps + 1) for i in order.ids(step)]
    assert len(set(fed)) == len(fed)
    taken = order.taken(len(fed))
    assert sum(taken) == len(fed)
    for which, source in enumerate(order.sources):
        indices = [index for place, index in map(order.place, fed) if place == which]
        assert len(indices) == taken[which]
        for begin in range(0, taken[which], source.n):
            epoch = indices[begin : begin + source.n]
            assert len(set(epoch)) == len(epoch), "each epoch takes each sample once"
        share = len(fed) * order.weights[which] / sum(order.weights)
        assert abs(taken[which] - share) < sum(order.weights)


@given(order=orders(), step=st.integers(1, 10**9), world=st.integers(1, 9))
def test_micro_batches_are_the_same_whoever_takes_them(order: Order, step: int, world: int) -> None:
    whole, size = order.ids(step), order.lmb.size
    for rank in range(world):
        numbers = range(rank, order.lmb.per_step, world)
        assert order.ids(step, numbers) == [i for n in numbers for i in whole[n * size : (n + 1) * size]]


def test_two_sources_of_one_size_are_not_read_in_one_order() -> None:
    order = Order((Source("a", 50), Source("b", 50)), Micro(1, 100), 0)
    places = [order.place(i) for i in order.ids(1)]
    assert [i for k, i in places if k == 0] != [i for k, i in places if k == 1]


@given(order=orders(), step=st.integers(0, 10**9))
def test_a_cursor_says_which_order_it_is_of(order: Order, step: int) -> None:
    stored = json.loads(json.dumps(order.cursor(step)))
    assert Order.of_cursor(stored, step) == order


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"v": 1}, "version 1"),
        ({"perm": "feistel-4"}, "feistel-4"),
        ({"next": 13}, "its own order says"),
        ({"seed": -1}, "seed"),
        ({"sources": []}, "wanted one at least"),
        ({"sources": [{"name": "a", "n": 0, "weight": 1, "taken": 0}]}, "n = 0"),
        ({"sources": [{"name": "a", "n": 5, "weight": 1, "taken": 11}]}, "its own order says"),
        ({"lmb": {"size": 0, "per_step": 4}}, "size = 0"),
        ({"lmb": {"size": 2**20, "per_step": 2**20}}, "more than 16777216 samples in a step"),
        ({"lmb": {"size": 4}}, "lacks per_step"),
    ],
)
def test_a_cursor_that_is_not_of_this_order_is_refused(change: dict[str, object], said: str) -> None:
    cursor = Order((Source("a", 5),), Micro(1, 4), 3).cursor(3)
    with pytest.raises(FormatError, match=said):
        Order.of_cursor(cursor | change, 3)


def test_sources_that_cannot_be_mixed_are_refused() -> None:
    with pytest.raises(FormatError, match="each name once"):
        Order((Source("a", 5), Source("a", 6)), Micro(1, 1), 0)
    with pytest.raises(FormatError, match=f"sum to more than {MOST_WEIGHT}"):
        Order((Source("a", 5, MOST_WEIGHT), Source("b", 6, 1)), Micro(1, 1), 0)
    assert Order((Source("a", 5, 7000), Source("b", 6, 3000)), Micro(1, 1), 0).weights == (7, 3)
