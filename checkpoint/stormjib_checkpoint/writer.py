"""What a rank says of the tensors that it has left: its record, which makes its part of the step whole. It waits for nobody."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, NamedTuple

import torch

from stormjib_checkpoint import layout
from stormjib_checkpoint.errors import AlreadySaved, AlreadyThere, FormatError, UnsupportedState
from stormjib_checkpoint.format import Atom, DataFile, RankFile, TrainFile
from stormjib_checkpoint.records import MAX_INTEGER, Json, check_plain, encode
from stormjib_checkpoint.tensors import Held, Value, held

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from stormjib_checkpoint.layout import GenerationId
    from stormjib_checkpoint.storage import Storage

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


def leave_record(
    storage: Storage,
    who: Part,
    data: DataFile,
    atoms: Mapping[str, Atom],
    scalars: Mapping[str, Json],
    train: Mapping[str, Json],
    ids: dict[int, tuple[int, ...]],
) -> None:
    """Say what lies in a data file that is durable: with this the rank's part of the step is there, and committed once all are.

    `train` counts on rank 0. `ids` are those that this rank fed to the model, by step, since its last save.
    Raises SaveError and StorageError; nothing that was there is changed.
    """
    refuse_unstorable(scalars, "state")
    place = layout.folder(who.step, who.generation)
    record = RankFile(**who._asdict(), data=data, atoms=dict(atoms), scalars=dict(scalars), samples=ids)
    if who.rank == 0:
        _write_train(storage, place, TrainFile(who.step, who.generation, dict(train)))
    storage.create(f"{place}/{layout.rank_json(who.rank)}", [encode(record)])


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


def _write_train(storage: Storage, place: str, record: TrainFile) -> None:
    refuse_unstorable(record.train, "train")
    storage.create(f"{place}/{layout.TRAIN}", [encode(record)])
