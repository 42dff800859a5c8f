"""The layout planner: what fits, what is best, and why the rest was not taken."""

from __future__ import annotations

import subprocess
import sys
import time
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from stormjib_checkpoint.layouts import (
    Action,
    Choice,
    Limits,
    Machine,
    Standing,
    choose,
    fitting,
    step_seconds,
    table,
    transition,
)
from stormjib_checkpoint.sizing import Layout, Model, memory_bytes

MODEL = Model(parameters=1000, layers=8, heads=8, micro_batches=24)
ROOMY = Machine(memory_bytes=10**9, peer_bytes_per_s=1e6, store_bytes_per_s=1e5)
"""So small a model that only what a test says of memory counts."""
SIZES = Limits(sizes=(5, 4, 3, 2, 1))


def why(choice: Choice, nodes: int, pp: int = 1, tp: int = 1) -> str:
    return next(
        one.reason
        for one in choice.rejected
        if one.nodes == nodes and (one.layout.pp, one.layout.tp) == (pp, tp)
    )


def test_the_most_nodes_that_are_allowed_and_alive_train() -> None:
    found = choose(MODEL, ROOMY, replace(SIZES, sizes=(5, 3, 2)), [1, 1, 1, 1])
    assert found.best is not None
    assert (found.best.nodes, found.best.layout) == (3, Layout(shard=3))
    assert why(found, 5) == "4 of them live"
    assert "steps/s" in why(found, 2)


def test_every_candidate_is_taken_or_has_a_reason() -> None:
    limits = Limits(sizes=(4, 3, 2), pp=(1, 2, 16), tp=(1, 2, 3, 4))
    found = choose(MODEL, ROOMY, limits, [4, 4, 4])
    told = {(one.nodes, one.layout.pp, one.layout.tp) for one in found.rejected}
    assert found.best is not None
    told.add((found.best.nodes, found.best.layout.pp, found.best.layout.tp))
    assert told == {(n, pp, tp) for n in (4, 3, 2) for pp in (1, 2, 16) for tp in (1, 2, 3, 4)}
    assert all(one.reason for one in found.rejected)


def test_a_tensor_group_stays_in_a_node() -> None:
    found = choose(MODEL, ROOMY, Limits((2,), tp=(8,)), [4, 4])
    assert found.best is None
    assert why(found, 2, tp=8).startswith("tensor groups of 8 do not fit into nodes of 4 ranks")


def test_heads_are_divided_unevenly_only_where_that_is_allowed() -> None:
    limits = Limits((1,), tp=(3,))
    assert why(choose(MODEL, ROOMY, limits, [3]), 1, tp=3) == "8 heads do not divide by 3"
    allowed = choose(replace(MODEL, uneven_heads=True), ROOMY, limits, [3])
    assert allowed.best is not None
    assert allowed.best.layout == Layout(tp=3)


def test_more_stages_than_layers_and_ranks_that_do_not_divide_are_refused() -> None:
    found = choose(MODEL, ROOMY, Limits((3,), pp=(2, 9)), [1, 1, 1])
    assert why(found, 3, pp=9) == "8 layers do not fill 9 stages"
    assert why(found, 3, pp=2) == "3 ranks do not divide by 2 stages of 1"


def test_what_does_not_fit_into_memory_is_no_candidate() -> None:
    tight = replace(ROOMY, memory_bytes=memory_bytes(MODEL, Layout(shard=4)))
    found = choose(MODEL, tight, SIZES, [1, 1, 1, 1])
    assert found.best is not None
    assert found.best.layout == Layout(shard=4)
    assert choose(MODEL, tight, SIZES, [1, 1, 1]).best is None
    assert why(found, 3).startswith("needs ")


