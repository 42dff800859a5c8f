"""What a rank of `bench.reshard` does, in a process of a Gloo group: it makes its part of a model's state, saves it, or loads it and says
how long that took, what it read, and how much memory it took beside the state."""

from __future__ import annotations

import gc
import json
import os
import shutil
import time
from itertools import starmap
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple
from unittest import mock

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard

from stormjib_checkpoint import digest, loading, reader
from stormjib_checkpoint.boxes import Box, part, whole
from stormjib_checkpoint.engine import Engine
from stormjib_checkpoint.engine.group import World
from stormjib_checkpoint.history import newest
from stormjib_checkpoint.storage import Local
from stormjib_checkpoint.tensors import memory

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

Shapes = dict[str, tuple[int, ...]]
State = dict[str, DTensor]


class Cut(NamedTuple):
    """How ranks hold a state: sizes of the mesh's dimensions, and what each does: a number of a tensor's dimension that it cuts, or None.

    Tensors of one dimension are cut in it, or are on every rank where the mesh only cuts columns.
    """

    mesh: tuple[int, ...]
    dims: tuple[int | None, ...]

    @property
    def world(self) -> int:
        return int(torch.tensor(self.mesh).prod())

    def box(self, shape: tuple[int, ...], coordinate: Sequence[int]) -> Box:
        """The box at a coordinate of the mesh."""
        box = whole(shape)
        for size, dim, index in zip(self.mesh, self._of(shape), coordinate, strict=True):
            if dim is not None:
                box = part(box, dim, size, index)
        return box

    def placements(self, shape: tuple[int, ...]) -> list[Shard | Replicate]:
        """As DTensor names them."""
        return [Replicate() if dim is None else Shard(dim) for dim in self._of(shape)]

    def _of(self, shape: tuple[int, ...]) -> list[int | None]:
        return [dim if dim is not None and dim < len(shape) else None for dim in self.dims]


def made(cut: Cut, shapes: Shapes, *, filled: bool) -> State:
    """This rank's state. An element's value follows from its place in the whole."""
    mesh = init_device_mesh("cpu", cut.mesh)
    coordinate = mesh.get_coordinate()
    assert coordinate is not None
    found: State = {}
    for number, (name, shape) in enumerate(shapes.items()):
        box = cut.box(shape, coordinate)
        local = values(shape, box, number) if filled else torch.full(box.shape, -1.0)
        stride = torch.empty(shape, device="meta").stride()
        found[name] = DTensor.from_local(
            local, mesh, cut.placements(shape), run_check=False, shape=torch.Size(shape), stride=stride
        )
    return found


def values(shape: tuple[int, ...], box: Box, number: int) -> torch.Tensor:
    """Of a box: whole numbers, which fp32 holds exactly."""
    index = torch.zeros((), dtype=torch.int64)
    for length, offset, size in zip(shape, box.offset, box.shape, strict=True):
        index = index.unsqueeze(-1) * length + torch.arange(offset, offset + size)
    return ((index * 7919 + number * 31) % 16_000_057).float()


def check(cut: Cut, shapes: Shapes, state: State) -> None:
    """Whether what was loaded is what was saved."""
    mesh = next(iter(state.values())).device_mesh
    for number, (name, shape) in enumerate(shapes.items()):
        box = cut.box(shape, mesh.get_coordinate() or ())
        assert torch.equal(state[name].to_local(), values(shape, box, number)), name


# --- savers ---------------------------------------------------------------------------------------------------------


def save(rank: int, cut: Cut, shapes: Shapes, root: str, how: str) -> None:
    """Leave the state in `root`, as each subject stores it."""
    state = made(cut, shapes, filled=True)
    if how == "stormjib":
        engine = Engine(root)
        engine.reserve(state)
        engine.async_save(state, step=1)
        engine.wait()
        dist.barrier()
        engine.close()
    elif how == "dcp":
        dcp.state_dict_saver.save(state, storage_writer=dcp.filesystem.FileSystemWriter(root))
    else:
        Path(root).mkdir(parents=True, exist_ok=True)
        torch.save({name: value.to_local().clone() for name, value in state.items()}, f"{root}/{rank}.pt")


# --- loaders --------------------------------------------------------------------------------------------------------


def ours(cut: Cut, shapes: Shapes, root: str, source: Cut, state: State) -> None:
    storage = Local(root)
    point = newest(storage)
    assert point is not None
    reader.load(storage, point, dict(state), group=World())


def without_digests(cut: Cut, shapes: Shapes, root: str, source: Cut, state: State) -> None:
    """Ours, with its proof taken out: there is no such option."""
    with (
        mock.patch.object(digest, "partial", return_value=0),
        mock.patch.object(loading, "unproved", return_value=[]),
    ):
        ours(cut, shapes, root, source, state)


