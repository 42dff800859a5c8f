"""First weights are a function of (seed, name) alone; the learning rate one of the step."""

from __future__ import annotations

import pytest
import torch

from stormjib_trainer import init
from stormjib_trainer.config import ModelConfig, OptimizerConfig
from stormjib_trainer.model import Llama
from stormjib_trainer.optimizer import learning_rate


def filled(seed: int = 0, **shape: int | bool) -> Llama:
    config = ModelConfig(**{"dim": 32, "layers": 2, "heads": 2, "context": 16, **shape})  # type: ignore[arg-type]
    model = Llama(config)
    init.fill(model, seed, config.layers)
    return model


def test_weights_depend_on_seed_and_name_only() -> None:
    first, again, other = filled(), filled(), filled(seed=1)
    torch.manual_seed(1)  # what anybody else drew changes nothing
    for name, parameter in first.named_parameters():
        assert torch.equal(parameter, again.get_parameter(name))
        if parameter.ndim > 1:
            assert not torch.equal(parameter, other.get_parameter(name))


def test_a_deeper_model_begins_with_the_same_embedding_and_first_query() -> None:
    shallow, deep = filled(), filled(layers=4)
    for name in ("embedding.weight", "blocks.0.attention.query.weight"):
        assert torch.equal(shallow.get_parameter(name), deep.get_parameter(name))


def test_no_two_matrices_are_alike() -> None:
    block = filled().blocks[0]
    query, key = block.get_parameter("attention.query.weight"), block.get_parameter("attention.key.weight")
    assert not torch.equal(query, key)


def test_tied_embeddings_are_one_parameter() -> None:
    names = {name for name, _ in filled(tied=True).named_parameters()}
    assert "head.weight" not in names
    assert filled(tied=True)(torch.zeros(1, 16, dtype=torch.int64)).shape == (1, 16, 256)


def test_a_position_sees_only_what_came_before() -> None:
    model = filled()
    tokens = torch.arange(16).unsqueeze(0)
    changed = tokens.clone()
    changed[0, 9] = 200
    before, after = model(tokens), model(changed)
    assert torch.equal(before[0, :9], after[0, :9])
    assert not torch.allclose(before[0, 9:], after[0, 9:])


def test_the_learning_rate_rises_then_falls() -> None:
    config = OptimizerConfig(lr=1.0, final_lr=0.1, warmup=10)
    rates = [learning_rate(config, step, 100) for step in range(1, 101)]
    assert rates[:10] == pytest.approx([i / 10 for i in range(1, 11)])
    assert rates[10:] == sorted(rates[10:], reverse=True)
    assert rates[-1] == pytest.approx(0.1)
