"""The models and optimizers of the resharding table: as small as they can be while they still have what makes each one hard to cut."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cache, partial
from typing import TYPE_CHECKING, Any, Literal, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from stormjib_checkpoint.state import collect
from stormjib_checkpoint.writer import split

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping


@dataclass(frozen=True)
class Net:
    """What a model is like."""

    style: Literal["gpt", "llama"] = "llama"
    vocab: int = 64
    hidden: int = 16
    heads: int = 8
    kv_heads: int = 2
    ffn: int = 20
    layers: int = 2
    context: int = 8
    tied: bool = False
    qkv: Literal["apart", "grouped"] = "apart"
    """`grouped`: one matrix, and in it the rows of each group of heads together, as Megatron has them."""
    experts: int = 0
    experts_as: Literal["one", "fused", "each"] = "one"
    """[e, f, h], [e * f, h], or a matrix for each."""
    stacked: bool = False
    """All layers in one tensor."""
    lora: bool = False
    dropout: float = 0.0

    @property
    def head(self) -> int:
        """Rows of one head."""
        return self.hidden // self.heads

    @property
    def atoms(self) -> Net:
        """The same model with every tensor by itself: its names are those of the atoms."""
        each = "each" if self.experts_as == "fused" else self.experts_as
        return replace(self, qkv="apart", stacked=False, experts_as=cast("Any", each))


GPT = Net("gpt", tied=True, kv_heads=8)
MOE = Net(experts=8, ffn=6)
MODELS: Mapping[str, Net] = {
    "G": GPT,
    "G-dropout": replace(GPT, dropout=0.1),
    "L": Net(layers=4),
    "L16": Net(layers=16, hidden=8, heads=4, ffn=4, vocab=16),
    "LT": Net(layers=4, tied=True),
    "F": Net(kv_heads=4, qkv="grouped"),
    "M": MOE,
    "M10": replace(MOE, experts=10),
    "M-fused": replace(MOE, experts_as="fused"),
    "V50257": replace(GPT, vocab=50257, hidden=6, heads=3, kv_heads=3, ffn=6, layers=1),
    "V17": replace(GPT, vocab=17, layers=8),
    "X": replace(GPT, hidden=97, heads=1, kv_heads=1, ffn=257, layers=1),
    "S": Net(layers=4, stacked=True),
    "LoRA": Net(lora=True),
}


class Linear(nn.Linear):
    """With an adapter beside it where the model has some: then only that learns."""

    def __init__(self, fan_in: int, fan_out: int, net: Net, *, adapted: bool = False) -> None:
        super().__init__(fan_in, fan_out, bias=net.style == "gpt")
        self.a = self.b = None
        if net.lora and adapted:
            self.a = nn.Parameter(torch.randn(3, fan_in) * 0.1)
            self.b = nn.Parameter(torch.randn(fan_out, 3) * 0.1)

    def forward(self, x: Tensor) -> Tensor:
        y = super().forward(x)
        return y if self.a is None or self.b is None else y + x @ self.a.T @ self.b.T


class Attention(nn.Module):
    """Causal, with fewer key-value heads than query heads."""

    def __init__(self, net: Net) -> None:
        super().__init__()
        self.net = net
        q, kv = net.heads * net.head, net.kv_heads * net.head
        if net.qkv == "grouped":
            self.wqkv = Linear(net.hidden, q + 2 * kv, net)
        else:
            self.wq = Linear(net.hidden, q, net, adapted=True)
            self.wk, self.wv = Linear(net.hidden, kv, net), Linear(net.hidden, kv, net, adapted=True)
        self.wo = Linear(q, net.hidden, net)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (part.transpose(-3, -2) for part in self._heads(x))
        times = self.net.heads // self.net.kv_heads
        k, v = k.repeat_interleave(times, -3), v.repeat_interleave(times, -3)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return cast("Tensor", self.wo(y.transpose(-3, -2).flatten(-2)))

    def _heads(self, x: Tensor) -> tuple[Tensor, ...]:
        """Each (batch, position, head, rows of a head)."""
        net = self.net
        if net.qkv == "grouped":
            grouped = self.wqkv(x).unflatten(-1, (net.kv_heads, -1, net.head))
            q, k, v = grouped.split((net.heads // net.kv_heads, 1, 1), dim=-2)
            return q.flatten(-3, -2), k.squeeze(-2), v.squeeze(-2)
        return tuple(w(x).unflatten(-1, (-1, net.head)) for w in (self.wq, self.wk, self.wv))


class Mlp(nn.Module):
    """GELU with biases, or SwiGLU whose gate and up are one matrix."""

    def __init__(self, net: Net) -> None:
        super().__init__()
        self.gpt = net.style == "gpt"
        if self.gpt:
            self.w1 = Linear(net.hidden, net.ffn, net)
        else:
            self.w13 = Linear(net.hidden, 2 * net.ffn, net)
        self.w2 = Linear(net.ffn, net.hidden, net)

    def forward(self, x: Tensor) -> Tensor:
        if self.gpt:
            return cast("Tensor", self.w2(F.gelu(self.w1(x))))
        gate, up = self.w13(x).chunk(2, -1)
        return cast("Tensor", self.w2(F.silu(gate) * up))


class Expert(nn.Module):
    """A matrix of one expert by itself."""

    def __init__(self, net: Net) -> None:
        super().__init__()
        self.w1 = nn.Parameter(torch.randn(net.ffn, net.hidden) * 0.2)
        self.w2 = nn.Parameter(torch.randn(net.ffn, net.hidden) * 0.2)


class Moe(nn.Module):
    """The two best of some experts, by scores that a bias of the router corrects, and one that is always there."""

    bias: Tensor

    def __init__(self, net: Net) -> None:
        super().__init__()
        self.net, size = net, (net.experts, net.ffn, net.hidden)
        self.router = Linear(net.hidden, net.experts, net)
        self.register_buffer("bias", torch.linspace(-0.1, 0.1, net.experts))
        self.shared = Mlp(net)
        if net.experts_as == "each":
            self.experts = nn.ModuleList(Expert(net) for _ in range(net.experts))
        else:
            flat = size if net.experts_as == "one" else (net.experts * net.ffn, net.hidden)
            self.w1 = nn.Parameter(torch.randn(size).mul(0.2).reshape(flat))
            self.w2 = nn.Parameter(torch.randn(size).mul(0.2).reshape(flat))

    def forward(self, x: Tensor) -> Tensor:
        w1, w2 = self._weights()
        scores = self.router(x).sigmoid()
        best = (scores + self.bias).topk(2, -1).indices
        weight = torch.zeros_like(scores).scatter(-1, best, scores.gather(-1, best))
        inner = F.silu(torch.einsum("...h,efh->...ef", x, w1))
        return cast("Tensor", self.shared(x) + torch.einsum("...ef,efh,...e->...h", inner, w2, weight))

    def _weights(self) -> tuple[Tensor, Tensor]:
        if self.net.experts_as == "each":
            experts = [cast("Expert", expert) for expert in self.experts]
            return torch.stack([one.w1 for one in experts]), torch.stack([one.w2 for one in experts])
        size = (self.net.experts, self.net.ffn, self.net.hidden)
        return self.w1.reshape(size), self.w2.reshape(size)


class Block(nn.Module):
    """One layer."""

    def __init__(self, net: Net) -> None:
        super().__init__()
        self.norm1, self.norm2 = _norm(net), _norm(net)
        self.attn = Attention(net)
        self.mlp = Moe(net) if net.experts else Mlp(net)
        self.dropout = nn.Dropout(net.dropout)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.dropout(self.attn(self.norm1(x)))
        return cast("Tensor", x + self.dropout(self.mlp(self.norm2(x))))


class Transformer(nn.Module):
    """Tokens in, logits of the next one out."""

    def __init__(self, net: Net) -> None:
        super().__init__()
        self.net = net
        self.emb = nn.Embedding(net.vocab, net.hidden)
        self.pos = nn.Embedding(net.context, net.hidden)
        self.layers: nn.Module = (
            _stack([Block(net) for _ in range(net.layers)])
            if net.stacked
            else nn.ModuleList(Block(net) for _ in range(net.layers))
        )
        self.norm = _norm(net)
        self.head = nn.Linear(net.hidden, net.vocab, bias=False)
        if net.tied:
            self.head.weight = self.emb.weight

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.emb(tokens) + self.pos.weight[: tokens.shape[-1]]
        for layer in self._layers():
            x = layer(x)
        return cast("Tensor", self.head(self.norm(x)))

    def _layers(self) -> Iterable[Callable[[Tensor], Tensor]]:
        if not self.net.stacked:
            return cast("nn.ModuleList", self.layers)
        stacked = dict(self.layers.named_parameters())
        slices = [{name: all_[i] for name, all_ in stacked.items()} for i in range(self.net.layers)]
        return [partial(functional_call, self.layers, one) for one in slices]


def _norm(net: Net) -> nn.Module:
    return nn.LayerNorm(net.hidden) if net.style == "gpt" else nn.RMSNorm(net.hidden)


def _stack(blocks: list[Block]) -> Block:
    """One block whose parameters are those of all of them."""
    for name, parameter in list(blocks[0].named_parameters()):
        all_ = torch.stack([block.get_parameter(name).detach() for block in blocks])
        module, _, own = name.rpartition(".")
        setattr(blocks[0].get_submodule(module), own, nn.Parameter(all_))
        assert parameter.shape == all_.shape[1:]
    return blocks[0]


def model_of(net: Net, seed: int = 0) -> Transformer:
    """A new model, always the same."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = Transformer(net)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(not net.lora or name.rpartition(".")[2] in ("a", "b"))
    return model


