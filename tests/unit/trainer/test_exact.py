"""What exact mode sums does not depend on where it is cut."""

from __future__ import annotations

from itertools import pairwise
from typing import TYPE_CHECKING

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from stormjib_trainer.exact import row_squares
from stormjib_trainer.optimizer import kernel

if TYPE_CHECKING:
    from collections.abc import Iterator

WIDE = 40_000
"""A row of so many elements is cut by torch where it is alone and there are several threads."""


@pytest.fixture(params=[1, 2])
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


@pytest.mark.parametrize("shape", [(13,), (13, 1), (13, 85), (13, WIDE), (5, 7, 3)])
def test_rows_have_the_same_squares_on_every_world(shape: tuple[int, ...], threads: int) -> None:
    gradient = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    whole = row_squares(gradient)
    assert whole.dtype == torch.float64
    torch.testing.assert_close(whole.sum(), gradient.double().square().sum())
    for world in (2, 3, 5, 7, 13, 16):
        shards = (*gradient.chunk(world), gradient[:0])
        assert torch.equal(torch.cat([row_squares(shard) for shard in shards]), whole), world


@given(cuts=st.lists(st.integers(0, 200), max_size=6), seed=st.integers(0, 100))
def test_a_step_of_the_exact_optimizer_does_not_depend_on_cuts(cuts: list[int], seed: int) -> None:
    torch.manual_seed(seed)
    weight, gradients = torch.randn(200), [torch.randn(200) for _ in range(3)]
    whole, parts = stepped(weight, gradients, [0, 200]), stepped(weight, gradients, [0, *sorted(cuts), 200])
    for one, other in zip(whole, parts, strict=True):
        assert torch.equal(one, other)


def stepped(weight: torch.Tensor, gradients: list[torch.Tensor], cuts: list[int]) -> list[torch.Tensor]:
    """Weight and moments after some steps, each part by itself."""
    slices = [slice(begin, end) for begin, end in pairwise(cuts)]
    parts = [nn.Parameter(weight[part].clone()) for part in slices]
    adam = torch.optim.AdamW(parts, 1e-2, (0.9, 0.95), 1e-8, 0.1, **kernel(exact=True))
    for gradient in gradients:
        for parameter, part in zip(parts, slices, strict=True):
            parameter.grad = gradient[part].clone()
        adam.step()
    return [
        torch.cat([adam.state[p][name] if name else p.detach() for p in parts])
        for name in ("", "exp_avg", "exp_avg_sq")
    ]
