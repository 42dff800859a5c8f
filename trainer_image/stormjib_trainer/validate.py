"""Loss on the validation text, split over the ranks."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.distributed as dist

from stormjib_checkpoint.order import Micro
from stormjib_trainer.step import Share, summed_loss

if TYPE_CHECKING:
    from stormjib_trainer.data import Corpus
    from stormjib_trainer.model import Llama

CHUNK = 64
"""Sequences through the model at once."""


def validate(model: Llama, text: Corpus, sequences: int, device: torch.device) -> float:
    """Mean loss in nats per byte over `sequences` windows, the same on every rank."""
    of = min(sequences, text.validation_samples)
    share = Share(Micro(1, of), dist.get_rank(), dist.get_world_size())
    windows = text.validation_batch(share.numbers, of)
    total = torch.zeros((), dtype=torch.float64, device=device)
    model.eval()
    with torch.no_grad():
        for one in share.passes(windows, CHUNK):
            total += summed_loss(model, one.windows.to(device)).double() * one.weight
    model.train()
    dist.all_reduce(total)
    return float(total) / (of * text.context)
