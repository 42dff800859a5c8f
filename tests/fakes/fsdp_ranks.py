"""What a rank does in the tests of resharding: a small FSDP2 model whose parts are uneven, and empty on many ranks."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from safetensors.torch import save_file
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from fakes.saving import save_rank
from stormjib_checkpoint.engine import Engine
from stormjib_checkpoint.state import collect, restore
from stormjib_checkpoint.storage import Local


class Net(nn.Module):
    """Rows: 10 (uneven on 3 and 4 ranks), 2 (empty on some of 3 and 4), 1 (empty on all but one), a buffer."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.wide = nn.Linear(6, 10)
        self.narrow = nn.Linear(10, 2)
        self.scale = nn.Parameter(torch.randn(1, 2))
        self.low = nn.Linear(2, 3, dtype=torch.bfloat16)
        self.counter: torch.Tensor
        self.register_buffer("counter", torch.tensor(seed))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.low((self.narrow(self.wide(x)) * self.scale).to(torch.bfloat16))
        return out


def build(seed: int, shape: tuple[int, ...]) -> tuple[Net, torch.optim.Optimizer]:
    """The model on a mesh: one dimension is FSDP, two are HSDP (replicate, shard)."""
    model = Net(seed)
    mesh = init_device_mesh("cpu", shape, mesh_dim_names=("replicate", "shard")[-len(shape) :])
    fully_shard(model.wide, mesh=mesh)
    fully_shard(model.low, mesh=mesh)
    fully_shard(model, mesh=mesh)
    groups: list[dict[str, Any]] = [
        {"params": [p for p in model.parameters() if p.shape[0] != 1]},
        {"params": [p for p in model.parameters() if p.shape[0] == 1], "lr": 0.5},
    ]
    optimizer = torch.optim.AdamW(groups, lr=0.01)
    return model, optimizer


def step(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """One step on the same data everywhere, so that the mean over ranks is that of one rank."""
    torch.manual_seed(5)
    model(torch.randn(4, 6)).float().square().sum().backward()
    optimizer.step()
    optimizer.zero_grad()


def whole(state: dict[str, Any]) -> dict[str, torch.Tensor]:
    """Every tensor gathered."""
    tensors = {name: value.detach() for name, value in state.items() if isinstance(value, torch.Tensor)}
    return {name: (v.full_tensor() if isinstance(v, DTensor) else v).clone() for name, v in tensors.items()}


def dump(rank: int, model: nn.Module, optimizer: torch.optim.Optimizer, path: str) -> None:
    """The gathered state as one file, for comparing."""
    tensors = whole(collect(model, optimizer))
    if rank == 0:
        save_file(tensors, path)


def save(rank: int, world: int, shape: tuple[int, ...], root: str, generation: str, path: str) -> None:
    """Train two steps, leave this rank's part, and the gathered state beside it."""
    model, optimizer = build(1, shape)
    step(model, optimizer)
    step(model, optimizer)
    leave(rank, world, model, optimizer, root, generation, path)


def leave(
    rank: int,
    world: int,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    root: str,
    generation: str,
    path: str,
) -> None:
    """Leave this rank's part of step 2, and the gathered state in `path`."""
    with torch.no_grad():
        model(torch.randn(1, 6))  # leaves FSDP2's root unsharded, as an evaluation does
    save_rank(
        Local(root),
        step=2,
        generation=generation,
        rank=rank,
        world=world,
        state=collect(model, optimizer),
        train={"step": 2},
        samples={1: [rank], 2: [world + rank]},
    )
    dump(rank, model, optimizer, path)


def load(
    rank: int, world: int, shape: tuple[int, ...], root: str, point: tuple[int, str, str], path: str
) -> None:
    """Load into another model, and gather it."""
    model, optimizer = build(2, shape)
    assert restore(Local(root), point, model, optimizer) == {"step": 2}
    dump(rank, model, optimizer, path)
    step(model, optimizer)
    assert dist.get_world_size() == world


def load_and_save(
    rank: int,
    world: int,
    shape: tuple[int, ...],
    root: str,
    point: tuple[int, str, str],
    other: str,
    path: str,
) -> None:
    """Load from one root, and leave the same state in another."""
    model, optimizer = build(2, shape)
    restore(Local(root), point, model, optimizer)
    leave(rank, world, model, optimizer, other, "0.1", path)


def engine_save(rank: int, world: int, shape: tuple[int, ...], root: str, path: str) -> None:
    """Save step 2 by an engine and train on at once; the gathered state of step 2 is in `path`."""
    model, optimizer = build(1, shape)
    engine = Engine(root)
    engine.prepare(model, optimizer)
    step(model, optimizer)
    for number in (2, 3):
        step(model, optimizer)
        if number == 2:
            dump(rank, model, optimizer, path)
        newest = engine.async_save(collect(model, optimizer), step=number, train={"step": number})
        if number == 2:
            first = newest
    for _ in range(3):
        step(model, optimizer)
    for one in (first, newest):
        one.upload_completion.result(20)
        assert (one.point is not None) == (rank == 0), "rank 0 commits"
    assert engine.generation == "0.1"
    engine.close()


def engine_restore(rank: int, world: int, shape: tuple[int, ...], root: str, path: str) -> None:
    """The newest step is damaged: all ranks take the one before."""
    model, optimizer = build(2, shape)
    engine = Engine(root)
    assert engine.restore(model, optimizer) == {"step": 2}
    assert engine.generation == "0.3"
    dump(rank, model, optimizer, path)
    engine.close()
