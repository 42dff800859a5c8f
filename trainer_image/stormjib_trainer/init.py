"""First weights, the same on every world size: each parameter has a generator of its own, keyed by (seed, name).

The full tensor is drawn on the CPU, on every rank, and sharding then keeps a rank's part of it. No rank talks to
another, and no value depends on who holds it. That costs the memory of the whole model once per process at start,
which is fine for the small models of this trainer; a large one would draw by element index, only what it keeps.
"""

from __future__ import annotations

import hashlib

import torch
from torch import nn

STD = 0.02
_RESIDUAL = ("attention.out.weight", "feed_forward.down.weight")


def fill(model: nn.Module, seed: int, layers: int) -> None:
    """Give every parameter its first value."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 1:
                parameter.fill_(1.0)  # gains of norms
            else:
                parameter.normal_(0.0, _std(name, layers), generator=generator(seed, name))


def generator(seed: int, name: str) -> torch.Generator:
    """The generator of one parameter."""
    key = hashlib.blake2b(f"{seed}/{name}".encode(), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(key) >> 1)


def _std(name: str, layers: int) -> float:
    """Smaller where a layer adds to the residual stream, so that the sum of all layers starts at the same size."""
    return STD / (2 * layers) ** 0.5 if name.endswith(_RESIDUAL) else STD
