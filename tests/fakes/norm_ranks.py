"""What a rank does in the tests of its own gradient's norm: a small model, data of its own, and the norm without mixing."""

from __future__ import annotations

import copy

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from stormjib_health.probe.numbers import LocalNorm

CPU = torch.device("cpu")


def build() -> nn.Module:
    """The same on every rank."""
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(7, 9), nn.Tanh(), nn.Linear(9, 5))


def data(rank: int, micro: int) -> torch.Tensor:
    """Another one on every rank and in every micro batch."""
    return torch.randn(4, 7, generator=torch.Generator().manual_seed(100 * rank + micro))


def alone(model: nn.Module, rank: int, micros: int) -> float:
    """The norm of this rank's gradient as it is without the others."""
    for micro in range(micros):
        model(data(rank, micro)).square().sum().backward()
    return float(torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]).norm())


def fsdp(rank: int, world: int, shape: tuple[int, ...], micros: int) -> None:
    """Under FSDP2 on this mesh, two steps: the norm is the one that this rank would have alone."""
    model = build()
    wanted = alone(copy.deepcopy(model), rank, micros)
    mesh = init_device_mesh("cpu", shape, mesh_dim_names=("replicate", "shard")[-len(shape) :])
    fully_shard(model[0], mesh=mesh)  # type: ignore[index]
    sharded = fully_shard(model, mesh=mesh)
    norm = LocalNorm(CPU)
    norm.attach(model, {})
    for _ in range(2):
        norm.start()
        for micro in range(micros):
            sharded.set_requires_gradient_sync(micro == micros - 1)
            model(data(rank, micro)).square().sum().backward()
        _compare(norm, wanted, rank, world)
        model.zero_grad()


def ddp(rank: int, world: int) -> None:
    """Under DDP, two steps; and the mixed gradient is what it is without the hook."""
    plain, watched = DistributedDataParallel(build()), DistributedDataParallel(build())
    wanted = alone(build(), rank, 1)
    norm = LocalNorm(CPU)
    norm.attach_ddp(watched)
    for _ in range(2):
        norm.start()
        for model in (plain, watched):
            model.zero_grad()
            model(data(rank, 0)).square().sum().backward()
        _compare(norm, wanted, rank, world)
        for one, other in zip(plain.parameters(), watched.parameters(), strict=True):
            torch.testing.assert_close(one.grad, other.grad)


def _compare(norm: LocalNorm, wanted: float, rank: int, world: int) -> None:
    found = norm.value()
    torch.testing.assert_close(float(found), wanted, rtol=1e-5, atol=0)
    norms = [torch.zeros((), dtype=torch.float64) for _ in range(world)]
    dist.all_gather(norms, found)
    assert len({float(each) for each in norms}) == world, "each rank has a norm of its own"
