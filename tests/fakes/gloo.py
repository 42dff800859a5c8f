"""Ranks over Gloo, forked from one warm process that has imported torch once: a world starts in milliseconds."""

from __future__ import annotations

import multiprocessing
import multiprocessing.connection
import os
import secrets
import time
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from multiprocessing.process import BaseProcess
    from pathlib import Path

WAIT_S = 50.0


def run(world: int, folder: Path, body: Callable[..., None], *arguments: Any) -> None:
    """Run `body(rank, world, *arguments)` in `world` processes of one Gloo group; all must end well.

    `body` is a function of an importable module, because the warm process finds it by name.
    """
    context = multiprocessing.get_context("forkserver")
    # FSDP2 imports dynamo in its first step: 0.8 CPU-seconds that no rank needs to pay.
    context.set_forkserver_preload(["torch._dynamo", "fakes.fsdp_ranks", "fakes.reshard_ranks"])
    meeting = folder / f"meeting-{secrets.token_hex(4)}"
    ranks = [
        context.Process(target=_rank, args=(rank, world, str(meeting), body, arguments))
        for rank in range(world)
    ]
    for process in ranks:
        process.start()
    try:
        _wait(ranks)
        assert [process.exitcode for process in ranks] == [0] * world
    finally:
        for process in ranks:
            process.kill()
            process.join()


def _wait(ranks: Sequence[BaseProcess]) -> None:
    """Until all have ended, or one has ended badly: the others would wait for it in a collective."""
    deadline = time.monotonic() + WAIT_S
    while any(process.is_alive() for process in ranks) and time.monotonic() < deadline:
        multiprocessing.connection.wait([p.sentinel for p in ranks if p.is_alive()], timeout=WAIT_S)
        if any(process.exitcode for process in ranks):
            return


def _rank(rank: int, world: int, meeting: str, body: Callable[..., None], arguments: tuple[Any, ...]) -> None:
    import torch
    import torch.distributed as dist

    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=world)
    try:
        body(rank, world, *arguments)
    finally:
        dist.destroy_process_group()
