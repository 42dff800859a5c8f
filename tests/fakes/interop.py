"""Checkpoints to bring out, and the parts of other libraries that read what was brought out."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from fakes.saving import save_rank
from stormjib_checkpoint.commit import commit_step
from stormjib_checkpoint.history import committed
from stormjib_checkpoint.opening import open_next
from stormjib_checkpoint.reader import Checkpoint
from stormjib_checkpoint.storage import Local
from stormjib_checkpoint.tensors import DTYPES, empty
from stormjib_trainer import init
from stormjib_trainer.config import Config, ModelConfig
from stormjib_trainer.model import Llama

if TYPE_CHECKING:
    from pathlib import Path

STEP = 12


def trained(tied: bool = False) -> tuple[Llama, dict[str, torch.Tensor], Config]:
    """A model of the trainer, its state as the trainer saves it, and its configuration."""
    config = Config(model=ModelConfig(dim=16, layers=2, heads=4, context=32, tied=tied))
    model = Llama(config.model)
    init.fill(model, 3, config.model.layers)
    state: dict[str, torch.Tensor] = {}
    for index, (name, parameter) in enumerate(model.named_parameters()):
        if parameter.ndim == 1:
            with torch.no_grad():
                parameter.add_(torch.linspace(0, 0.5, parameter.numel()))
        state[f"model.{name}"] = parameter.detach()
        state[f"optim.{name}.exp_avg"] = parameter.detach() * 0.5 + index
        state[f"optim.{name}.exp_avg_sq"] = parameter.detach() ** 2
    return model, state, config


def save_trained(root: Path, tied: bool = False, world: int = 3) -> tuple[Llama, dict[str, torch.Tensor]]:
    """The same, committed under `root`."""
    model, state, config = trained(tied)
    commit(root, state, {"step": STEP, "config": config.to_dict()}, world)
    return model, state


def commit(root: Path, state: dict[str, Any], train: dict[str, Any], world: int = 1) -> None:
    """`state` as a committed step STEP."""
    storage = Local(root)
    generation = open_next(storage).generation
    for rank in range(world):
        save_rank(
            storage,
            step=STEP,
            generation=generation,
            rank=rank,
            world=world,
            state=state,
            train=train,
            samples={},
        )
    commit_step(storage, generation, world, STEP)


def opened(root: Path) -> Checkpoint:
    """The newest step there."""
    storage = Local(root)
    return Checkpoint(storage, committed(storage)[0])


def everything(root: Path) -> dict[str, torch.Tensor]:
    """All tensors of the newest step, by every name of theirs."""
    checkpoint = opened(root)
    state = {name: empty(atom.shape, DTYPES[atom.dtype]) for name, atom in checkpoint.atoms.items()}
    checkpoint.fill({**state, **checkpoint.scalars})
    return state


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> None:
    """Assert that both are equal, bit for bit."""
    assert one.keys() == other.keys()
    for name, tensor in one.items():
        assert (tensor.dtype, tensor.shape) == (other[name].dtype, other[name].shape), name
        assert torch.equal(tensor, other[name]), name