def loss_of(model: Transformer, step: int, batch: int = 4) -> Tensor:
    """Of the data of a step."""
    generator = torch.Generator().manual_seed(1000 + step)
    net = model.net
    tokens = torch.randint(0, net.vocab, (batch, net.context + 1), generator=generator)
    logits = model(tokens[:, :-1])
    return F.cross_entropy(logits.reshape(-1, net.vocab), tokens[:, 1:].reshape(-1))


# --- optimizers -----------------------------------------------------------------------------------------------------


class Lion(torch.optim.Optimizer):
    """One moment, and the sign of it."""

    def __init__(self, groups: Any) -> None:
        super().__init__(groups, {"lr": 1e-3, "betas": (0.9, 0.99)})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            slow, fast = group["betas"]
            for p in (p for p in group["params"] if p.grad is not None):
                moment = self.state[p].setdefault("exp_avg", torch.zeros_like(p))
                p.sub_(moment.lerp(p.grad, 1 - slow).sign(), alpha=group["lr"])
                moment.lerp_(p.grad, 1 - fast)


class Muon(torch.optim.Optimizer):
    """Of a matrix as a whole; all else has a plain moment."""

    def __init__(self, groups: Any) -> None:
        super().__init__(groups, {"lr": 1e-2, "momentum": 0.9})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for p in (p for p in group["params"] if p.grad is not None):
                key = "momentum_buffer" if p.ndim == 2 else "exp_avg"
                moment = self.state[p].setdefault(key, torch.zeros_like(p))
                moment.mul_(group["momentum"]).add_(p.grad)
                p.sub_(_orthogonal(moment) if p.ndim == 2 else moment, alpha=group["lr"])