def test_memory_is_weights_gradients_and_optimizer_over_the_shards_and_ten_percent() -> None:
    assert memory_bytes(MODEL, Layout()) == round(1000 * (4 + 4 + 12) * 1.1)
    half = replace(MODEL, weight_bytes=2, gradient_bytes=2, activation_bytes=100)
    assert memory_bytes(half, Layout(shard=4)) == round((1000 * 16 / 4 + 2 * 1000 / 8 * 2 + 100) * 1.1)
    # Three tensor ranks of 8 heads: the fullest has 3 of them.
    assert memory_bytes(MODEL, Layout(tp=3)) == pytest.approx(1000 * 20 * 1.1 * 3 / 8, abs=1)


def test_replicas_are_the_most_that_divide_the_data_ranks() -> None:
    for nodes, layout in {6: Layout(1, 3, 2), 5: Layout(1, 1, 5), 4: Layout(1, 2, 2)}.items():
        found = choose(MODEL, ROOMY, Limits((nodes,), replicate=3), [1] * nodes)
        assert found.best is not None
        assert found.best.layout == layout


def test_where_copies_have_no_room_there_are_fewer() -> None:
    tight = replace(ROOMY, memory_bytes=memory_bytes(MODEL, Layout(shard=3)))
    fits, rejected = fitting(MODEL, tight, Limits((12, 6, 3, 2), replicate=4), [1] * 12)
    assert [one.layout for one in fits] == [Layout(1, 4, 3), Layout(1, 2, 3), Layout(1, 1, 3)]
    assert [(one.nodes, one.layout) for one in rejected] == [(2, Layout(1, 1, 2))]
    assert "a rank, and there are" in rejected[0].reason


def test_what_fits_a_large_job_is_known_at_once() -> None:
    """The operator asks in every pass, so nothing may grow with the ranks of a size."""
    model = Model(parameters=10**12, layers=128, heads=1)
    machine = Machine(memory_bytes=80 * 10**9)
    began = time.process_time()
    fits, rejected = fitting(model, machine, Limits(tuple(range(4033, 4097)), replicate=8), [64] * 4096)
    assert time.process_time() - began < 0.5
    assert (len(fits), len(rejected)) == (64, 0)


def test_micro_batches_that_do_not_divide_cost_a_round() -> None:
    """24 on 5 ranks take as many rounds as on 24 / 5 rounded up, so a sixth rank would be worth a round."""
    assert step_seconds(MODEL, ROOMY, Layout(shard=5)) == 5
    assert step_seconds(MODEL, ROOMY, Layout(shard=6)) == 4
    assert step_seconds(MODEL, ROOMY, Layout(shard=7)) == 4
    measured = replace(ROOMY, measured={Layout(shard=7): 9.0})
    found = choose(MODEL, measured, Limits((7, 6)), [1] * 7)
    assert found.best is not None
    assert found.best.layout.shard == 6


def test_another_tensor_degree_must_gain_five_percent() -> None:
    before = Standing(Layout(shard=2, tp=2), (0, 1))
    layouts = {Layout(tp=2): 1.0, Layout(shard=2): 0.97}
    limits = Limits((1,), tp=(1, 2), horizon_s=1e9)
    near = choose(MODEL, replace(ROOMY, measured=layouts), limits, [2], before)
    assert near.best is not None
    assert (near.action, near.best.layout) == (Action.SHRINK, Layout(tp=2))
    assert why(near, 1, tp=1).startswith("gains 3.1% over pp1.dp1.fsdp1.tp2, and")
    layouts[Layout(shard=2)] = 0.94
    far = choose(MODEL, replace(ROOMY, measured=layouts), limits, [2], before)
    assert far.best is not None
    assert (far.action, far.best.layout) == (Action.RESHAPE, Layout(shard=2))


def test_the_way_there_counts() -> None:
    """The better layout takes all of a short horizon to reach."""
    slow = replace(ROOMY, peer_bytes_per_s=1e3, measured={Layout(tp=2): 1.0, Layout(shard=2): 0.8})
    before = Standing(Layout(shard=2, tp=2), (0, 1, 2, 3))
    short = choose(MODEL, slow, Limits((1,), tp=(1, 2), horizon_s=20), [2], before)
    assert short.best is not None
    assert short.best.layout == Layout(tp=2)


