"""The audit proves the samples of a history: none lost, none twice, over any number of reshapes; and it finds what is wrong."""

from __future__ import annotations

from itertools import pairwise
from typing import TYPE_CHECKING

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

from fakes.disk import Disk
from fakes.saving import save_rank
from stormjib_checkpoint.commands import app
from stormjib_checkpoint.commit import commit_step
from stormjib_checkpoint.ledger import audit
from stormjib_checkpoint.opening import open_generation
from stormjib_checkpoint.order import Micro, Order, Source
from stormjib_checkpoint.storage import Local

if TYPE_CHECKING:
    from pathlib import Path

    from stormjib_checkpoint.records import Json

RESHAPES = 10
MIXED = Order((Source("code", 41, 7), Source("prose", 5, 3)), Micro(2, 6), seed=5)


def feed(
    storage: Local,
    generation: str,
    world: int,
    steps: range,
    order: Order,
    cursor: dict[str, Json] | None = None,
    lost: bool = False,
) -> None:
    """All ranks of a world feed these steps, as a trainer does, and leave the last of them; where it is lost, rank 0 does not."""
    last = steps[-1]
    for rank in range(lost, world):
        numbers = range(rank, order.lmb.per_step, world)
        save_rank(
            storage,
            step=last,
            generation=generation,
            rank=rank,
            world=world,
            state={"step": torch.tensor(float(last))},
            train={"cursor": order.cursor(last) if cursor is None else cursor},
            samples={step: order.ids(step, numbers) for step in steps},
        )
    if not lost:
        commit_step(storage, generation, world, last)


@settings(max_examples=8, deadline=None)
@given(
    lives=st.lists(
        st.tuples(st.integers(1, 6), st.integers(1, 4), st.booleans()),
        min_size=RESHAPES + 1,
        max_size=RESHAPES + 1,
    ),
    seed=st.integers(0, 2**40),
)
def test_ten_reshapes_lose_no_sample_and_take_none_twice(
    lives: list[tuple[int, int, bool]], seed: int
) -> None:
    """§6.4. Each life has a number of ranks, trains some steps and saves, and may train some more that is lost."""
    storage, done = Local("/job", Disk()), 0
    order = Order(MIXED.sources, MIXED.lmb, seed)
    for number, (world, steps, lost) in enumerate(lives, start=1):
        open_generation(storage, f"1.{number}", "uid")
        feed(storage, f"1.{number}", world, range(done + 1, done + steps + 1), order)
        done += steps
        if lost:
            feed(storage, f"1.{number}", world, range(done + 1, done + 3), order, lost=True)
    found = audit(storage)
    assert (found.last, found.problems, found.gaps(), found.twice()) == (done, (), [], [])
    assert found.order == order
    assert found.unplanned() == []
    worlds = [world for world, _, _ in lives]
    assert found.reshapes() == sum(a != b for a, b in pairwise(worlds))
    fed = [i for step in range(1, done + 1) for i in found.ids(step)]
    for which, taken in enumerate(order.taken(len(fed))):
        assert len([i for i in fed if order.place(i)[0] == which]) == taken


def test_a_rank_that_reads_others_samples_is_found(tmp_path: Path) -> None:
    storage = Local(tmp_path)
    open_generation(storage, "1.1", "uid")
    feed(storage, "1.1", 3, range(1, 4), MIXED)
    open_generation(storage, "1.2", "uid")
    other = Order(MIXED.sources, MIXED.lmb, seed=6)
    feed(storage, "1.2", 2, range(4, 6), other, cursor=MIXED.cursor(5))
    found = audit(storage)
    wrong = found.unplanned()
    assert {one.step for one in wrong} == {4, 5}
    assert sorted([*wrong[0].missing]) == sorted(set(MIXED.ids(4)) - set(other.ids(4)))
    code, text = run(tmp_path)
    assert code == 1
    assert "step 4: " in text
    assert "none lost" not in text


def test_steps_that_nobody_wrote_down_are_missing_even_before_the_first_that_is(tmp_path: Path) -> None:
    storage = Local(tmp_path)
    open_generation(storage, "1.1", "uid")
    feed(storage, "1.1", 2, range(3, 5), MIXED)
    assert audit(storage).gaps() == []
    assert [one.step for one in audit(storage).unplanned()] == [1, 2]


def test_what_is_as_planned_is_said_to_be_proved(tmp_path: Path) -> None:
    storage = Local(tmp_path)
    for number, world in enumerate((3, 2, 5), start=1):
        open_generation(storage, f"1.{number}", "uid")
        feed(storage, f"1.{number}", world, range(4 * number - 3, 4 * number + 1), MIXED)
    code, text = run(tmp_path)
    assert code == 0
    assert (
        "12 steps up to 12, 144 samples, 0 of them more than once, 2 changes of the number of ranks" in text
    )
    assert "none lost, none twice" in text


@pytest.mark.parametrize(
    ("cursor", "said"),
    [
        (MIXED.cursor(8) | {"v": 1}, "the cursor of step 8 is of version 1"),
        (MIXED.cursor(7), "its own order says"),
        (Order(MIXED.sources, MIXED.lmb, 6).cursor(8), "step 4 was fed by"),
    ],
)
def test_a_cursor_that_fits_no_history_is_a_problem(cursor: dict[str, Json], said: str) -> None:
    storage = Local("/job", Disk())
    open_generation(storage, "1.1", "uid")
    feed(storage, "1.1", 2, range(1, 5), MIXED)
    feed(storage, "1.1", 2, range(5, 9), MIXED, cursor=cursor)
    (problem,) = audit(storage).problems
    assert said in problem


def run(root: Path) -> tuple[int, str]:
    done = CliRunner().invoke(app, ["audit", str(root)])
    return done.exit_code, done.output
