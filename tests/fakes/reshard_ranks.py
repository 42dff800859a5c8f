"""What ranks with engines do in the tests of resharding: save in one layout, load and train on in another, and count what they read."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from safetensors.torch import load_file
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from fakes.counted import Counted
from fakes.fsdp_ranks import dump, whole
from stormjib_checkpoint.engine import Engine
from stormjib_checkpoint.errors import CheckpointError
from stormjib_checkpoint.files import Posix
from stormjib_checkpoint.format import ResumePoint
from stormjib_checkpoint.state import collect

if TYPE_CHECKING:
    from collections.abc import Sequence

STEP = 2
ON = 20
"""Steps that are trained in the target layout, and by its control."""
GAP = 16
"""Bytes that are rather read in vain than another request made: as few of these files as of large ones."""
Shape = tuple[int, ...]


class Net(nn.Module):
    """Rows that eight ranks have equal parts of, seven and three have not, and of which some have none."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.up = nn.Linear(64, 128)
        self.down = nn.Linear(128, 64)
        self.scale = nn.Parameter(torch.randn(8, 1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.down(self.up(x).tanh()).reshape(-1, 8) * self.scale.reshape(-1)
        return out


def build(seed: int, shape: Shape) -> tuple[nn.Module, torch.optim.Optimizer]:
    """On a mesh of this shape: FSDP over one dimension, HSDP over two, and over none every rank has the whole."""
    model = Net(seed)
    if shape:
        mesh = init_device_mesh("cpu", shape, mesh_dim_names=("replicate", "shard")[-len(shape) :])
        fully_shard(model, mesh=mesh)
    return model, torch.optim.AdamW(model.parameters(), lr=0.01)


def step(model: nn.Module, optimizer: torch.optim.Optimizer, number: int) -> None:
    """The same data everywhere, others in each step."""
    torch.manual_seed(number)
    model(torch.randn(4, 64)).square().mean().backward()
    optimizer.step()
    optimizer.zero_grad()


def save(rank: int, world: int, shape: Shape, root: str, path: str) -> None:
    """Train and save; the gathered state is in `path`."""
    model, optimizer = build(1, shape)
    engine = Engine(root, memory=node(root, rank))
    for number in range(STEP):
        step(model, optimizer, number)
    leave(engine, rank, model, optimizer, STEP)
    dump(rank, model, optimizer, path)


def leave(engine: Engine, rank: int, model: nn.Module, optimizer: torch.optim.Optimizer, number: int) -> None:
    """Save a step, and wait until it is committed."""
    with torch.no_grad():
        model(torch.zeros(1, 64))  # leaves FSDP2's root unsharded, as an evaluation does
    save = engine.async_save(collect(model, optimizer), step=number, train={"step": number})
    save.upload_completion.result(30)
    assert (save.point is not None) == (rank == 0)
    engine.close()


def node(root: str, number: int) -> str:
    """The memory of a node, of which each rank has its own."""
    return f"{root}-memory/{number}"


def go_on(rank: int, world: int, shape: Shape, root: str, full: str, nodes: Sequence[int], out: str) -> None:
    """Load, with a node's memory for each rank where there is one; compare with the whole state; train on beside a control that was
    made of the whole state; and save once more. Bytes read of the storage's data files go to `out`."""
    model, optimizer = build(2 + rank, shape)
    storage = Counted(root, Posix(), GAP)
    engine = Engine(storage, memory=node(root, nodes[rank]) if nodes else "")
    assert engine.restore(model, optimizer) == {"step": STEP}
    read = storage.bytes_read
    assert_whole(model, optimizer, full)
    twin, control = build(99, shape)
    step(twin, control, 0)  # the optimizer makes its state
    fill(twin, control, full)
    for number in range(STEP, STEP + ON):
        step(model, optimizer, number)
        step(twin, control, number)
    mine, theirs = (locals_of(collect(*one)) for one in ((model, optimizer), (twin, control)))
    assert all(torch.equal(mine[name], theirs[name]) for name in theirs)
    Path(f"{out}-{rank}.json").write_text(json.dumps(read))
    leave(engine, rank, model, optimizer, STEP + ON)
    dump(rank, model, optimizer, f"{out}.safetensors")


def assert_whole(model: nn.Module, optimizer: torch.optim.Optimizer, full: str) -> None:
    """All that ranks have together is the whole state, bit for bit."""
    found, wanted = whole(collect(model, optimizer)), load_file(full)
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)


def fill(model: nn.Module, optimizer: torch.optim.Optimizer, full: str) -> None:
    """Put a whole state into a layout, as torch cuts it."""
    tensors = load_file(full)
    with torch.no_grad():
        for name, value in collect(model, optimizer).items():
            if isinstance(value, DTensor):
                value.copy_(distribute_tensor(tensors[name], value.device_mesh, value.placements))
            elif isinstance(value, torch.Tensor):
                value.copy_(tensors[name])


def locals_of(state: dict[str, Any]) -> dict[str, torch.Tensor]:
    """This rank's parts."""
    tensors = {name: value.detach() for name, value in state.items() if isinstance(value, torch.Tensor)}
    return {name: v.to_local() if isinstance(v, DTensor) else v for name, v in tensors.items()}


def load(rank: int, world: int, shape: Shape, root: str, full: str, nodes: Sequence[int], out: str) -> None:
    """Load and compare, no more."""
    model, optimizer = build(2, shape)
    storage = Counted(root, Posix(), GAP)
    engine = Engine(storage, memory=node(root, nodes[rank]) if nodes else "")
    assert engine.restore(model, optimizer) is not None
    assert_whole(model, optimizer, full)
    Path(f"{out}-{rank}.json").write_text(json.dumps(storage.bytes_read))
    engine.close()


def refused(
    rank: int, world: int, shape: Shape, root: str, point: tuple[int, str, str] | None, out: str
) -> None:
    """What a load of what is damaged tells this rank: of a step that an agent has chosen, or of all there are."""
    with contextlib.suppress(CheckpointError):
        model, optimizer = build(2, shape)
        try:
            if point is None:
                Engine(root).restore(model, optimizer)
            else:
                Engine(root, generation="0.2", resume=ResumePoint(*point)).restore(model, optimizer)
        except CheckpointError as error:
            Path(f"{out}-{rank}.json").write_text(json.dumps([type(error).__name__, str(error)]))
            raise
    dist.barrier()
