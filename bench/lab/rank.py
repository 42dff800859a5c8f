"""A rank of the laboratory: computes by a timed sleep and a tiny real operation, and speaks plain collectives.

Runs under an agent or under stock torchrun. What a step is like stands in `plan.json` of the control folder. The sleep is cut into
pieces of 2 ms, so that a process that is stopped for a while is late by that while.
"""

from __future__ import annotations

import json
import os
import struct
import sys
import time
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist

from stormjib_fault.rank import Obedient
from stormjib_health.probe import enter
from stormjib_health.wire import Phase
from stormjib_runtime.page import Page
from stormjib_runtime.wire import RankPhase

if TYPE_CHECKING:
    from collections.abc import Callable

PIECE_S, LATE_S = 0.002, 0.005
TRACE = struct.Struct("<dff")
"""End of a step (CLOCK_MONOTONIC), its duration, the rank's own work in it; seconds."""
BUCKETS = 3
GLOO_TIMEOUT = timedelta(seconds=1800)  # torch's own default, so that nothing of ours speaks first

folder = Path(sys.argv[1])
plan = json.loads((folder / "plan.json").read_text())
page = Page.from_env()
if page is not None:
    page.owns_clock = True
dist.init_process_group("gloo", timeout=GLOO_TIMEOUT)
rank, world = dist.get_rank(), dist.get_world_size()


def phase(name: str) -> None:
    """Say what is being done, on the page and in the records. torch compiles inside what a page calls a step."""
    if page is not None and name in list(RankPhase):
        page.phase = RankPhase(name)
    enter(Phase[name.upper()])


faults = Obedient(folder, rank, phase)
torch.manual_seed(0)
parameter = torch.randn(1 << 16)
gradient = torch.empty_like(parameter)
buckets = [torch.ones(plan["floats"] // BUCKETS) for _ in range(BUCKETS)]
loss = torch.zeros(64)
square = torch.randn(64, 64)
waited = 0.0
issued = 0


def compute(seconds: float) -> None:
    """The rank's own work. A busy machine wakes a sleeper late, which is no fault; a stop of 5 ms or more is one."""
    torch.mm(square, square)
    left = seconds
    while left > 0:
        began = time.monotonic()
        time.sleep(min(PIECE_S, left))
        took = time.monotonic() - began
        left -= took if took < LATE_S else PIECE_S


def collective(call: Callable[..., dist.Work | None], tensor: torch.Tensor) -> None:
    """One collective, with whatever the laboratory ordered about it."""
    global waited, issued
    index, issued = issued, issued + 1
    act = faults.before(index)
    if act == "skip":
        return
    if act == "resize":
        tensor = torch.ones(tensor.numel() + 64)
    began = time.monotonic()
    if faults.stops_inside():
        work = call(tensor, async_op=True)
        faults.after(index)
        if work is not None:
            work.wait()
    else:
        call(tensor)
    waited += time.monotonic() - began


def data_parallel() -> None:
    """Buckets of gradients, then the loss."""
    for bucket in buckets:
        collective(dist.all_reduce, bucket)
    collective(dist.all_reduce, gradient)
    collective(dist.all_reduce, loss)


def gather(whole: torch.Tensor, async_op: bool = False) -> dist.Work | None:
    """Every rank's part of a tensor to every rank."""
    return dist.all_gather_into_tensor(whole, whole[: whole.numel() // world].clone(), async_op=async_op)


def scatter(part: torch.Tensor, async_op: bool = False) -> dist.Work | None:
    """The sum of all ranks' tensors, a part to each rank."""
    return dist.reduce_scatter_tensor(part, torch.ones(part.numel() * world), async_op=async_op)


def sharded() -> None:
    """As FSDP: parameters are gathered, gradients are scattered."""
    for bucket in buckets:
        part = bucket.numel() // world
        collective(gather, bucket[: part * world])
        collective(scatter, torch.empty(part))
    collective(dist.all_reduce, gradient)
    collective(dist.all_reduce, loss)


def receive(tensor: torch.Tensor, async_op: bool = False) -> dist.Work | None:
    """From the stage before."""
    if async_op:
        return dist.irecv(tensor, rank - 1)
    dist.recv(tensor, rank - 1)
    return None


def send(tensor: torch.Tensor, async_op: bool = False) -> dist.Work | None:
    """To the stage after."""
    if async_op:
        return dist.isend(tensor, rank + 1)
    dist.send(tensor, rank + 1)
    return None


def pipeline() -> None:
    """Activations go from rank to rank, then all agree on the loss. The gradient is each stage's own."""
    for bucket in buckets:
        if rank > 0:
            collective(receive, bucket)
        if rank < world - 1:
            collective(send, bucket)
    collective(dist.all_reduce, gradient)
    collective(dist.all_reduce, loss)


PATTERNS = {"dp": data_parallel, "fsdp": sharded, "pp": pipeline}


def step() -> None:
    """One training step: replicas compute equal gradients of equal data, so that they stay equal bit for bit."""
    global issued
    issued = 0
    compute(plan["compute_s"])
    gradient.copy_(parameter).mul_(1e-3)
    faults.change("gradient", gradient.data_ptr(), gradient.nbytes)
    PATTERNS[plan["pattern"]]()
    parameter.sub_(gradient, alpha=0.01 / world)
    faults.change("parameter", parameter.data_ptr(), parameter.nbytes)


def main() -> None:
    """Step until somebody ends this process."""
    global waited
    trace = os.open(
        folder / f"trace-{os.getpid()}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600
    )
    number = 0
    while True:
        number += 1
        began, waited = time.monotonic(), 0.0
        phase(RankPhase.STEP)
        faults.step(number)
        step()
        ended = time.monotonic()
        os.write(trace, TRACE.pack(ended, ended - began, ended - began - waited))
        if page is not None:
            page.step = number


main()
