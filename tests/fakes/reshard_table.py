"""The resharding table: each row saved as one layout says and loaded as another says, in one process.

The files of the source's ranks are written one after the other; the target's ranks load as a group of threads, so that what several want is
read once. Of each row it is shown that every rank has, bit for bit, what it should; that the digests of what they have together are those
in the index; how many bytes were read for how many that were wanted, counted where files are read; and that training goes on as it would have.

`python -m fakes.reshard_table FILE` writes all of it down.
"""

from __future__ import annotations

import sys
import tempfile
import time
from contextlib import contextmanager
from copy import deepcopy
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch.distributed.checkpoint.filesystem import FileSystemWriter
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader
from torch.distributed.checkpoint.state_dict_loader import load as dcp_load
from torch.distributed.checkpoint.state_dict_saver import save as dcp_save

from fakes import digests
from fakes.counted import Counted
from fakes.disk import Disk
from fakes.groups import Member, together
from fakes.reshard_models import MODELS, loss_of, model_of, optimizer_of
from fakes.reshard_specs import ROWS, Row, on
from fakes.saving import save_rank
from stormjib_checkpoint import layout as names
from stormjib_checkpoint.commit import commit_step
from stormjib_checkpoint.errors import DamagedCheckpoint
from stormjib_checkpoint.files import Posix
from stormjib_checkpoint.forecast import forecasts, total
from stormjib_checkpoint.interop import dcp, deepspeed
from stormjib_checkpoint.interop.inflow import bring_in
from stormjib_checkpoint.layout import GenerationId
from stormjib_checkpoint.opening import open_next
from stormjib_checkpoint.reader import Checkpoint
from stormjib_checkpoint.spec.parsing import parse
from stormjib_checkpoint.state import collect
from stormjib_checkpoint.step import CommittedStep
from stormjib_checkpoint.storage import Local
from stormjib_checkpoint.tensors import DTYPES
from stormjib_checkpoint.writer import split

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

    from stormjib_checkpoint.format import ResumePoint
    from stormjib_checkpoint.spec.layout import Layout, Patch
    from stormjib_checkpoint.storage import Storage
    from stormjib_checkpoint.tensors import Value

    Tensors = dict[str, torch.Tensor]

PAD = 7.0
"""What lies in a target before it is filled."""
STEPS = 20
"""Trained from what was gathered, and by the control."""
SAVED_AT = 3


class Shown(NamedTuple):
    """What a load has shown."""

    wanted: int
    """Bytes that the ranks of the target want, each byte counted for each of them."""
    unique: int
    """Each counted once."""
    read: int
    handed: int
    """Bytes that came from other ranks."""


class State(NamedTuple):
    """A training state: its tensors by atom, and its other values."""

    tensors: Tensors
    scalars: dict[str, Value]


# --- a state, and training on from it -------------------------------------------------------------------------------


def trained(model: str, optimizer: str) -> State:
    """After some steps of training, every tensor by itself."""
    net = model_of(MODELS[model].atoms)
    stepper = optimizer_of(optimizer, net)
    _train(net, stepper, 0, SAVED_AT)
    contents = split(collect(net, stepper), 0, 1)
    return State({part.name: part.local.clone() for part in contents.parts}, dict(contents.scalars))


def goes_on(model: str, optimizer: str, tensors: Mapping[str, torch.Tensor]) -> list[float]:
    """The losses of the steps after, from these tensors."""
    net = model_of(MODELS[model].atoms, seed=9)
    stepper = optimizer_of(optimizer, net)
    _train(net, stepper, 0, 1)  # the optimizer makes its state
    with torch.no_grad():
        for part in split(collect(net, stepper), 0, 1).parts:
            part.local.copy_(tensors[part.name])
    return _train(net, stepper, SAVED_AT, SAVED_AT + STEPS)


def _train(net: Any, stepper: Any, begin: int, end: int) -> list[float]:
    losses = []
    torch.manual_seed(begin)  # of dropout
    for step in range(begin, end):
        loss = loss_of(net, step)
        loss.backward()  # type: ignore[no-untyped-call]
        stepper.step()
        stepper.zero_grad()
        losses.append(float(loss.detach()))
    return losses


# --- cutting and gathering, by the patches alone --------------------------------------------------------------------


