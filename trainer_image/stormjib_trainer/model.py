"""A small Llama: RMS norm, rotary positions, causal attention, SwiGLU; input and output embedding tied or not.

Parameters are made empty; `init` fills them. Names are part of the checkpoint format: a rename breaks old ones.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from stormjib_trainer.dropout import dropout

if TYPE_CHECKING:
    from stormjib_trainer.config import ModelConfig

VOCABULARY = 256


class Linear(nn.Linear):
    """Without a bias, and without torch's own initialisation, which would draw from the global generator."""

    def __init__(self, fan_in: int, fan_out: int) -> None:
        super().__init__(fan_in, fan_out, bias=False)

    def reset_parameters(self) -> None:
        """Left to `init`."""


class Embedding(nn.Embedding):
    """Without torch's own initialisation."""

    def reset_parameters(self) -> None:
        """Left to `init`."""


class Norm(nn.Module):
    """RMS norm with a gain."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, self.weight.shape, self.weight, 1e-5)


class Attention(nn.Module):
    """Causal self-attention with rotary positions."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.heads = config.heads
        self.query = Linear(config.dim, config.dim)
        self.key = Linear(config.dim, config.dim)
        self.value = Linear(config.dim, config.dim)
        self.out = Linear(config.dim, config.dim)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        q, k, v = (proj(x).unflatten(-1, (self.heads, -1)) for proj in (self.query, self.key, self.value))
        # Turned before the transpose, while the memory is still contiguous.
        q, k, v = (t.transpose(1, 2) for t in (_turn(q, cos, sin), _turn(k, cos, sin), v))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return cast("Tensor", self.out(y.transpose(1, 2).flatten(-2)))


class FeedForward(nn.Module):
    """SwiGLU."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.gate = Linear(config.dim, config.hidden)
        self.up = Linear(config.dim, config.hidden)
        self.down = Linear(config.hidden, config.dim)

    def forward(self, x: Tensor) -> Tensor:
        return cast("Tensor", self.down(F.silu(self.gate(x)) * self.up(x)))


class Block(nn.Module):
    """One layer; the unit that is sharded."""

    def __init__(self, config: ModelConfig, number: int) -> None:
        super().__init__()
        self._drop = config.dropout
        self._layers = (2 * number + 1, 2 * number + 2)
        """Numbers of its two masks in the whole model; 0 is that of the embedding."""
        self.attention_norm = Norm(config.dim)
        self.attention = Attention(config)
        self.feed_forward_norm = Norm(config.dim)
        self.feed_forward = FeedForward(config)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, keys: Tensor | None) -> Tensor:
        first, second = self._layers
        x = x + _dropped(self.attention(self.attention_norm(x), cos, sin), keys, first, self._drop)
        return x + _dropped(self.feed_forward(self.feed_forward_norm(x)), keys, second, self._drop)


class Llama(nn.Module):
    """Bytes in, logits of the next byte out; with the keys of the sequences (`dropout.keys`) their activations are dropped."""

    cos: Tensor
    sin: Tensor

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self._drop = config.dropout
        self.embedding = Embedding(VOCABULARY, config.dim)
        self.blocks = nn.ModuleList(Block(config, number) for number in range(config.layers))
        self.norm = Norm(config.dim)
        self.head = None if config.tied else Linear(config.dim, VOCABULARY)
        cos, sin = _rotary(config)
        self.register_buffer("cos", cos, persistent=False)
        self.register_buffer("sin", sin, persistent=False)

    def forward(self, tokens: Tensor, keys: Tensor | None = None) -> Tensor:
        x = _dropped(self.embedding(tokens), keys, 0, self._drop)
        for block in self.blocks:
            x = block(x, self.cos, self.sin, keys)
        return F.linear(self.norm(x), (self.head or self.embedding).weight)


def _dropped(x: Tensor, keys: Tensor | None, layer: int, p: float) -> Tensor:
    return x if keys is None else dropout(x, keys, layer, p)


def _rotary(config: ModelConfig) -> tuple[Tensor, Tensor]:
    """cos and sin of each position's angles, (context, 1, head dim); float64 until the end, long contexts need it."""
    width = config.dim // config.heads
    rate = config.rope_theta ** (-torch.arange(0, width, 2, dtype=torch.float64) / width)
    angle = torch.outer(torch.arange(config.context, dtype=torch.float64), rate).repeat(1, 2).unsqueeze(1)
    return angle.cos().float(), angle.sin().float()


def _turn(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate pairs (i, i + half) of the head dimension by their position's angle."""
    a, b = x.chunk(2, dim=-1)
    return x * cos.to(x.dtype) + torch.cat((-b, a), dim=-1) * sin.to(x.dtype)
