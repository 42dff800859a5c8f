"""A rank that trains as TorchTitan's trainer does: load, then step, wait for staging, optimizer, save."""

from __future__ import annotations

from typing import Any

import torch
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.checkpoint.stateful import Stateful

from fakes import titan
from fakes.fsdp_ranks import build, dump
from stormjib_checkpoint.torchtitan import checkpoint_manager


class Optimizers(Stateful):
    """Flat, by name, as TorchTitan's container."""

    def __init__(self, model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> None:
        self.model, self.optimizer = model, optimizer
        self.options = StateDictOptions(flatten_optimizer_state_dict=True)

    def state_dict(self) -> dict[str, Any]:
        return get_optimizer_state_dict(self.model, self.optimizer, options=self.options)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        set_optimizer_state_dict(self.model, self.optimizer, state_dict, options=self.options)


class Trainer(Stateful):
    def __init__(self) -> None:
        self.step = 0

    def state_dict(self) -> dict[str, Any]:
        return {"step": self.step, "ntokens_seen": 10 * self.step}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.step = state_dict["step"]
        assert state_dict["ntokens_seen"] == 10 * self.step


class Data(Stateful):
    """Each rank's own place in the data, in bytes that only it understands."""

    def __init__(self, rank: int) -> None:
        self.key, self.at = f"dp_rank_{rank}", 0

    def state_dict(self) -> dict[str, Any]:
        return {self.key: str(self.at).encode()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.at = int(state_dict[self.key].decode())


def train(rank: int, world: int, folder: str, steps: int, starts: int, path: str) -> None:
    """Go on from where the last process was, which must be step `starts`, up to `steps`."""
    titan.install()
    model, optimizer = build(1, (world,))
    trainer, data = Trainer(), Data(rank)
    config = checkpoint_manager().Config(enable=True, interval=1, keep_latest_k=2, last_save_model_only=False)
    manager = config.build(
        dataloader=data,
        model_parts=[model],
        optimizers=Optimizers(model, optimizer),
        lr_schedulers=torch.optim.lr_scheduler.StepLR(optimizer, 100),
        states={"train_state": trainer},
        sd_adapter=None,
        base_folder=folder,
    )
    assert manager.load(step=-1) is (starts > 0)
    assert (trainer.step, data.at) == (starts, (rank + 1) * starts)
    while trainer.step < steps:
        trainer.step, data.at = trainer.step + 1, data.at + rank + 1
        torch.manual_seed(trainer.step)
        model(torch.randn(4, 6)).float().square().sum().backward()
        manager.maybe_wait_for_staging()
        optimizer.step()
        optimizer.zero_grad()
        manager.save(trainer.step, last_step=trainer.step == steps)
    dump(rank, model, optimizer, path)
    manager.close()