def _orthogonal(matrix: Tensor) -> Tensor:
    x = matrix / (matrix.norm() + 1e-7)
    for _ in range(5):
        product = x @ x.T
        x = 3.4445 * x + (-4.7750 * product + 2.0315 * product @ product) @ x
    return cast("Tensor", x)


OPTIMIZERS: Mapping[str, Callable[[Any], torch.optim.Optimizer]] = {
    "adamw": lambda groups: torch.optim.AdamW(groups, lr=1e-3),
    "lion": Lion,
    "sgd": lambda groups: torch.optim.SGD(groups, lr=1e-2, momentum=0.9),
    "adafactor": lambda groups: torch.optim.Adafactor(groups, lr=1e-2),
    "muon": Muon,
}


def optimizer_of(name: str, model: nn.Module) -> torch.optim.Optimizer:
    """With two groups: matrices decay, and the rest does not."""
    learning = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in learning if p.ndim > 1], "weight_decay": 0.1},
        {"params": [p for p in learning if p.ndim < 2], "weight_decay": 0.0},
    ]
    return OPTIMIZERS[name]([group for group in groups if group["params"]])


@cache
def atoms_of(model: str, optimizer: str) -> Mapping[str, tuple[int, ...]]:
    """Every atom of a model that has stepped once, and its shape."""
    atoms = model_of(MODELS[model].atoms)
    stepper = optimizer_of(optimizer, atoms)
    loss_of(atoms, 0).backward()  # type: ignore[no-untyped-call]
    stepper.step()
    return {part.name: part.shape for part in split(collect(atoms, stepper), 0, 1).parts}