def cut(layout: Layout, rank: int, full: Mapping[str, torch.Tensor]) -> Tensors:
    """A rank's tensors, padded with zeros."""
    found: Tensors = {}
    for name, local in layout.rank(rank).items():
        some = full[local.patches[0].atom] if local.patches else torch.zeros(())
        dtype = DTYPES[local.dtype] if local.dtype is not None else some.dtype
        found[name] = torch.zeros(local.shape, dtype=dtype)
        for patch in local.patches:
            _view(found[name], patch).copy_(full[patch.atom][_slices(patch)])
    return found


def gathered(layout: Layout, ranks: Sequence[Mapping[str, torch.Tensor]]) -> Tensors:
    """The atoms, of the copies that would be stored."""
    found: Tensors = {}
    for rank, tensors in enumerate(ranks):
        for name, local in layout.rank(rank).items():
            for patch in (one for one in local.patches if one.primary):
                atom = found.setdefault(
                    patch.atom, torch.full(tuple(layout.atoms[patch.atom]), PAD, dtype=tensors[name].dtype)
                )
                atom[_slices(patch)] = _view(tensors[name], patch)
    return found


def _slices(patch: Patch) -> tuple[slice, ...]:
    return tuple(slice(o, e) for o, e in zip(patch.box.offset, patch.box.end, strict=True))


def _view(tensor: torch.Tensor, patch: Patch) -> torch.Tensor:
    return tensor.as_strided(patch.box.shape, patch.strides, patch.start)


def as_stored(layout: Layout, tensors: Tensors) -> Tensors:
    """The same values under the shapes of a layout: what may differ by rank has a slice for each."""
    found = {}
    for name, tensor in tensors.items():
        shape = tuple(layout.atoms.get(name, tensor.shape))
        plain = (
            tensor[0]
            if tensor.ndim > len(shape) or (tensor.ndim == len(shape) and tensor.shape != shape)
            else tensor
        )
        found[name] = plain.expand(shape).clone()
    return found


# --- one save, one load ---------------------------------------------------------------------------------------------


class Job:
    """A job whose steps are saved and loaded on whatever layout."""

    def __init__(self) -> None:
        self.disk = Disk()
        self.storage = Counted("/job", self.disk, request_bytes=4)
        self._step = 0

    def save(self, layout: Layout, state: State) -> ResumePoint:
        """All ranks of a layout, one after the other."""
        self._step += 1
        generation = open_next(self.storage).generation
        for rank in range(layout.world):
            save_rank(
                self.storage, step=self._step, generation=generation, rank=rank, world=layout.world,
                state=cut(layout, rank, state.tensors) | state.scalars, train={"step": self._step}, samples={}, layout=layout,
            )  # fmt: skip
        return commit_step(self.storage, generation, layout.world, self._step)

    def load(
        self, layout: Layout, state: State, point: ResumePoint, near: Callable[[int], Near] | None = None
    ) -> tuple[Shown, Tensors]:
        """All ranks of a layout together; what they have now, gathered. Asserts that each has what it should."""
        self.storage.bytes_read = 0
        locals_: list[Tensors] = [{} for _ in range(layout.world)]

        def one(member: Member) -> int:
            expected = cut(layout, member.member, state.tensors)
            empty: dict[str, Value] = {name: torch.full_like(value, PAD) for name, value in expected.items()}
            found = empty | dict.fromkeys(state.scalars)
            memory = near(member.member) if near is not None else None
            checkpoint = Checkpoint(self.storage, point, near=memory)  # type: ignore[arg-type]
            checkpoint.fill(found, layout=layout, group=member)
            for name, tensor in expected.items():
                assert torch.equal(found[name], tensor), f"{name} of rank {member.member}"
                locals_[member.member][name] = found[name]
            assert all(found[name] == value for name, value in state.scalars.items())
            return member.handed

        handed = together(layout.world, one)
        wanted = sum(nbytes(layout, rank, state.tensors) for rank in range(layout.world))
        atoms = CommittedStep(self.storage, point).atoms().atoms
        unique = sum(atom.nbytes for atom in atoms.values())
        if near is None and all(
            tuple(atom.shape) == tuple(layout.atoms[name]) for name, atom in atoms.items()
        ):
            forecast = total(forecasts(layout, atoms, self.storage.request_bytes, {}))
            assert (forecast.storage, forecast.received) == (self.storage.bytes_read, sum(handed))
        return Shown(wanted, unique, self.storage.bytes_read, sum(handed)), gathered(layout, locals_)

    def proves(self, point: ResumePoint, tensors: Tensors) -> None:
        """Asserts that the digests in the index are those of these tensors."""
        atoms = CommittedStep(self.storage, point).atoms().atoms
        assert atoms.keys() == tensors.keys()
        for name, atom in atoms.items():
            assert atom.digest == digests.of(tensors[name]), name