def test_bytes_that_a_rank_has_are_not_moved_and_those_that_nobody_has_are_stored() -> None:
    size = MODEL.stored_bytes
    kept = Standing(Layout(shard=4), (0, 1, 2))
    found = transition(MODEL, ROOMY, kept, Layout(shard=3))
    assert found.own + found.peers + found.store == pytest.approx(size, abs=2)
    assert found.store == size // 4
    # Of the first third a quarter of all is there; of the second 1/3 to 1/2; of the last 2/3 to 3/4.
    assert found.own == pytest.approx(size * (1 / 4 + 1 / 6 + 1 / 12), abs=2)


def test_a_replica_spares_the_storage() -> None:
    two = Standing(Layout(replicate=2, shard=2), (0, 1, 2))
    assert transition(MODEL, ROOMY, two, Layout(shard=3)).store == 0


def test_without_anything_living_all_comes_from_the_storage() -> None:
    found = transition(MODEL, ROOMY, None, Layout(replicate=2, shard=2))
    assert found[:3] == (0, 0, 2 * MODEL.stored_bytes)


@pytest.mark.parametrize(("spare_s", "action"), [(1.0, Action.WAIT), (600.0, Action.SHRINK)])
def test_a_spare_that_comes_soon_is_waited_for(spare_s: float, action: Action) -> None:
    before = Standing(Layout(shard=4), (0, 1, 2))
    found = choose(MODEL, ROOMY, Limits((4, 3)), [1, 1, 1], before, spare_s)
    assert found.action is action
    assert found.best is not None
    assert found.best.layout == Layout(shard=3)  # what there is to do meanwhile


def test_it_grows_back_and_stays_where_nothing_changed() -> None:
    limits = Limits((4, 3))
    three = Standing(Layout(shard=3), (0, 1, 2))
    assert choose(MODEL, ROOMY, limits, [1] * 4, three).action is Action.GROW
    assert choose(MODEL, ROOMY, limits, [1] * 3, three).action is Action.STAY


def test_the_table_has_a_row_for_each_loss() -> None:
    rows = table(MODEL, ROOMY, SIZES, [1] * 5, 3)
    assert [row.best.layout.shard if row.best else 0 for row in rows] == [5, 4, 3, 2]
    assert [row.action for row in rows] == [Action.STAY, *[Action.SHRINK] * 3]


@given(
    nodes=st.lists(st.integers(1, 8), min_size=1, max_size=6),
    heads=st.integers(1, 12),
    layers=st.integers(1, 9),
    memory=st.integers(100, 40_000),
    lost=st.integers(0, 3),
)
def test_what_is_chosen_can_run_and_is_chosen_again(
    nodes: list[int], heads: int, layers: int, memory: int, lost: int
) -> None:
    model = Model(1000, layers, heads, micro_batches=24)
    limits = Limits((6, 4, 3, 2, 1), (1, 2, 3), (1, 2, 4), replicate=2)
    machine = replace(ROOMY, memory_bytes=memory)
    rows = table(model, machine, limits, nodes, lost)
    assert rows == table(model, machine, limits, nodes[::-1], lost)
    for gone, choice in enumerate(rows):
        if choice.best is None:
            continue
        found, layout = choice.best, choice.best.layout
        left = sorted(nodes, reverse=True)[: len(nodes) - gone]
        ranks = left[found.nodes - 1]
        assert layout.world == found.nodes * ranks
        assert found.memory_bytes <= memory
        assert ranks % layout.tp == heads % layout.tp == 0
        assert layout.pp <= layers
        moved = found.transition
        assert sum(moved[:3]) == pytest.approx(model.stored_bytes * layout.replicate, rel=1e-3)


def test_the_operator_can_ask_it_without_torch_or_numpy() -> None:
    code = (
        "import sys; sys.modules['torch'] = sys.modules['numpy'] = None; import stormjib_checkpoint.layouts"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
