"""The order is a permutation, a pure function of seed and step, and shares partition a batch on any world size."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from stormjib_trainer.order import Order, Permutation, share

SEEDS = st.integers(0, 2**63)


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
    assert Order(163593, 16, 0).ids(1)[:4] == [151452, 161249, 48067, 77423]
    assert Order(1000, 4, 7).ids(251) == [1864, 1356, 1023, 1926]


def test_seed_and_epoch_change_the_order() -> None:
    orders = [
        [Permutation.of(500, seed, epoch)(i) for i in range(500)] for seed, epoch in ((0, 0), (1, 0), (0, 1))
    ]
    assert len({tuple(order) for order in orders}) == 3


@given(n=st.integers(1, 200), batch=st.integers(1, 40), seed=SEEDS)
def test_a_run_takes_every_sample_once_per_epoch_and_no_id_twice(n: int, batch: int, seed: int) -> None:
    order = Order(n, batch, seed)
    steps = 2 * n // batch + 1
    fed = [i for step in range(1, steps + 1) for i in order.ids(step)]
    assert len(set(fed)) == len(fed) == steps * batch
    assert sorted(i % n for i in fed[:n]) == list(range(n))
    assert order.cursor(steps)["next"] == len(fed)


@given(n=st.integers(1, 500), batch=st.integers(1, 64), world=st.integers(1, 80), step=st.integers(1, 10**6))
def test_shares_of_the_ranks_are_the_batch_in_order(n: int, batch: int, world: int, step: int) -> None:
    order = Order(n, batch, 3)
    shares = [order.ids(step, share(batch, rank, world)) for rank in range(world)]
    assert [i for part in shares for i in part] == order.ids(step)
    assert max(map(len, shares)) - min(map(len, shares)) <= 1
