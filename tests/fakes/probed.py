"""What a rank does in the tests of the probe: calls of every sort, counted by torch's profiler beside the records.

The profiler sees c10d's operators in the dispatcher, the probe is told by hooks of the group: neither knows of the other.
"""

from __future__ import annotations

import gc
import json
import os
import time
import weakref
from collections import Counter
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
import torch.distributed._functional_collectives as funcol
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.pipelining import PipelineStage, Schedule1F1B
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.nn.parallel import DistributedDataParallel
from torch.profiler import ProfilerActivity, profile
from torch.utils.data import DataLoader

from stormjib_health import probe
from stormjib_health.probe import hooks
from stormjib_health.probe.install import install
from stormjib_health.records.groups import GroupsReader, groups_path
from stormjib_health.records.layout import CallRecord, PhaseRecord, StepRecord
from stormjib_health.records.ring import Reader, Recorder, ring_path
from stormjib_health.wire import Kind, Phase

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from stormjib_health.records.layout import Record
    from stormjib_health.wire import Group

OPERATORS = {
    "allreduce": Kind.ALL_REDUCE,
    "allgather": Kind.ALL_GATHER,
    "reduce_scatter": Kind.REDUCE_SCATTER,
    "broadcast": Kind.BROADCAST,
    "reduce": Kind.REDUCE,
    "gather": Kind.GATHER,
    "scatter": Kind.SCATTER,
    "alltoall": Kind.ALL_TO_ALL,
    "barrier": Kind.BARRIER,
    "send": Kind.SEND,
    "recv": Kind.RECV,
}
"""Beginning of a c10d operator's name -> kind; the longest that fits."""


class Rank:
    """A rank with the probe, and the agent's side of its records."""

    def __init__(self, folder: Path, number: int) -> None:
        Recorder.create(ring_path(folder, number)).close()
        self.recorder = install(folder, number)
        self._reader = Reader.open(ring_path(folder, number))
        self._groups = GroupsReader(groups_path(folder, number))
        self.records: list[Record] = []
        self.ended: list[CallRecord] = []
        self.lost = 0

    def read(self) -> None:
        """Take what is new."""
        batch = self._reader.read()
        self.records += batch.records
        self.ended += batch.ended
        self.lost += batch.lost
        self._groups.read()

    def group(self, call: CallRecord) -> Group:
        group = self._groups.group(call.group)
        assert group is not None
        return group

    @property
    def calls(self) -> list[CallRecord]:
        self.read()
        return [record for record in self.records if isinstance(record, CallRecord)]

    def counts(self) -> Counter[Kind]:
        """Recorded so far, of each kind; the numbers of every group have no gap."""
        numbers: dict[tuple[int, str], list[int]] = {}
        for call in self.calls:
            sort = call.kind.name if call.kind.point_to_point else "collective"
            numbers.setdefault((call.group, sort), []).append(call.number)
        assert all(seen == list(range(1, len(seen) + 1)) for seen in numbers.values())
        assert self.lost == 0
        return Counter(call.kind for call in self.calls)


def witnessed(run: Callable[[], None]) -> Counter[Kind]:
    """Run it, and count c10d's operators of each kind by torch's profiler."""
    with profile(activities=[ProfilerActivity.CPU]) as seen:
        run()
    names = [event.name.removeprefix("c10d::") for event in seen.events() if event.name.startswith("c10d::")]
    return Counter(_kind(name.strip("_")) for name in names)


def _kind(name: str) -> Kind:
    fits = [operator for operator in OPERATORS if name.startswith(operator)]
    return OPERATORS[max(fits, key=len)]


def counted(rank: int, world: int, folder: Path, scenario: str) -> None:
    """A scenario by its name: its records are what the profiler has seen; what was counted goes to a file."""
    me = Rank(folder, rank)
    run = SCENARIOS[scenario](rank, world)
    before = me.counts()
    seen = witnessed(run)
    recorded = me.counts() - before
    assert recorded == seen, f"recorded {recorded}, seen {seen}"
    groups: dict[str, dict[str, int]] = {}
    for call in me.calls:
        kinds = groups.setdefault(str(me.group(call).key), {})
        kinds[call.kind.name] = kinds.get(call.kind.name, 0) + 1
    assert {call.peer for call in me.calls if call.kind.point_to_point} <= {1 - rank}
    names = {me.group(call).name for call in me.calls}
    phases = {record.phase.name for record in me.records if isinstance(record, PhaseRecord)}
    result = {
        "kinds": {kind.name: n for kind, n in recorded.items()},
        "groups": groups,
        "names": sorted(names),
    }
    (folder / f"{rank}.json").write_text(json.dumps({**result, "phases": sorted(phases)}))


