"""What a rank does in the tests of first weights: every rank draws for itself, cuts, and compares what all have put together."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor

from stormjib_trainer import init, parallel
from stormjib_trainer.config import ModelConfig, TrainConfig
from stormjib_trainer.model import Llama

CONFIG = ModelConfig(dim=32, layers=2, heads=2, context=16)


def drawn() -> Llama:
    """Drawn by this rank alone, after something else was drawn that is another thing on each rank."""
    torch.manual_seed(dist.get_rank() if dist.is_initialized() else 99)
    model = Llama(CONFIG)
    init.fill(model, 3, CONFIG.layers)
    return model


def fsdp(rank: int, world: int, wanted: dict[str, list[float]]) -> None:
    """All shards together are the whole, and no two of a matrix are alike."""
    model = drawn()
    parallel.shard(model, torch.device("cpu"), TrainConfig(unit=1))
    for name, parameter in model.named_parameters():
        assert isinstance(parameter, DTensor)
        whole = parameter.full_tensor().detach()
        assert whole.flatten().tolist() == wanted[name], name
        rows = {tuple(row) for row in whole.tolist()} if whole.ndim > 1 else whole
        assert len(rows) == len(whole), "no row comes twice"


def columns(rank: int, world: int, wanted: dict[str, list[float]]) -> None:
    """As tensor parallelism cuts: each rank keeps some columns of every matrix."""
    for name, parameter in drawn().named_parameters():
        if parameter.ndim == 1:
            continue
        cuts = parameter.detach().tensor_split(world, dim=1)
        parts = [torch.empty(cut.shape) for cut in cuts]
        for owner, part in enumerate(parts):
            if owner == rank:
                part.copy_(cuts[rank])
            dist.broadcast(part, owner)
        assert torch.cat(parts, dim=1).flatten().tolist() == wanted[name], name
