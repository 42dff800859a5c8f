"""Loading a committed step on any number of ranks: by boxes, in place, every byte proved before it counts.

All refusals that the index can show (missing or extra names, shapes, types) come before the first byte is filled.
"""

from __future__ import annotations

import contextlib
import difflib
from collections.abc import Callable
from itertools import groupby
from operator import attrgetter
from typing import TYPE_CHECKING, TypeVar

import torch

from stormjib_checkpoint.boxes import runs
from stormjib_checkpoint.errors import DamagedCheckpoint, FormatError, NotThere, StateMismatch
from stormjib_checkpoint.filling import Copy, Filling
from stormjib_checkpoint.format import ITEM_BYTES, DataFile
from stormjib_checkpoint.objects import from_json
from stormjib_checkpoint.overlap import clash, put, shared
from stormjib_checkpoint.step import CommittedStep, unreadable_is_damaged
from stormjib_checkpoint.tensors import ABSENT, Held, Value, empty, held, is_direct, memory

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable, Iterator, Mapping, MutableMapping, Sequence

    from stormjib_checkpoint.index import IndexAtom
    from stormjib_checkpoint.node_memory import Near
    from stormjib_checkpoint.records import Json
    from stormjib_checkpoint.storage import Opened, Storage

T = TypeVar("T")


Rename = Callable[[str], str]
"""A rule: from each name in the checkpoint to its name in the state to fill."""


def load(
    storage: Storage,
    resume: tuple[int, str, str],
    state: MutableMapping[str, Value],
    *,
    rename: Rename | None = None,
    near: Near | None = None,
) -> dict[str, Json]:
    """Fill `state` from the step `resume` (step, generation, digest of its manifest); returns what `train` was.

    Tensors and DTensors are filled in place, whatever world size saved them; other values are replaced in the mapping. What `near` has
    is read from there first. Names must be the same on both sides, after `rename`: `lambda name: name.replace(".encoder.", ".enc.")`.
    Raises MissingCheckpoint, DamagedCheckpoint, StateMismatch, StorageError.
    """
    checkpoint = Checkpoint(storage, resume, rename, near)
    checkpoint.fill(state)
    return checkpoint.train


class Checkpoint:
    """A committed step whose small files are proved; `fill` reads tensors from it."""

    def __init__(
        self,
        storage: Storage,
        resume: tuple[int, str, str],
        rename: Rename | None = None,
        near: Near | None = None,
    ) -> None:
        """Raises MissingCheckpoint, DamagedCheckpoint, StateMismatch (two names become one), StorageError."""
        self._storage, self._near = storage, near
        self._step = CommittedStep(storage, resume)
        self._index = index = self._step.atoms()
        ties = {name: index.atoms[first] for name, first in index.ties.items()}
        scalars = {**self._decoded(index.scalars), **dict.fromkeys(index.absent, ABSENT)}
        self.atoms: Mapping[str, IndexAtom] = _renamed(index.atoms | ties, rename)
        """By every name of theirs."""
        self.scalars: Mapping[str, Json] = _renamed(scalars, rename)
        """`ABSENT` where a state was not there."""
        self.train: dict[str, Json] = self._decoded(self._step.train().train)

    def fill(self, state: MutableMapping[str, Value]) -> None:
        """Fill the tensors of `state` in place and replace its scalars. Raises LoadError, StorageError."""
        self.fill_parts(self._matched(state))
        state.update(self.scalars)

    def fill_parts(self, parts: Iterable[Held]) -> None:
        """As `fill`, for boxes that the caller has cut itself, of atoms that are known to fit."""
        once = {(part.identity, id(self.atoms[part.name])): part for part in parts if part.box.volume}
        groups = shared([*once.values()])
        meeting = {part.name: _Target(part, apart=True) for group in groups for part in group}
        self._read(meeting.values())
        for group in groups:
            name = clash(group, [meeting[part.name].memory for part in group])
            if name is not None:
                raise StateMismatch(
                    f"{name} shares memory with {_others(group, name)}, and the checkpoint has other values for the two "
                    "where they meet; give each memory of its own"
                )
        rest = [_Target(part) for part in once.values() if part.name not in meeting]
        self._read(rest)
        for target in (*meeting.values(), *rest):
            target.finish()

    def _decoded(self, values: Mapping[str, Json]) -> dict[str, Json]:
        try:
            return {name: from_json(value, name) for name, value in values.items()}
        except FormatError as error:
            raise DamagedCheckpoint(f"{self._step.folder}: {error}") from error

    def _matched(self, state: Mapping[str, Value]) -> list[Held]:
        tensors = {name: value for name, value in state.items() if isinstance(value, torch.Tensor)}
        scalars = {name: value for name, value in state.items() if name not in tensors}
        _same_absences(scalars, self.scalars)
        _same_names(tensors.keys(), self.atoms.keys(), "tensor")
        _same_names(scalars.keys(), self.scalars.keys(), "scalar")
        parts = [held(name, value, rank=0, world=1) for name, value in sorted(tensors.items())]
        for part in parts:
            atom = self.atoms[part.name]
            if (part.dtype, part.shape) != (atom.dtype, atom.shape):
                raise StateMismatch(
                    f"{part.name} is {atom.dtype} {list(atom.shape)} in the checkpoint, "
                    f"{part.dtype} {list(part.shape)} in the state to fill"
                )
        return parts

    def _read(self, targets: Collection[_Target]) -> None:
        copies = [copy for target in targets for copy in target.copies(self.atoms[target.part.name])]
        copies.sort(key=attrgetter("rank", "start"))
        for rank, of_rank in groupby(copies, key=attrgetter("rank")):
            self._read_rank(rank, list(of_rank))

    @unreadable_is_damaged()
    def _read_rank(self, rank: int, copies: list[Copy]) -> None:
        path = self._step.data_path(rank)
        data = self._step.rank(rank).data
        if self._near is not None:
            with contextlib.suppress(NotThere, DamagedCheckpoint), self._near.open(path) as file:
                return self._fill(file, rank, data, copies)
        try:
            with self._storage.open(path) as file:
                if file.size != data.bytes:
                    raise DamagedCheckpoint(f"{path} has {file.size} bytes; {data.bytes} were written")
                self._fill(file, rank, data, copies)
        except NotThere as error:
            raise self._step.lost(path) from error

    def _fill(self, file: Opened, rank: int, data: DataFile, copies: list[Copy]) -> None:
        def damage(start: int, end: int) -> DamagedCheckpoint:
            return DamagedCheckpoint(
                f"{self._step.data_path(rank)}: bytes {start} to {end} are not those that were written; "
                f"they hold {self._names(rank, start, end)}"
            )

        Filling(file, data, self._index.head_bytes(rank), copies, damage).run(self._storage.writers)

    def _names(self, rank: int, start: int, end: int) -> str:
        found = self._index.names_in(rank, start, end)
        return (
            ", ".join(found[:5]) + (f" and {len(found) - 5} more" if len(found) > 5 else "") or "the header"
        )