def nbytes(layout: Layout, rank: int, full: Mapping[str, torch.Tensor]) -> int:
    """Bytes of the checkpoint that a rank wants."""
    patches = {(p.atom, p.box) for local in layout.rank(rank).values() for p in local.patches}
    return sum(box.volume * full[atom].element_size() for atom, box in patches)


# --- rows -----------------------------------------------------------------------------------------------------------


def run(row: Row) -> Shown:
    """Show a row. Raises AssertionError where it does not hold; the figures are those of its last load."""
    if row.number in SPECIAL:
        return SPECIAL[row.number](row)
    return chain(row)


def chain(row: Row) -> Shown:
    """Each side saves what the one before has left, and the next loads it."""
    state, job = trained(row.model, row.optimizer), Job()
    layouts = row.layouts()
    first = State(as_stored(layouts[0], state.tensors), state.scalars)
    now = State(_cast(layouts[0], first.tensors), state.scalars)
    control = goes_on(row.model, row.optimizer, plain(row, now.tensors))
    for source, target in pairwise(layouts):
        point = job.save(source, now)
        job.proves(point, now.tensors)
        next_ = State(_cast(target, as_stored(target, now.tensors)), now.scalars)
        shown, found = job.load(target, State(as_stored(target, now.tensors), now.scalars), point)
        assert_equal(found, next_.tensors)
        now = State(found, now.scalars)
    if row.number != "31":  # narrower types are other numbers
        assert goes_on(row.model, row.optimizer, plain(row, now.tensors)) == control
    return shown


def plain(row: Row, tensors: Tensors) -> Tensors:
    """As a model on one rank has them."""
    return as_stored(parse(on(row.model, {}, row.optimizer).spec).on({}, _own(row)), tensors)


def _own(row: Row) -> Mapping[str, tuple[int, ...]]:
    from fakes.reshard_models import atoms_of

    return atoms_of(row.model, row.optimizer)


def _cast(layout: Layout, tensors: Tensors) -> Tensors:
    """In the types that the spec says, which each tensor of a rank has."""
    types = {
        patch.atom: local.dtype
        for local in layout.rank(0).values()
        for patch in local.patches
        if local.dtype is not None
    }
    return {name: t.to(DTYPES[types[name]]) if name in types else t for name, t in tensors.items()}


def assert_equal(one: Tensors, other: Tensors) -> None:
    assert one.keys() == other.keys()
    for name, tensor in one.items():
        assert tensor.dtype == other[name].dtype, name
        assert torch.equal(tensor, other[name]), name


class Near:
    """The memory of a node, in which the file of one rank lies."""

    def __init__(self, storage: Storage, path: str) -> None:
        self._storage, self._path = storage, path

    def has(self, path: str) -> bool:
        return path == self._path

    def open(self, path: str) -> Any:
        return self._storage.open(path)


def lost_rank(row: Row) -> Shown:
    """Of eight ranks seven live, each with what it has saved in memory; only what the lost one had comes from the storage."""
    source, target = row.layouts()
    state, job = trained(row.model, row.optimizer), Job()
    point = job.save(source, state)
    memory = Local("/job", Disk(deepcopy(job.disk.tree)))
    folder = names.folder(point.step, GenerationId.parse(point.generation))
    shown, found = job.load(
        target, state, point, lambda rank: Near(memory, f"{folder}/{names.rank_data(rank)}")
    )
    assert_equal(found, state.tensors)
    assert shown.read <= 0.125 * shown.unique + 4096
    return shown


def damaged(row: Row) -> Shown:
    """One bit is wrong, or the end of a file is missing: nobody takes it, the file is named, and what was there before still loads."""
    source, target = row.layouts()
    state, job = trained(row.model, row.optimizer), Job()
    point, other = job.save(source, state), job.save(source, state)
    path = f"/job/{names.folder(other.step, GenerationId.parse(other.generation))}/{names.rank_data(5)}"
    whole = job.disk.content(path)
    for torn in (whole[:-1] + bytes([whole[-1] ^ 4]), whole[:-3]):
        job.disk.damage(path, torn)
        told = None
        try:
            job.load(target, state, other)
        except DamagedCheckpoint as error:
            told = str(error)
        assert told is not None
        assert "rank-00005" in told or "digest" in told
    shown, found = job.load(target, state, point)
    assert_equal(found, state.tensors)
    return shown


