"""AdamW and its schedule. The learning rate is a function of the step alone: there is no scheduler state to save."""

from __future__ import annotations

from math import cos, pi
from typing import TYPE_CHECKING

import torch
from torch.distributed.tensor import DTensor

if TYPE_CHECKING:
    from torch import Tensor, nn

    from stormjib_checkpoint.tensors import Value
    from stormjib_trainer.config import OptimizerConfig

MOMENTS = ("exp_avg", "exp_avg_sq")


class Optimizer:
    """AdamW on this rank's shards as plain tensors: it works element by element, so it need not know of sharding, and
    the first dispatch of each operation on sharded tensors costs a new process 25 ms, as much as its first step."""

    def __init__(self, model: nn.Module, config: OptimizerConfig, steps: int, *, exact: bool = False) -> None:
        """`exact`: the same bits however shards are cut."""
        self._config, self._steps = config, steps
        self._parameters = {name: p for name, p in model.named_parameters() if isinstance(p, DTensor)}
        with torch.no_grad():
            self._shards = {name: p.to_local() for name, p in self._parameters.items()}
        self._adam = torch.optim.AdamW(
            self._groups(),
            config.lr,
            (config.beta1, config.beta2),
            config.eps,
            fused=not exact,
            foreach=exact,
        )
        # Made at once and not by the first step, so that a checkpoint can be loaded into it.
        for shard in self._shards.values():
            self._adam.state[shard] = {moment: torch.zeros_like(shard) for moment in MOMENTS}
        self.done(0)

    def _groups(self) -> list[dict[str, object]]:
        matrices = [s for name, s in self._shards.items() if self._parameters[name].ndim > 1]
        gains = [s for name, s in self._shards.items() if self._parameters[name].ndim == 1]
        return [
            {"params": matrices, "weight_decay": self._config.weight_decay},
            {"params": gains, "weight_decay": 0.0},
        ]

    def done(self, step: int) -> None:
        """Tell the optimizer how many steps it has done: its bias correction depends on that."""
        for shard, state in self._adam.state.items():
            state["step"] = torch.tensor(float(step), device=shard.device)

    @torch.no_grad()
    def gradients(self) -> list[Tensor]:
        """Hand the model's gradients over to the shards; as plain tensors, in the order of the parameters."""
        for name, shard in self._shards.items():
            gradient = self._parameters[name].grad
            if isinstance(gradient, DTensor):
                shard.grad = gradient.to_local()
                self._parameters[name].grad = None
        return [shard.grad for shard in self._shards.values() if shard.grad is not None]

    def drop(self) -> None:
        """Forget the gradients that were handed over."""
        self._adam.zero_grad()

    def skip(self, step: int) -> None:
        """Let step `step` pass without doing it: the next one is step + 1, here as after a restart."""
        self.drop()
        self.done(step)

    def tensors(self) -> list[Tensor]:
        """Everything that a step changes, on this rank: each weight and its moments."""
        return [
            tensor
            for shard in self._shards.values()
            for tensor in (shard, *(self._adam.state[shard][moment] for moment in MOMENTS))
        ]

    def apply(self, step: int) -> None:
        """Do step `step` with the gradients handed over before, and drop them."""
        rate = learning_rate(self._config, step, self._steps)
        for group in self._adam.param_groups:
            group["lr"] = rate
        self._adam.step()
        self._adam.zero_grad()

    def state(self) -> dict[str, Value]:
        """The moments, sharded as their parameters are, sharing memory with the optimizer: a checkpoint reads them
        and is loaded into them."""
        return {
            f"optim.{name}.{moment}": _sharded_like(self._parameters[name], self._adam.state[shard][moment])
            for name, shard in self._shards.items()
            for moment in MOMENTS
        }


def kernel(*, exact: bool) -> dict[str, bool]:
    """Which of torch's: the fused one rounds otherwise in the last elements of a shard, those that fill no vector register. The
    other one does not, and takes 3.6 times as long on a CPU."""
    return {"foreach": True} if exact else {"fused": True}


def learning_rate(config: OptimizerConfig, step: int, steps: int) -> float:
    """Of step `step` of 1..steps: linear warm-up, then half a cosine down to final_lr."""
    if step <= config.warmup:
        return config.lr * step / config.warmup
    done = (step - config.warmup) / (steps - config.warmup)
    return config.final_lr + (config.lr - config.final_lr) * 0.5 * (1 + cos(pi * min(done, 1.0)))


def _sharded_like(parameter: DTensor, local: Tensor) -> DTensor:
    return DTensor.from_local(
        local,
        parameter.device_mesh,
        parameter.placements,
        run_check=False,
        shape=parameter.shape,
        stride=parameter.stride(),
    )
