"""The ranks of `bench.health_cost`: the same calls and steps with the probe's hooks on and off, in random turns."""

from __future__ import annotations

import json
import multiprocessing
import os
import random
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from stormjib_health.probe import hooks
from stormjib_health.probe.groups import Watch
from stormjib_health.records.groups import GroupsWriter, groups_path
from stormjib_health.records.ring import Recorder, ring_path
from stormjib_trainer import init, parallel
from stormjib_trainer.config import Config
from stormjib_trainer.model import Llama
from stormjib_trainer.optimizer import Optimizer
from stormjib_trainer.reduction import Fast
from stormjib_trainer.step import Share, agree

if TYPE_CHECKING:
    from collections.abc import Callable

CALLS_PER_STEP = 12


@dataclass
class Times:
    """Nanoseconds or milliseconds with the probe and without."""

    on: list[float] = field(default_factory=list)
    off: list[float] = field(default_factory=list)


class Switch:
    """Puts the probe's hooks on the default group and takes them off."""

    def __init__(self, folder: Path, rank: int) -> None:
        Recorder.create(ring_path(folder, rank)).close()
        self.recorder = Recorder.open(ring_path(folder, rank))
        watch = Watch(self.recorder, GroupsWriter(groups_path(folder, rank)))
        group: Any = dist.group.WORLD
        self._group = group
        self._calls = hooks.calls(watch, group.group_name)
        self._step = 0

    def turn(self, on: bool) -> None:
        """Before a step, which with the hooks on is the next one of the clock."""
        hooks.detach(self._group)
        if on:
            hooks.attach(self._group, self._calls)
            self._step += 1
            self.recorder.finished(self._step)


def tight(switch: Switch, rank: int, number: int) -> Times:
    """ns per 16-byte all_reduce in a loop of nothing else."""
    times, one = Times(), torch.ones(4)
    turns = random.Random(0)
    for _ in range(2 * number // CALLS_PER_STEP):
        on = turns.random() < 0.5
        switch.turn(on)
        for _ in range(CALLS_PER_STEP):
            began = time.perf_counter_ns()
            dist.all_reduce(one)
            (times.on if on else times.off).append(time.perf_counter_ns() - began)
    return times


def inside(switch: Switch, rank: int, number: int) -> Times:
    """The same, each after a piece of forward and backward that leaves nothing of ours in the caches."""
    times, one = Times(), torch.ones(4)
    net = nn.Sequential(nn.Linear(256, 1024), nn.GELU(), nn.Linear(1024, 256))
    data = torch.randn(4, 256)
    turns = random.Random(0)
    for _ in range(2 * number // CALLS_PER_STEP):
        on = turns.random() < 0.5
        switch.turn(on)
        for _ in range(CALLS_PER_STEP):
            net(data).sum().backward()
            began = time.perf_counter_ns()
            dist.all_reduce(one)
            (times.on if on else times.off).append(time.perf_counter_ns() - began)
    return times


def ddp(switch: Switch, rank: int, number: int) -> Times:
    """ms per step of a DDP model with eight buckets."""
    torch.manual_seed(0)
    net = nn.Sequential(*(nn.Linear(256, 256) for _ in range(8)))
    model = DistributedDataParallel(net, bucket_cap_mb=0.2)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    data = torch.randn(64, 256)

    def step() -> None:
        model(data).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()

    return _pairs(switch, step, number)


def demo(switch: Switch, rank: int, number: int) -> Times:
    """ms per step of the demo's model: FSDP2 and the one collective in which all ranks agree."""
    config = Config()
    model = Llama(config.model)
    init.fill(model, 0, config.model.layers)
    parallel.shard(model, torch.device("cpu"), config.train)
    optimizer = Optimizer(model, config.optimizer, config.train.steps)
    share = Share(config.train.lmb, rank, dist.get_world_size())
    windows = torch.randint(0, 256, (share.sequences, config.model.context + 1))
    reduction = Fast(model, share, config.train.batch)
    done = iter(range(1, 1 << 30))

    def step() -> None:
        numbers = reduction.numbers(reduction.backward(windows, None), optimizer.gradients())
        agree(numbers, reduction.read, stop=False, save=False, hold=False, busy=True)
        optimizer.apply(next(done))

    return _pairs(switch, step, number)


def _pairs(switch: Switch, step: Callable[[], None], number: int) -> Times:
    """Pairs of steps, one with the hooks, one without, in random order that is the same on all ranks."""
    times, turns = Times(), random.Random(0)
    for warm in range(10):
        switch.turn(warm % 2 == 0)
        step()
    for _ in range(number):
        first = turns.random() < 0.5
        for on in (first, not first):
            switch.turn(on)
            began = time.perf_counter()
            step()
            (times.on if on else times.off).append(1e3 * (time.perf_counter() - began))
    return times


PARTS: dict[str, Callable[[Switch, int, int], Times]] = {
    "tight": tight,
    "inside": inside,
    "ddp": ddp,
    "demo": demo,
}


def run(part: str, world: int, number: int) -> tuple[Times, int]:
    """A part in `world` processes of one Gloo group. Returns rank 0's times, and its calls per step with hooks."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch._dynamo", "bench.health_ranks"])
    with tempfile.TemporaryDirectory(prefix="stormjib-cost-", dir="/dev/shm") as folder:
        ranks = [
            context.Process(target=_rank, args=(Path(folder), part, rank, world, number))
            for rank in range(world)
        ]
        for process in ranks:
            process.start()
        for process in ranks:
            process.join()
        if any(process.exitcode for process in ranks):
            raise SystemExit(f"bench.health_cost: a rank of {part} has failed")
        result = json.loads((Path(folder) / "times.json").read_text())
    return Times(result["on"], result["off"]), result["calls"]


def _rank(folder: Path, part: str, rank: int, world: int, number: int) -> None:
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder / 'meeting'}", rank=rank, world_size=world)
    switch = Switch(folder, rank)
    times = PARTS[part](switch, rank, number)
    if rank == 0:
        steps = len(times.on) + 5
        calls = round((switch.recorder.words[8] - switch.recorder.step) / steps)
        (folder / "times.json").write_text(json.dumps({"on": times.on, "off": times.off, "calls": calls}))
    dist.destroy_process_group()
