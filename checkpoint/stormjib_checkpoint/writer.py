"""What a rank says of the tensors that it has left: its record, which makes its part of the step whole. It waits for nobody."""

from __future__ import annotations

import contextlib
from dataclasses import replace
from typing import TYPE_CHECKING, NamedTuple

import torch

from stormjib_checkpoint.errors import AlreadySaved, AlreadyThere, FormatError, UnsupportedState
from stormjib_checkpoint.format import MAX_SMALL_FILE, RESERVED, RankFile, TrainFile
from stormjib_checkpoint.left import Records
from stormjib_checkpoint.objects import to_json
from stormjib_checkpoint.records import MAX_INTEGER, check_text, encode, shown
from stormjib_checkpoint.spec.live import NOTHING, Here, here, parts_of
from stormjib_checkpoint.tensors import ABSENT, Held, Value, held

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from stormjib_checkpoint.format import Atom, DataFile
    from stormjib_checkpoint.image import Image
    from stormjib_checkpoint.layout import GenerationId
    from stormjib_checkpoint.records import Json
    from stormjib_checkpoint.spec.layout import Layout


class Part(NamedTuple):
    """Which part of which step a rank leaves.

    `attempt` tells apart ranks that were restarted within one generation (torchrun's restart count): their parts are never put
    together.
    """

    step: int
    generation: GenerationId
    rank: int
    world: int
    attempt: str = ""


class Staged(NamedTuple):
    """What is known of a rank's data file once every byte of it is there."""

    data: DataFile
    digests: tuple[str, ...]
    """Partial digests of the file's parts, in its order."""


class Contents(NamedTuple):
    """What a state is made of, on this rank."""

    parts: list[Held]
    """Its tensors, by name, each once; where a layout cuts them, the boxes that they hold."""
    ties: dict[str, str]
    """Other names of tensors, and the names that those have in `parts`: the first in the alphabet."""
    scalars: dict[str, Json]
    """All else, `ABSENT` included."""


def record_of(
    who: Part, staged: Staged, file: Image, scalars: Mapping[str, Json], ids: dict[int, tuple[int, ...]]
) -> RankFile:
    """A rank's record: what lies in its data file, and what it holds besides. Raises UnsupportedState."""
    absent = tuple(sorted(name for name, value in scalars.items() if value is ABSENT))
    kept = as_json({name: value for name, value in scalars.items() if value is not ABSENT}, "state")
    digests = dict(zip(file.starts, staged.digests, strict=True))
    atoms = {name: _with_digests(atom, digests) for name, atom in file.atoms.items()}
    try:
        return RankFile(*who, staged.data, atoms, file.ties, absent, kept, ids)
    except ValueError as error:
        raise UnsupportedState(f"state: {error}") from error


def _with_digests(atom: Atom, digests: Mapping[int, str]) -> Atom:
    """An atom whose boxes say their digests, which are told by where in the file a box begins."""
    boxes = tuple(box._replace(digest=digests[box.start]) for box in atom.boxes)
    return replace(atom, boxes=boxes)


def records_of(
    who: Part,
    staged: Staged,
    file: Image,
    scalars: Mapping[str, Json],
    train: Mapping[str, Json],
    ids: dict[int, tuple[int, ...]],
    key: bytes | None,
) -> Records:
    """What `who` says of its data file, signed where there is a key. `train` counts on rank 0. `ids` are those that this rank fed to the
    model, by step, since its last save. Raises UnsupportedState, which names the key."""
    record = encode(record_of(who, staged, file, scalars, ids), key)
    if len(record) > MAX_SMALL_FILE:
        raise UnsupportedState(
            f"the record of rank {who.rank} would have {len(record)} bytes, and {MAX_SMALL_FILE} are read; save fewer tensors a rank"
        )
    if who.rank != 0:
        return Records(record, None)
    told = TrainFile(who.step, who.generation, as_json(train, "train"))
    return Records(record, encode(told, key))