def bare(cut: Cut, shapes: Shapes, root: str, source: Cut, state: State) -> None:
    """As many bytes of the same files as this rank has, one after the other, to where they belong in memory: nothing can be plainer."""
    files = sorted(Path(root).rglob("*.safetensors"))
    total, world, rank = sum(f.stat().st_size for f in files), dist.get_world_size(), dist.get_rank()
    at, end = total * rank // world, total * (rank + 1) // world
    rooms = [memory(value.to_local()) for value in state.values() if value.to_local().numel()]
    spots = ((room, i) for room in rooms for i in range(0, len(room), 16 << 20))
    begin = 0
    for path in files:
        size = path.stat().st_size
        with open(path, "rb", buffering=0) as file:
            while at < min(end, begin + size):
                room, i = next(spots, (rooms[0], 0))
                view = room[i : i + min(16 << 20, end - at, begin + size - at)]
                at += os.preadv(file.fileno(), [view], at - begin)
        begin += size


def by_dcp(cut: Cut, shapes: Shapes, root: str, source: Cut, state: State) -> None:
    dcp.state_dict_loader.load(state, checkpoint_id=root)


def by_conversion(cut: Cut, shapes: Shapes, root: str, source: Cut, state: State) -> None:
    """The procedure of Universal Checkpointing (ATC 2025), again: ranks' files to fragments, fragments to a file for each atom, and of that
    each rank takes its part. As DeepSpeed's converter and loader do it, without its patterns."""
    rank, world = dist.get_rank(), dist.get_world_size()
    temporary, atoms = Path(root, "tmp"), Path(root, "zero")
    for number in range(rank, source.world, world):
        for name, fragment in torch.load(f"{root}/{number}.pt", weights_only=True).items():
            (temporary / name).mkdir(parents=True, exist_ok=True)
            torch.save(fragment, temporary / name / f"{number}.pt")
    dist.barrier()
    mesh = [
        [int(i) for i in index]
        for index in torch.cartesian_prod(*map(torch.arange, source.mesh)).reshape(source.world, -1)
    ]
    for name in list(shapes)[rank::world]:
        atom = torch.empty(shapes[name])
        for number, coordinate in enumerate(mesh):
            box = source.box(shapes[name], coordinate)
            place = tuple(starmap(slice, zip(box.offset, box.end, strict=True)))
            atom[place] = torch.load(temporary / name / f"{number}.pt", weights_only=True)
        atoms.mkdir(exist_ok=True)
        torch.save(atom, atoms / f"{name}.pt")
    dist.barrier()
    own = next(iter(state.values())).device_mesh.get_coordinate() or ()
    for name, value in state.items():
        box = cut.box(shapes[name], own)
        place = tuple(starmap(slice, zip(box.offset, box.end, strict=True)))
        value.to_local().copy_(torch.load(atoms / f"{name}.pt", weights_only=True)[place])


LOADERS: Mapping[str, Callable[..., None]] = {
    "stormjib": ours,
    "stormjib without digests": without_digests,
    "bare pread": bare,
    "dcp": by_dcp,
    "ucp procedure": by_conversion,
}


class Job(NamedTuple):
    """One load: which loader, of what, and whether its result is looked at."""

    how: str
    root: str
    source: Cut
    compare: bool


class Figures(NamedTuple):
    """Of one load: seconds until all ranks had ended, bytes that this rank has read, and the most memory that it took beside the state."""

    seconds: float
    read: int
    beside: int


def load(rank: int, cut: Cut, shapes: Shapes, jobs: list[Job], out: str) -> None:
    """Do all jobs one after the other, all ranks at once; each writes its figures down."""
    state = made(cut, shapes, filled=False)
    figures = []
    for job in jobs:
        for tensor in state.values():
            tensor.to_local().fill_(-1)
        dist.barrier()
        if rank == 0:
            make_cold(Path(job.root))
        figures.append(measured(cut, shapes, job, state))
        if job.compare:
            check(cut, shapes, state)
    Path(f"{out}.{rank}").write_text(json.dumps(figures))


def measured(cut: Cut, shapes: Shapes, job: Job, state: State) -> Figures:
    """One load, from where all ranks begin to where all have ended."""
    gc.collect()
    reset_peak()
    before, held = read_bytes(), resident()
    dist.barrier()
    began = time.perf_counter()
    with torch.no_grad():
        LOADERS[job.how](cut, shapes, job.root, job.source, state)
    dist.barrier()
    took = time.perf_counter() - began
    return Figures(took, read_bytes() - before, max(0, peak_memory() - held))


def make_cold(folder: Path) -> None:
    """Nothing of these files is in the page cache any more, and what a conversion has made is gone."""
    for made_of_it in ("tmp", "zero"):
        shutil.rmtree(folder / made_of_it, ignore_errors=True)
    for path in folder.rglob("*"):
        if path.is_file():
            descriptor = os.open(path, os.O_RDONLY)
            os.fsync(descriptor)
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(descriptor)


def read_bytes() -> int:
    """What this process has read by calls to the system."""
    return int(_line("/proc/self/io", "rchar"))


def resident() -> int:
    return int(_line("/proc/self/status", "VmRSS").split()[0]) * 1024


def peak_memory() -> int:
    return int(_line("/proc/self/status", "VmHWM").split()[0]) * 1024


def reset_peak() -> None:
    """The highest memory is counted from now on."""
    Path("/proc/self/clear_refs").write_text("5")


def _line(path: str, key: str) -> str:
    return next(
        line.split(":", 1)[1].strip() for line in Path(path).read_text().splitlines() if line.startswith(key)
    )
