"""Saving: each rank leaves its tensors and then a record of them, and waits for nobody."""

from __future__ import annotations

from itertools import chain
from typing import TYPE_CHECKING, NamedTuple

import torch

from stormjib_checkpoint import layout
from stormjib_checkpoint.errors import AlreadySaved, AlreadyThere, FormatError, UnsupportedState
from stormjib_checkpoint.format import PIECE_BYTES, Atom, DataFile, RankFile, StoredBox, TrainFile
from stormjib_checkpoint.layout import GenerationId
from stormjib_checkpoint.pieces import PieceHasher
from stormjib_checkpoint.records import MAX_INTEGER, Json, check_plain, encode
from stormjib_checkpoint.shardfile import Entry, header, in_file_order
from stormjib_checkpoint.tensors import Held, Value, held, memory, on_host

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from stormjib_checkpoint.storage import Storage

_WRITE_BYTES = 8 * 1024 * 1024
_RESERVED = "__"


def save_rank(
    storage: Storage,
    *,
    step: int,
    generation: str,
    rank: int,
    world: int,
    state: Mapping[str, Value],
    train: Mapping[str, Json],
    samples: Mapping[int, Sequence[int]],
    attempt: str = "",
) -> None:
    """Leave this rank's part of `step`: durable on return, committed only once every rank has left its own.

    `state` names tensors and DTensors (each rank its shard; plain ones are the same on all ranks) and JSON scalars.
    `train` counts on rank 0. `samples` are the ids that this rank fed to the model, by step, since its last save.
    `attempt` tells apart ranks that were restarted within one generation (torchrun's restart count): their parts are
    never put together. Raises SaveError and StorageError; nothing that was there is changed.
    """
    who = Part(step, GenerationId.parse(generation), rank, world, attempt)
    parts, scalars = split(state, rank, world)
    save_parts(storage, who, parts, scalars, train, samples)


class Part(NamedTuple):
    """Which part of which step a rank leaves."""

    step: int
    generation: GenerationId
    rank: int
    world: int
    attempt: str = ""


def save_parts(
    storage: Storage,
    who: Part,
    parts: Sequence[Held],
    scalars: Mapping[str, Json],
    train: Mapping[str, Json],
    samples: Mapping[int, Sequence[int]],
) -> None:
    """As `save_rank`, for boxes that the caller has cut itself."""
    ids = _ids(samples)
    place = layout.folder(who.step, who.generation)
    try:
        data, boxes = _write_data(storage, f"{place}/{layout.rank_data(who.rank)}", parts, who.rank)
        if who.rank == 0:
            _write_train(storage, place, TrainFile(who.step, who.generation, dict(train)))
        atoms = {part.name: Atom(part.dtype, part.shape, boxes.get(part.name, ())) for part in parts}
        record = RankFile(**who._asdict(), data=data, atoms=atoms, scalars=dict(scalars), samples=ids)
        storage.create(f"{place}/{layout.rank_json(who.rank)}", [encode(record)])
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
    _refuse_unstorable({"names": sorted(state), **scalars}, "state")
    return parts, scalars


def _ids(samples: Mapping[int, Sequence[int]]) -> dict[int, tuple[int, ...]]:
    ids = {step: tuple(int(i) for i in fed) for step, fed in samples.items()}
    for step, fed in ids.items():
        if step < 0 or not all(0 <= i <= MAX_INTEGER for i in fed):
            raise UnsupportedState(f"samples of step {step}: steps and ids are numbers from 0 to 2^63-1")
    return ids


def _refuse_unstorable(values: Mapping[str, Json], where: str) -> None:
    try:
        check_plain(dict(values), where)
    except FormatError as error:
        raise UnsupportedState(str(error)) from error


def _write_train(storage: Storage, place: str, record: TrainFile) -> None:
    _refuse_unstorable(record.train, "train")
    storage.create(f"{place}/{layout.TRAIN}", [encode(record)])


def _write_data(
    storage: Storage, path: str, parts: Sequence[Held], rank: int
) -> tuple[DataFile, dict[str, tuple[StoredBox, ...]]]:
    mine = {part.name: part for part in parts if part.primary and part.box.volume}
    entries = in_file_order([Entry(part.name, part.dtype, part.box) for part in mine.values()])
    head, starts = header(entries)
    hasher = PieceHasher(PIECE_BYTES)
    storage.create(path, _chunks(head, [mine[entry.name].local for entry in entries], hasher))
    boxes: dict[str, tuple[StoredBox, ...]] = {
        entry.name: (StoredBox(rank, entry.box.offset, entry.box.shape, start, start + entry.nbytes),)
        for entry, start in zip(entries, starts, strict=True)
    }
    return DataFile(hasher.bytes, PIECE_BYTES, hasher.digests()), boxes


def _chunks(head: bytes, tensors: Sequence[torch.Tensor], hasher: PieceHasher) -> Iterator[memoryview]:
    """The file from front to back, straight from the tensors' memory, hashed just before it is written."""
    for data in chain([memoryview(head)], (memory(on_host(tensor)) for tensor in tensors)):
        for start in range(0, len(data), _WRITE_BYTES):
            chunk = data[start : start + _WRITE_BYTES]
            hasher.update(chunk)
            yield chunk
