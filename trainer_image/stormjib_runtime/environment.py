"""The environment of a rank: torchrun's names, so that a script cannot tell the difference, and ours beside them."""

from __future__ import annotations

import glob
from typing import TYPE_CHECKING

from stormjib_runtime import codec
from stormjib_runtime.wire import Env

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from stormjib_runtime.wire import Generation, ResumePoint

SECRET = (Env.TOKEN, Env.OPERATOR_TOKEN)
"""Never in a rank's environment: scripts print theirs."""


def base_environment(environ: Mapping[str, str]) -> dict[str, str]:
    """What the zygote and every rank get: the agent's own environment, less secrets, plus torchrun's defaults."""
    base = {name: value for name, value in environ.items() if name not in SECRET}
    base.setdefault("OMP_NUM_THREADS", "1")
    base.setdefault("TORCH_NCCL_ASYNC_ERROR_HANDLING", "1")
    # Else torch.cuda.is_available() would make a CUDA context in the zygote, which no fork survives.
    base.setdefault("PYTORCH_NVML_BASED_CUDA_CHECK", "1")
    return base


def rank_environment(
    generation: Generation,
    slot: int,
    local_rank: int,
    store: str,
    resume: ResumePoint | None,
    pages: Path,
    job: str,
) -> dict[str, str]:
    """What one rank gets on top of `base_environment`."""
    node_rank = generation.node_rank(slot)
    if node_rank is None:
        raise ValueError(f"slot {slot} is no member of generation {generation.id}")
    rank = generation.first_rank(node_rank) + local_rank
    host, port = split_address(store)
    return {
        "RANK": str(rank),
        "LOCAL_RANK": str(local_rank),
        "WORLD_SIZE": str(generation.world_size),
        "LOCAL_WORLD_SIZE": str(generation.members[node_rank].processes),
        "GROUP_RANK": str(node_rank),
        "GROUP_WORLD_SIZE": str(len(generation.members)),
        "ROLE_NAME": "default",
        "ROLE_RANK": str(rank),
        "ROLE_WORLD_SIZE": str(generation.world_size),
        "MASTER_ADDR": host,
        "MASTER_PORT": port,
        "TORCHELASTIC_RUN_ID": job,
        "TORCHELASTIC_RESTART_COUNT": str(max(0, generation.id.number - 1)),
        "TORCHELASTIC_MAX_RESTARTS": str(max(0, generation.id.number - 1)),
        "TORCHELASTIC_USE_AGENT_STORE": "True",
        Env.GENERATION.value: str(generation.id),
        Env.REPLICATE.value: str(generation.replicate),
        Env.RESUME.value: "" if resume is None else codec.encode(resume).decode(),
        Env.PAGE_DIR.value: str(pages),
    }


def visible_gpus(environ: Mapping[str, str]) -> int:
    """GPUs that ranks will see. Asks neither torch nor the driver."""
    listed = environ.get("CUDA_VISIBLE_DEVICES")
    if listed is not None:
        return len([device for device in listed.split(",") if device.strip() not in ("", "-1")])
    return len(glob.glob("/dev/nvidia[0-9]*"))


def split_address(address: str) -> tuple[str, str]:
    """`host:port` or `[v6]:port` as (host, port)."""
    host, _, port = address.rpartition(":")
    return host.strip("[]"), port


def join_address(host: str, port: int) -> str:
    """(host, port) as `host:port`, with brackets round an IPv6 address."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
