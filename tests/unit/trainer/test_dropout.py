"""Masks are a function of seed, step, layer, micro-batch and position: the same whoever draws them, and each another one."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from stormjib_checkpoint.order import mix
from stormjib_trainer import init
from stormjib_trainer.config import ModelConfig
from stormjib_trainer.dropout import draw, dropout, keys
from stormjib_trainer.model import Llama

CPU = torch.device("cpu")
WORD = (1 << 64) - 1
GOLDEN = 0x9E3779B97F4A7C15


@given(total=st.integers(1, 12), size=st.integers(1, 3), world=st.integers(1, 5), step=st.integers(0, 10**6))
def test_a_sequence_has_one_key_whoever_takes_it(total: int, size: int, world: int, step: int) -> None:
    whole = keys(3, step, range(total), size, CPU).reshape(total, size)
    assert len(set(whole.flatten().tolist())) == total * size
    for rank in range(min(world, total)):
        numbers = range(rank, total, world)
        assert torch.equal(keys(3, step, numbers, size, CPU).reshape(-1, size), whole[rank::world])


def test_a_rank_without_a_micro_batch_takes_one_sequence_with_a_key_of_its_own() -> None:
    (key,) = keys(3, 5, range(0), 4, CPU).tolist()
    assert key not in keys(3, 5, range(100), 4, CPU).tolist()


@given(key=st.integers(-(2**63), 2**63 - 1), layer=st.integers(0, 500), count=st.integers(1, 23))
def test_the_numbers_are_those_of_splitmix64(key: int, layer: int, count: int) -> None:
    state = mix(key + GOLDEN * (layer + 1) & WORD)
    words = [mix(state + GOLDEN * (i + 1) & WORD) for i in range(-(-count // 4))]
    quarters = [word >> 16 * i & 0xFFFF for word in words for i in range(4)]
    drawn = draw(torch.tensor([key]), layer, count).long() & 0xFFFF
    assert drawn.tolist() == [quarters[:count]]


def test_they_never_change() -> None:
    """Another way of drawing would go on with other masks after a resume."""
    assert draw(keys(0, 1, range(2), 1, CPU), 3, 3).tolist() == [
        [11418, 29485, 22087],
        [-10771, -27893, 18983],
    ]


def test_seed_step_layer_micro_batch_and_row_each_give_another_mask() -> None:
    def mask(seed: int = 0, step: int = 1, layer: int = 0, number: int = 0, row: int = 0) -> torch.Tensor:
        return draw(keys(seed, step, range(number, number + 1), 4, CPU), layer, 512)[row]

    first = mask()
    changes = ({"seed": 1}, {"step": 2}, {"layer": 1}, {"number": 1}, {"row": 1})
    for change in changes:
        assert (mask(**change) == first).sum() < 3, change
    assert torch.equal(mask(), first)


@pytest.mark.parametrize("p", [0.1, 0.5, 0.9])
def test_a_share_of_p_is_dropped_and_the_rest_scaled_up(p: float) -> None:
    x = torch.ones(64, 32, 33)
    y = dropout(x, keys(1, 1, range(64), 1, CPU), 2, p)
    kept = y != 0
    assert float(kept.float().mean()) == pytest.approx(1 - p, abs=0.01)
    assert float(y[kept].min()) == float(y[kept].max()) == pytest.approx(1 / (1 - p), rel=1e-4)


def test_no_two_sequences_and_no_two_places_are_alike() -> None:
    kept = draw(keys(1, 1, range(1024), 1, CPU), 2, 1024).ge(0).double()
    for rows in (kept[:128], kept.T[:128]):
        assert torch.corrcoef(rows).fill_diagonal_(0).abs().max() < 0.2  # 6 sigma


def model(p: float) -> Llama:
    config = ModelConfig(dim=32, layers=2, heads=2, context=16, dropout=p)
    made = Llama(config)
    init.fill(made, 0, config.layers)
    return made


def test_the_model_draws_for_each_sequence_alone_and_from_no_generator() -> None:
    dropped, tokens = model(0.3), torch.randint(256, (6, 16), generator=torch.Generator().manual_seed(2))
    before = torch.random.get_rng_state()
    whole = dropped(tokens, keys(0, 7, range(6), 1, CPU))
    for world in (2, 3):
        for rank in range(world):
            part = dropped(tokens[rank::world], keys(0, 7, range(rank, 6, world), 1, CPU))
            torch.testing.assert_close(part, whole[rank::world])
    assert torch.equal(torch.random.get_rng_state(), before)
    assert not torch.allclose(whole, dropped(tokens, keys(0, 8, range(6), 1, CPU)))


def test_without_keys_nothing_is_dropped() -> None:
    tokens = torch.arange(16).unsqueeze(0)
    assert torch.equal(model(0.3)(tokens), model(0.0)(tokens))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_a_gpu_draws_the_same() -> None:
    on_gpu = draw(keys(5, 9, range(7), 3, torch.device("cuda")), 4, 1001)
    assert torch.equal(on_gpu.cpu(), draw(keys(5, 9, range(7), 3, CPU), 4, 1001))