@contextlib.contextmanager
def told_as_saved(who: Part) -> Iterator[None]:
    """A name that is taken, as AlreadySaved."""
    try:
        yield
    except AlreadyThere as error:
        raise AlreadySaved(
            f"rank {who.rank} has left step {who.step} in generation {who.generation} before; "
            "go on, and save a later step"
        ) from error


def split(state: Mapping[str, Value], rank: int, world: int, layout: Layout | None = None) -> Contents:
    """A state as this rank stores it. `layout` says how its plain tensors lie where not every rank has the whole of them.

    Raises UnsupportedState by name, SpecError.
    """
    told = here(layout, rank, world) if layout is not None else NOTHING
    found = Contents([], {}, {})
    names: dict[object, str] = {}
    for name, value in sorted(state.items()):
        if name.startswith(RESERVED):
            raise UnsupportedState(f"{name} begins with {RESERVED}, which is kept for the format; rename it")
        if not isinstance(value, torch.Tensor):
            found.scalars[name] = value
        elif told.says(name, value):
            _add_laid(found, told, name, value)
        else:
            _add(found, names, held(name, value, rank, world))
    _refuse_unknown_names(found, told, state)
    owners = {name.rpartition(".")[0] for name in state}
    for name, value in found.scalars.items():
        if value is ABSENT and name in owners:
            raise UnsupportedState(f"{name} is absent and there: the state has names below it")
    refuse_unstorable(dict.fromkeys(state) | found.scalars, "state")
    return found


def _add(found: Contents, names: dict[object, str], part: Held) -> None:
    # What has no elements here has no place either: the ranks that hold some say whether it is tied.
    first = names.setdefault(part.identity, part.name) if part.box.volume else part.name
    if first == part.name:
        found.parts.append(part)
    else:
        found.ties[part.name] = first


def _add_laid(found: Contents, told: Here, name: str, value: torch.Tensor) -> None:
    parts, tie = list(parts_of(told, name, value)), told.locals[name].tie
    found.parts.extend(parts)
    if tie and any(part.box.volume for part in parts):
        found.ties[name] = tie


def _refuse_unknown_names(found: Contents, told: Here, state: Mapping[str, Value]) -> None:
    """Raises UnsupportedState where a name that the layout does not know is that of a tensor which it has cut."""
    cut = {
        value.data_ptr(): name
        for name, value in state.items()
        if isinstance(value, torch.Tensor) and told.says(name, value) and value.numel()
    }
    for part in found.parts if cut else ():
        other = cut.get(part.local.data_ptr()) if part.cut is None and part.box.volume else None
        if other is not None:
            raise UnsupportedState(
                f"{part.name} is the memory of {other}, which the layout cuts, and the layout says nothing of it; tie it there"
            )


def checked_ids(samples: Mapping[int, Sequence[int]]) -> dict[int, tuple[int, ...]]:
    """The samples as they are stored. Raises UnsupportedState."""
    ids = {step: tuple(int(i) for i in fed) for step, fed in samples.items()}
    for step, fed in ids.items():
        if step < 0 or not all(0 <= i <= MAX_INTEGER for i in fed):
            raise UnsupportedState(f"samples of step {step}: steps and ids are numbers from 0 to 2^63-1")
    return ids


def refuse_unstorable(values: Mapping[str, Json], where: str) -> None:
    """Raises UnsupportedState, which names the key, where the format would not give `values` back as they are."""
    as_json({name: value for name, value in values.items() if value is not ABSENT}, where)


def as_json(values: Mapping[str, Json], where: str) -> dict[str, Json]:
    """Values by name as they are written. Raises UnsupportedState, which names the key."""
    for name in values:
        if type(name) is not str:
            raise UnsupportedState(f"{where} has the name {shown(name)}; names are text")
    try:
        check_text("".join(values), f"a name of {where}")
        return {name: to_json(value, f"{where}.{name}") for name, value in values.items()}
    except FormatError as error:
        raise UnsupportedState(str(error)) from error
