"""What a rank says of the tensors that it has left: its record, which makes its part of the step whole. It waits for nobody."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, NamedTuple

import torch

from stormjib_checkpoint.errors import AlreadySaved, AlreadyThere, FormatError, UnsupportedState
from stormjib_checkpoint.format import Atom, DataFile, RankFile, TrainFile
from stormjib_checkpoint.left import Records
from stormjib_checkpoint.records import MAX_INTEGER, Json, check_plain, encode
from stormjib_checkpoint.tensors import Held, Value, held

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from stormjib_checkpoint.layout import GenerationId

_RESERVED = "__"


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


def records_of(
    who: Part,
    data: DataFile,
    atoms: Mapping[str, Atom],
    scalars: Mapping[str, Json],
    train: Mapping[str, Json],
    ids: dict[int, tuple[int, ...]],
) -> Records:
    """What `who` says of its data file. `train` counts on rank 0. `ids` are those that this rank fed to the model, by step, since its
    last save. Raises UnsupportedState, which names the key."""
    refuse_unstorable(scalars, "state")
    record = RankFile(**who._asdict(), data=data, atoms=dict(atoms), scalars=dict(scalars), samples=ids)
    if who.rank != 0:
        return Records(encode(record), None)
    refuse_unstorable(train, "train")
    return Records(encode(record), encode(TrainFile(who.step, who.generation, dict(train))))


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


def split(state: Mapping[str, Value], rank: int, world: int) -> tuple[list[Held], dict[str, Json]]:
    """The tensors that this rank holds, by name, and the scalars. Raises UnsupportedState by name."""
    parts: list[Held] = []
    scalars: dict[str, Json] = {}
    for name, value in sorted(state.items()):
        if name.startswith(_RESERVED):
            raise UnsupportedState(f"{name} begins with {_RESERVED}, which is kept for the format; rename it")
        if isinstance(value, torch.Tensor):
            parts.append(held(name, value, rank, world))
        else:
            scalars[name] = value
    refuse_unstorable({"names": sorted(state), **scalars}, "state")
    return parts, scalars


def checked_ids(samples: Mapping[int, Sequence[int]]) -> dict[int, tuple[int, ...]]:
    """The samples as they are stored. Raises UnsupportedState."""
    ids = {step: tuple(int(i) for i in fed) for step, fed in samples.items()}
    for step, fed in ids.items():
        if step < 0 or not all(0 <= i <= MAX_INTEGER for i in fed):
            raise UnsupportedState(f"samples of step {step}: steps and ids are numbers from 0 to 2^63-1")
    return ids


def refuse_unstorable(values: Mapping[str, Json], where: str) -> None:
    """Raises UnsupportedState, which names the key, where JSON would not give `values` back as they are."""
    try:
        check_plain(dict(values), where)
    except FormatError as error:
        raise UnsupportedState(str(error)) from error