def brought_in(row: Row, read: Callable[[Path], Any], put: Callable[[Checkpoint, Path], None]) -> Shown:
    """Out to a foreign format, and in again; then onto the row's layout."""
    state, job = trained(row.model, row.optimizer), Job()
    own = parse(on(row.model, {}, row.optimizer).spec).on({}, _own(row))
    other = Job()
    with tempfile.TemporaryDirectory() as name:
        put(Checkpoint(job.storage, job.save(own, state)), Path(name, "out"))
        point = bring_in(other.storage, read(Path(name, "out")), 1, 3)
    scalars = Checkpoint(other.storage, point).scalars
    shown, found = other.load(row.layouts()[-1], State(state.tensors, dict(scalars)), point)
    assert_equal(found, state.tensors)
    return shown


def by_torch(row: Row) -> Shown:
    """Our files, read by torch's own reader, which puts boxes together."""
    state, job = trained(row.model, row.optimizer), Job()
    source, target = row.layouts()
    with tempfile.TemporaryDirectory() as name:
        job.storage = Counted(name, Posix(), request_bytes=4)
        point = job.save(source, state)
        into = {key: torch.full_like(value, PAD) for key, value in state.tensors.items()}
        folder = names.folder(point.step, GenerationId.parse(point.generation))
        with warned():
            dcp_load(into, storage_reader=HuggingFaceStorageReader(f"{name}/{folder}"), no_dist=True)
        assert_equal(into, state.tensors)
        shown, found = job.load(target, state, point)
    assert_equal(found, state.tensors)
    return shown


def to_dcp(checkpoint: Checkpoint, folder: Path) -> None:
    """As torch itself writes it."""
    into = {
        name: torch.empty(atom.shape, dtype=DTYPES[atom.dtype]) for name, atom in checkpoint.atoms.items()
    }
    state: dict[str, Value] = {**into, **checkpoint.scalars}
    checkpoint.fill(state)
    with warned():
        dcp_save(state, storage_writer=FileSystemWriter(folder), no_dist=True)


@contextmanager
def warned() -> Iterator[None]:
    import warnings

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


SPECIAL: Mapping[str, Callable[[Row], Shown]] = {
    "36": lost_rank,
    "37": damaged,
    "38": lambda row: brought_in(row, deepspeed.read, lambda one, to: deepspeed.export(one, to, 1)),
    "39": lambda row: brought_in(row, deepspeed.read, lambda one, to: deepspeed.export(one, to, 1)),
    "40": by_torch,
    "41": lambda row: brought_in(row, dcp.read, to_dcp),
}


def main() -> None:
    """Write the table to the file that is named."""
    lines = []
    for row in ROWS:
        began = time.perf_counter()
        shown = run(row)
        lines.append((row, shown, time.perf_counter() - began))
        print(row.number, f"{lines[-1][2]:.1f} s", flush=True)
    Path(sys.argv[1]).write_text(_text(lines))


def _text(lines: Sequence[tuple[Row, Shown, float]]) -> str:
    rows = [
        f"| {row.number} | {row.model} | {' → '.join(map(_side, row.sides))} | {row.trap} | {shown.unique} | "
        f"{shown.wanted / shown.unique:.2f} | {shown.read / shown.unique:.3f} | {shown.handed} |"
        for row, shown, _ in lines
    ]
    return HEAD + "\n".join(rows) + "\n"


def _side(side: Any) -> str:
    return ".".join(f"{axis}{size}" for axis, size in side.mesh.items()) or "one rank"


HEAD = """# Any layout to any other

Written by `make reshard-table`; CI runs every row (`tests/unit/checkpoint/test_reshard_table.py`). Each row saves a model with its optimizer as
one layout says, rank by rank, and loads it as another says, in one process, with what we ship: specs, files, index, plan, digests. A row is here
because all of this held: every tensor of every rank is equal, bit for bit, to what was cut from the whole; the digests of the index are those
of the whole tensors; and 20 steps from the gathered state give the losses of the state that was never saved (but where types are narrowed). The models
are tiny, and have all that makes each hard to cut. Numbers of the rows are those of the goal.

*Bytes*: of the checkpoint. *Wanted*: by all ranks together, as a multiple of that: replicas want the same. *Read*: from files, the same
multiple. *Handed*: bytes that ranks have given to each other.

| row | model | from, to | what is hard | bytes | wanted | read | handed |
|---|---|---|---|---|---|---|---|
"""

if __name__ == "__main__":
    main()