class _Target:
    """The local memory that one tensor is filled through: its own where that is contiguous on the CPU, and not `apart`."""

    def __init__(self, part: Held, apart: bool = False) -> None:
        self.part = part
        own = is_direct(part.local) and not apart
        self.memory = part.local if own else empty(part.box.shape, part.local.dtype)

    def copies(self, atom: IndexAtom) -> Iterator[Copy]:
        size, target, address = ITEM_BYTES[atom.dtype], memory(self.memory), self.memory.data_ptr()
        for stored in atom.meeting(self.part.box):
            for run in runs(stored.box, self.part.box):
                start = stored.start + run.source * size
                yield Copy(stored.rank, start, run.length * size, run.target * size, target, address)

    def finish(self) -> None:
        if self.memory is not self.part.local:
            put(self.part.local, self.memory)


def _renamed(table: Mapping[str, T], rename: Rename | None) -> dict[str, T]:
    if rename is None:
        return dict(table)
    found: dict[str, str] = {}
    for name in table:
        other = found.setdefault(rename(name), name)
        if other != name:
            raise StateMismatch(f"rename makes {rename(name)} of both {other} and {name} of the checkpoint")
    return {new: table[name] for new, name in found.items()}


def _others(group: Sequence[Held], name: str) -> str:
    return ", ".join(part.name for part in group if part.name != name) or "itself"


def _same_absences(wanted: Mapping[str, object], there: Mapping[str, object]) -> None:
    for name in sorted(wanted.keys() | there.keys()):
        if (wanted.get(name) is ABSENT) != (there.get(name) is ABSENT):
            sides = ("state to fill", "checkpoint")
            here, other = sides if wanted.get(name) is ABSENT else sides[::-1]
            raise StateMismatch(
                f"{name} is absent in the {here} and not in the {other}; `load` fills what is there, and `restore` makes and "
                "removes the state of an optimizer"
            )


def _same_names(wanted: Collection[str], there: Collection[str], what: str) -> None:
    for name in sorted(set(wanted) - set(there)):
        raise StateMismatch(f"{what} {name} is not in the checkpoint{_nearest(name, there)}")
    for name in sorted(set(there) - set(wanted)):
        raise StateMismatch(
            f"{what} {name} of the checkpoint is not in the state to fill{_nearest(name, wanted)}"
        )


def _nearest(name: str, names: Collection[str]) -> str:
    near = difflib.get_close_matches(name, names, n=1)
    return f"; the nearest there is {near[0]}" if near else ""