def plain(rank: int, world: int) -> Callable[[], None]:
    """The functions of torch.distributed, each of them."""

    def run() -> None:
        one, all_ = torch.ones(4), [torch.empty(4) for _ in range(world)]
        flat = torch.empty(4 * world)
        dist.all_reduce(one)
        dist.all_reduce(one, async_op=True).wait()
        dist.broadcast(one, 0)
        dist.reduce(one, 0)
        dist.all_gather(all_, one)
        dist.all_gather_into_tensor(flat, one)
        dist.reduce_scatter_tensor(one, flat)
        dist.gather(one, all_ if rank == 0 else None, 0)
        dist.scatter(one, all_ if rank == 0 else None, 0)
        dist.all_to_all_single(flat, flat.clone())
        dist.barrier()
        objects: list[Any] = [None] * world
        dist.all_gather_object(objects, {"rank": rank})
        dist.broadcast_object_list(objects, 0)
        peer = 1 - rank
        (dist.send if rank == 0 else dist.recv)(one, peer)
        sends = [dist.P2POp(dist.isend, one, peer), dist.P2POp(dist.irecv, torch.empty(4), peer)]
        for work in dist.batch_isend_irecv(sends):
            work.wait()

    return run


def _train(model: nn.Module, inputs: torch.Tensor, steps: int = 3) -> Callable[[], None]:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)

    def run() -> None:
        for _ in range(steps):
            model(inputs).sum().backward()
            optimizer.step()
            optimizer.zero_grad()

    return run


def _net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 8))


def ddp(rank: int, world: int) -> Callable[[], None]:
    """Calls come from the reducer, in C++, on the thread of the backward."""
    return _train(DistributedDataParallel(_net(), bucket_cap_mb=0.0005), torch.ones(2, 8))


def fsdp(rank: int, world: int) -> Callable[[], None]:
    """FSDP2, each layer for itself, and the norm of a sharded gradient."""
    model = _net()
    mesh = init_device_mesh("cpu", (world,))
    for layer in (model[0], model[2], model):
        fully_shard(layer, mesh=mesh)
    run = _train(model, torch.ones(2, 8))

    def clipped() -> None:
        run()
        model(torch.ones(2, 8)).sum().backward()
        norm: Any = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        norm.full_tensor()

    return clipped


def tensor_parallel(rank: int, world: int) -> Callable[[], None]:
    """DTensor's redistributions, on a mesh of two dimensions of which one has a single rank."""
    mesh = init_device_mesh("cpu", (1, world), mesh_dim_names=("data", "tensor"))
    plan = {"0": ColwiseParallel(), "2": RowwiseParallel()}
    return _train(parallelize_module(_net(), mesh["tensor"], plan), torch.ones(2, 8))


def pipeline(rank: int, world: int) -> Callable[[], None]:
    """1F1B over two stages: sends and receives only, and other ones on each rank."""
    net = _net()
    part = net[0] if rank == 0 else nn.Sequential(net[1], net[2])
    stage = PipelineStage(part, rank, world, torch.device("cpu"))
    schedule = Schedule1F1B(stage, n_microbatches=4, loss_fn=nn.functional.mse_loss)

    def run() -> None:
        for _ in range(2):
            if rank == 0:
                schedule.step(torch.ones(8, 8))
            else:
                schedule.step(target=torch.zeros(8, 8))

    return run


def functional(rank: int, world: int) -> Callable[[], None]:
    """Collectives that return tensors, as DTensor and compiled code call them."""

    def run() -> None:
        world_group: Any = dist.group.WORLD
        total = funcol.all_reduce(torch.ones(4), "sum", world_group)
        parts = funcol.all_gather_tensor(total, 0, world_group)
        funcol.reduce_scatter_tensor(parts, "sum", 0, world_group).sum().item()

    return run


def compiled(rank: int, world: int) -> Callable[[], None]:
    """A compiled function that reduces; it is compiled at its first call, in front of the profiler."""

    whole: Any = dist.group.WORLD

    def double(x: Any) -> Any:
        return funcol.all_reduce(x * 2, "sum", whole) + 1

    fast = torch.compile(double, backend="aot_eager", fullgraph=True)

    def run() -> None:
        for _ in range(3):
            fast(torch.ones(4)).sum().item()

    return run


def later(rank: int, world: int) -> Callable[[], None]:
    """Groups that are made in the middle: of some ranks, of one rank, split, destroyed, and made anew."""

    def run() -> None:
        both: Any = dist.new_group([0, 1])
        alone: Any = dist.new_group([0])
        dist.all_reduce(torch.ones(1), group=both)
        if rank == 0:
            dist.all_reduce(torch.ones(1), group=alone)
        own: Any = dist.new_group([rank], use_local_synchronization=True, group_desc="own")
        dist.barrier(own)
        split: Any = dist.split_group(split_ranks=[[0, 1]], group_desc="split")
        dist.all_reduce(torch.ones(1), group=split)
        dist.destroy_process_group(both)
        again: Any = dist.new_group([0, 1])
        dist.all_reduce(torch.ones(1), group=again)

    return run


SCENARIOS: dict[str, Callable[[int, int], Callable[[], None]]] = {
    function.__name__: function
    for function in (plain, ddp, fsdp, tensor_parallel, pipeline, functional, compiled, later)
}


# --- what is no matter of counting ------------------------------------------------------------------------------------


