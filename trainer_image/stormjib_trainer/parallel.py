"""Process group, mesh and sharding: FSDP2, by the same code on CPU (Gloo) and GPU (NCCL)."""

from __future__ import annotations

import os
from datetime import timedelta
from math import ceil
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import HashStore  # as torch.distributed has it, without the export
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard

from stormjib_health.verdict import OnSpike
from stormjib_trainer.errors import ConfigError

if TYPE_CHECKING:
    from torch import nn

    from stormjib_trainer.config import TrainConfig
    from stormjib_trainer.environment import Environment
    from stormjib_trainer.model import Llama

TIMEOUT = timedelta(minutes=10)
"""Of a collective. A backstop only: whoever watches the ranks from outside sees a hang long before."""


def device_of(config: TrainConfig, env: Environment) -> torch.device:
    """The device of this rank."""
    if config.device == "cuda" or (config.device == "auto" and torch.cuda.is_available()):
        return torch.device("cuda", env.local_rank)
    if config.precision == "bf16":
        raise ConfigError("train.precision = bf16 needs a CUDA device, and there is none; set it to fp32")
    return torch.device("cpu")


def join(device: torch.device, config: TrainConfig, env: Environment) -> None:
    """Prepare the device and meet the other ranks."""
    on_gpu = device.type == "cuda"
    if on_gpu:
        torch.cuda.set_device(device)
        if env.integrity.on_spike is OnSpike.REPLAY or config.reduce == "exact":
            _deterministic()
    else:
        torch.set_num_threads(config.threads or env.omp_threads)
    dist.init_process_group(
        "nccl" if on_gpu else "gloo",
        timeout=TIMEOUT,
        device_id=device if on_gpu else None,
        store=None if env.launched else HashStore(),  # None: where the environment says
        rank=env.rank,
        world_size=env.world,
    )
    dist.all_reduce(torch.zeros(1, device=device))  # connects everybody now, so that what comes later is work


def _deterministic() -> None:
    """The same work gives the same bits, on a GPU too: without that, no replay can tell hardware from data."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True)


def same_everywhere(digest: str, device: torch.device) -> bool:
    """Whether all ranks have this hexadecimal digest."""
    number = int(digest[:15], 16)  # 60 bits: fits a signed 64-bit integer
    ends = torch.tensor([number, -number], device=device)
    dist.all_reduce(ends, dist.ReduceOp.MAX)
    highest, lowest = ends.tolist()
    return bool(highest == -lowest)


def shard(model: Llama, device: torch.device, config: TrainConfig, replicas: int = 1) -> None:
    """Shard over all ranks, or over each of `replicas` equal parts of them, which then hold the same: groups of
    blocks, and the rest (embeddings, last norm) as one more unit."""
    shape = (replicas, dist.get_world_size() // replicas)[replicas == 1 :]
    mesh = init_device_mesh(device.type, shape, mesh_dim_names=("replicate", "shard")[-len(shape) :])
    policy = MixedPrecisionPolicy()
    if config.precision == "bf16":
        policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    for unit in _units(model, config.unit):
        fully_shard(unit, mesh=mesh, mp_policy=policy, reshard_after_forward=True)
    fully_shard(model, mesh=mesh, mp_policy=policy, reshard_after_forward=False)
    for module in model.modules():
        if isinstance(module, FSDPModule):
            _sum_gradients(module)


def _units(model: Llama, least: int) -> list[list[nn.Module]]:
    """Runs of blocks with at least `least` parameters each; none where all blocks together have fewer."""
    blocks = list(model.blocks)
    size = ceil(least / sum(p.numel() for p in blocks[0].parameters()))
    return [blocks[i : i + size] for i in range(0, len(blocks), size)] if size < len(blocks) else []


def _sum_gradients(module: FSDPModule) -> None:
    """Ranks hold uneven parts of a batch, so a mean over ranks would be wrong: the loss is already divided by the
    bytes of the whole batch, and gradients are summed."""
    module.set_gradient_divide_factor(1.0)
    module.set_force_sum_reduction_for_comms(True)


def leave() -> None:
    """End together: a rank that closes its sockets first could break the last collective of a slower one."""
    dist.barrier()
    dist.destroy_process_group()
