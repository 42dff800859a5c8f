"""Loss on the validation text, split over the ranks."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.distributed as dist

from stormjib_trainer.order import share
from stormjib_trainer.step import micro_batches, summed_loss

if TYPE_CHECKING:
    from stormjib_trainer.data import Text
    from stormjib_trainer.model import Llama

CHUNK = 64
"""Sequences through the model at once."""


def validate(model: Llama, text: Text, sequences: int, device: torch.device) -> float:
    """Mean loss in nats per byte over `sequences` windows, the same on every rank."""
    of = min(sequences, text.validation_samples)
    part = share(of, dist.get_rank(), dist.get_world_size())
    windows = text.validation_batch(part, of)
    total = torch.zeros((), dtype=torch.float64, device=device)
    model.eval()
    with torch.no_grad():
        for chunk, weight in micro_batches(windows, CHUNK, of, dist.get_world_size()):
            total += summed_loss(model, chunk.to(device)).double() * weight
    model.train()
    dist.all_reduce(total)
    return float(total) / (of * text.context)
