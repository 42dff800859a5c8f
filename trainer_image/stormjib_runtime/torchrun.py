"""`launcher.kind: Torchrun`: the command line of a stock torchrun with settings that survive faults.

Its store is ours and outside every agent's torchrun, so any node may die; the shared second store is off, because
restarted workers would read the dead ones' addresses from it.
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

from stormjib_runtime.wire import Env

if TYPE_CHECKING:
    from collections.abc import Sequence

    from stormjib_runtime.wire import Generation

# A lost torchrun is noticed by its agent, so the keep-alive only has to be shorter than torchrun's default 15 + 30 s.
_RENDEZVOUS = (
    "is_host=false,keep_alive_interval=2,keep_alive_max_attempt=2,last_call_timeout=1,join_timeout=600"
)


def argv(
    generation: Generation, slot: int, job_uid: str, store: str, max_restarts: int, words: Sequence[str]
) -> list[str]:
    """The command that runs one node's torchrun of this generation."""
    nodes = len(generation.members)
    me = generation.members[generation.node_rank(slot) or 0]
    return [
        sys.executable,
        "-m",
        "torch.distributed.run",
        f"--nnodes={nodes}",
        f"--nproc-per-node={me.processes}",
        "--rdzv-backend=c10d",
        f"--rdzv-endpoint={store}",
        f"--rdzv-id={job_uid}-{generation.id}",
        f"--rdzv-conf={_RENDEZVOUS}",
        f"--local-addr={me.address}",  # else torchrun asks DNS for the name of its own host
        f"--max-restarts={max_restarts}",
        *words,
    ]


def environment(generation: Generation) -> dict[str, str]:
    """What torchrun, and with it every rank, gets on top of the base."""
    return {
        "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1",
        Env.REPLICATE.value: str(generation.replicate),
    }