def wrapped(rank: int, world: int, folder: Path) -> None:
    """As with a torch whose groups have no hooks: the plain functions and FSDP2 are seen all the same, but not the
    functional collective in which DTensor sums the norm."""
    hooks.available = lambda: False
    me = Rank(folder, rank)
    for run, unseen in ((plain(rank, world), 0), (fsdp(rank, world), 1)):
        before = me.counts()
        seen = witnessed(run)
        recorded = me.counts() - before
        assert recorded + Counter({Kind.ALL_REDUCE: unseen}) == seen, f"recorded {recorded}, seen {seen}"
    peers = {call.peer for call in me.calls if call.kind.point_to_point}
    assert peers == {1 - rank}
    assert all(call.bytes > 0 for call in me.calls if call.signature and call.kind is not Kind.BARRIER)


def steps(rank: int, world: int, folder: Path) -> None:
    """70 steps of four collectives: what is read of them, what is timed, and who waits for whom."""
    me = Rank(folder, rank)
    slow = 1
    for step in range(1, 71):
        one = torch.ones(4)
        dist.all_reduce(one)
        dist.reduce_scatter_tensor(torch.ones(2), one)
        if rank == slow:
            time.sleep(0.005)
        dist.all_reduce(one)
        dist.all_gather_into_tensor(torch.ones(8), one)
        me.recorder.finished(step)
    dist.barrier()
    me.read()
    calls = me.calls
    read = sorted({call.step for call in calls if call.signature})
    assert read == [-1, 1, 32, 64], read
    assert {call.bytes for call in calls if call.signature} == {16, 32}
    timed = {call.position for call in me.ended}
    assert timed == {0, 2, 3}, timed
    assert len(me.ended) == 3 * 69
    assert all(call.kind in (Kind.ALL_REDUCE, Kind.ALL_GATHER) for call in me.ended)
    finished = [record for record in me.records if isinstance(record, StepRecord)]
    assert [record.step for record in finished] == list(range(1, 71))
    assert all(record.calls == 4 and record.duration_ns > 5e6 for record in finished[1:])
    waits = {call.number: (call.done_ns - call.issued_ns) / 1e9 for call in me.ended if call.position == 2}
    (folder / f"{rank}.json").write_text(json.dumps({"waits": waits, "signatures": _signatures(calls)}))


def _signatures(calls: list[CallRecord]) -> dict[int, int]:
    return {call.number: call.signature for call in calls if call.signature}


def phases(rank: int, world: int, folder: Path) -> None:
    """What torch shows, and what a script says, nested; a loader's worker is a fork, and leaves nothing."""
    me = Rank(folder, rank)
    model = _net()
    optimizer = torch.optim.SGD(model.parameters())
    data: Any = [torch.ones(8)] * 2
    for batch in DataLoader(data, num_workers=1, multiprocessing_context="fork"):
        model(batch).sum().backward()
        optimizer.step()
    with probe.phase(Phase.EVALUATION), probe.phase(Phase.CHECKPOINT):
        pass
    me.read()
    seen = [record.phase for record in me.records if isinstance(record, PhaseRecord)]
    loop = [Phase.DATA, Phase.STEP, Phase.OPTIMIZER, Phase.STEP]
    start = [Phase.START, Phase.DATA, Phase.START, Phase.OPTIMIZER, Phase.STEP]
    nested = [Phase.EVALUATION, Phase.CHECKPOINT, Phase.EVALUATION, Phase.STEP]
    assert seen == [*start, *loop, Phase.DATA, Phase.STEP, *nested], seen


def harmless(rank: int, world: int, folder: Path) -> None:
    """A probe that fails stops no call, and keeps no group alive."""
    me = Rank(folder, rank)
    threads = len(os.listdir("/proc/self/task"))
    group: Any = dist.new_group([0, 1])
    dist.all_reduce(torch.ones(1), group=group)
    me.read()
    gone = weakref.ref(group)
    dist.destroy_process_group(group)
    del group
    gc.collect()
    assert gone() is None
    assert len(os.listdir("/proc/self/task")) == threads
    other: Any = dist.new_group([0, 1])
    me.recorder.memory = memoryview(b"")  # type: ignore[assignment]  # whatever is wrong with it
    one = torch.ones(1)
    for _ in range(3):
        dist.all_reduce(one, group=other)
        dist.all_reduce(one)
    assert one.item() == 2.0**6


def device(rank: int, world: int, folder: Path) -> None:
    """On NCCL: start and end come from events of the device, and a capture is left alone."""
    me = Rank(folder, rank)
    torch.cuda.set_device(0)
    group: Any = dist.new_group([0], backend="nccl")
    one = torch.ones(1 << 20, device="cuda")
    for step in range(1, 6):
        dist.all_reduce(one, group=group)
        dist.all_reduce(one, group=group)
        torch.cuda.synchronize()
        me.recorder.finished(step)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        dist.all_reduce(one, group=group)
    me.read()
    assert len(me.ended) >= 6
    assert all(call.issued_ns <= call.started_ns <= call.done_ns for call in me.ended)
    assert all(call.done_ns - call.started_ns < 1e9 for call in me.ended)
    assert me.calls[-1].step == 5
    assert not me.calls[-1].pending
    graph.reset()
