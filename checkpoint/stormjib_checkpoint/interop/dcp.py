"""Folders of plain `torch.distributed.checkpoint`, out and in, with the optimizer.

Out, as `get_optimizer_state_dict(..., flatten_optimizer_state_dict=True)` names it: `optim.state.<parameter>.<key>` and
`optim.param_groups.<parameter>.<option>`. In, these and the nested names of the default.
"""

from __future__ import annotations

import io
import pickle
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorProperties,
    TensorStorageMetadata,
)

from stormjib_checkpoint.boxes import Box
from stormjib_checkpoint.dcp.roots import OURS
from stormjib_checkpoint.errors import ForeignDamaged, ForeignRefused, ImportRefused
from stormjib_checkpoint.interop import torchzip
from stormjib_checkpoint.interop.foreign import Chunk, Described, Foreign, Place, Record, Source, describe
from stormjib_checkpoint.interop.optimizer import (
    GROUP,
    HOW,
    MODEL,
    OPTIM,
    STEP,
    Group,
    groups,
    parameters,
    scalars_of,
    steps_done,
)
from stormjib_checkpoint.interop.outflow import new_folder, streams
from stormjib_checkpoint.tensors import ABSENT, DTYPES

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence
    from pathlib import Path

    from stormjib_checkpoint.reader import Checkpoint
    from stormjib_checkpoint.records import Json

METADATA = ".metadata"
STATE, GROUPS = "optim.state.", "optim.param_groups."
OBJECTS = "__0_objects.distcp"


# --- out --------------------------------------------------------------------------------------------------------------


def export(checkpoint: Checkpoint, folder: Path) -> None:
    """Write all of a step into a new folder that stock torch loads: a file for each tensor, the index last. Raises ExportRefused, LoadError."""
    new_folder(folder)
    index = _Index({}, {})
    _tensors(checkpoint, folder, index)
    with (folder / OBJECTS).open("xb") as objects:
        _steps(checkpoint, index, objects)
        for name, value in _objects(checkpoint).items():
            index.object(name, _put(objects, value))
    paths = _paths(index.entries) | checkpoint.train.get(OURS, {}).get("paths", {})
    metadata = Metadata(index.entries, paths, index.places, StorageMeta(), "1.0.0")
    with (folder / METADATA).open("xb") as last:
        pickle.dump(metadata, last)


def _tensors(checkpoint: Checkpoint, folder: Path, index: _Index) -> None:
    """Names of one tensor lead to one file."""
    names: dict[int, list[str]] = {}
    for name, atom in checkpoint.atoms.items():
        names.setdefault(id(atom), []).append(name)
    for number, (name, parts) in enumerate(streams(checkpoint, [first for first, *_ in names.values()])):
        atom = checkpoint.atoms[name]
        file = folder / f"__0_{number}.distcp"
        torchzip.save(file, torchzip.Streamed(atom.dtype, atom.shape), [parts])
        place = _StorageInfo(file.name, 0, file.stat().st_size)
        for same in names[id(atom)]:
            index.tensor(_to_theirs(same), atom.dtype, atom.shape, place)


class _Index(NamedTuple):
    """What `.metadata` will say."""

    entries: dict[str, TensorStorageMetadata | BytesStorageMetadata]
    places: dict[MetadataIndex, _StorageInfo]

    def tensor(self, name: str, dtype: str, shape: tuple[int, ...], place: _StorageInfo) -> None:
        offset, size = torch.Size([0] * len(shape)), torch.Size(shape)
        chunks = [ChunkStorageMetadata(offset, size)]
        self.entries[name] = TensorStorageMetadata(TensorProperties(dtype=DTYPES[dtype]), size, chunks)
        self.places[MetadataIndex(name, offset)] = place

    def object(self, name: str, place: _StorageInfo) -> None:
        self.entries[name] = BytesStorageMetadata()
        self.places[MetadataIndex(name)] = place


def _to_theirs(name: str) -> str:
    """What DCP has saved through us has its names already."""
    if name.startswith((STATE, GROUPS)):
        return name
    return STATE + name.removeprefix(OPTIM) if name.startswith(OPTIM) else name


def _steps(checkpoint: Checkpoint, index: _Index, file: io.BufferedWriter) -> None:
    """The steps that each parameter has done, where only the trainer's own record says so."""
    step = steps_done(checkpoint)
    for owner in parameters(checkpoint) if step is not None else ():
        index.tensor(f"{STATE}{owner}.{STEP}", "F32", (), _put(file, torch.tensor(float(step or 0))))


def _objects(checkpoint: Checkpoint) -> dict[str, Any]:
    found: dict[str, Any] = dict(checkpoint.train.get(OURS, {}).get("objects", {}))
    for name, value in checkpoint.scalars.items():
        if name.startswith(OPTIM) and value is not ABSENT:
            found[_to_theirs(name)] = value
        elif not name.startswith(GROUP) and value is not ABSENT:
            found[name] = value
    for group in groups(checkpoint):
        for parameter in group.names:
            found.update(
                {f"{GROUPS}{parameter}.{key}": value for key, value in (HOW | group.options).items()}
            )
    return found


def _put(file: io.BufferedWriter, value: Any) -> _StorageInfo:
    start = file.tell()
    buffer = io.BytesIO()
    torch.save(value, buffer)
    file.write(buffer.getbuffer())
    return _StorageInfo(OBJECTS, start, len(buffer.getbuffer()))


def _paths(entries: Mapping[str, object]) -> dict[str, tuple[str, ...]]:
    """Where each lies in `{"model": ..., "optim": ...}`, as the flattening planner has it."""
    return {name: tuple(name.split(".", 1)) for name in entries}


# --- in ---------------------------------------------------------------------------------------------------------------


class _Item(NamedTuple):
    """One entry of the index: a chunk of a tensor, or an object (no box)."""

    name: str
    box: Box | None
    place: Place


def read(folder: Path) -> Foreign:
    """What a DCP folder holds. Raises ForeignRefused, ForeignDamaged, ImportRefused."""
    path = folder / METADATA
    if not path.exists():
        raise ImportRefused(
            f"{folder} has no {METADATA}; name the folder that torch.distributed.checkpoint has saved"
        )
    (metadata,) = describe([Place(path)])
    try:
        entries, places = (metadata.state[key] for key in ("state_dict_metadata", "storage_data"))
        shapes = {name: tuple(entry.state["size"]) for name, entry in entries.items() if entry.state}
        items = list(_items(folder, entries, places))
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise ForeignDamaged(f"{path} is no index of torch.distributed.checkpoint: {error}") from error
    values = describe([item.place for item in items])
    objects = {item.name: value for item, value in zip(items, values, strict=True) if item.box is None}
    sources = _sources(shapes, [(item, value) for item, value in zip(items, values, strict=True) if item.box])
    return Foreign(sources, _scalars(objects, {source.name for source in sources}))


def _items(folder: Path, entries: Mapping[str, Record], places: Mapping[Any, Record]) -> Iterator[_Item]:
    chunks = {
        name: {tuple(one.state["offsets"]): tuple(one.state["sizes"]) for one in entry.state["chunks"]}
        for name, entry in entries.items()
        if entry.state
    }
    for index, where in places.items():
        key, info = dict(index.state), where.state
        name, box = key["fqn"], None
        if name in chunks:
            offset = tuple(key.get("offset") or (0,) * len(entries[name].state["size"]))
            box = Box(offset, chunks[name][offset])
        if info.get("transform_descriptors"):
            raise ForeignRefused(
                f"{name} is stored through {info['transform_descriptors']}; save it without extensions"
            )
        yield _Item(name, box, Place(_inside(folder, info["relative_path"]), info["offset"], info["length"]))


def _sources(shapes: Mapping[str, tuple[int, ...]], found: Sequence[tuple[_Item, Any]]) -> list[Source]:
    chunks: dict[str, list[Chunk]] = {name: [] for name in shapes}
    types: dict[str, str] = {}
    for item, value in found:
        if item.box is None or not isinstance(value, Described) or value.shape != item.box.shape:
            raise ForeignDamaged(f"{item.place.path}: {item.name} is not the tensor that {METADATA} names")
        if types.setdefault(item.name, value.dtype) != value.dtype:
            raise ForeignDamaged(
                f"{item.place.path}: {item.name} is {value.dtype} there and {types[item.name]} elsewhere"
            )
        chunks[item.name].append(Chunk(item.box, item.place.path, value.start))
    for name in shapes.keys() - types.keys():
        raise ForeignDamaged(f"{METADATA} does not say where {name} lies")
    return [Source(_to_ours(name), types[name], shape, tuple(chunks[name])) for name, shape in shapes.items()]


def _inside(folder: Path, name: str) -> Path:
    path = (folder / name).resolve()
    if not path.is_relative_to(folder.resolve()):
        raise ForeignRefused(f"{folder / METADATA} names {name[:200]!r}, which is outside the folder")
    if not path.is_file():
        raise ForeignDamaged(f"{path} is missing; copy the folder anew")
    return path


def _to_ours(name: str) -> str:
    return OPTIM + name.removeprefix(STATE) if name.startswith(STATE) else name


def _scalars(objects: Mapping[str, Any], tensors: set[str]) -> dict[str, Json]:
    scalars = {_to_ours(name): value for name, value in objects.items() if not name.startswith(GROUPS)}
    options = {name.removeprefix(GROUPS): value for name, value in objects.items() if name.startswith(GROUPS)}
    return scalars | scalars_of(_groups(options, tensors))


def _groups(options: Mapping[str, Any], tensors: set[str]) -> list[Group]:
    """Of flat names (`<parameter>.lr`) or nested ones (`0.lr`, `0.params.3`)."""
    flat: dict[str, dict[str, Any]] = {}
    nested: dict[int, dict[str, Any]] = {}
    members: dict[int, list[str]] = {}
    for name, value in options.items():
        owner, _, key = name.rpartition(".")
        number, _, params = owner.partition(".")
        if MODEL + owner in tensors:
            flat.setdefault(owner, {})[key] = value
        elif params == "params":
            members.setdefault(int(number), []).append(value)
        elif key == "params":
            members.setdefault(int(owner), []).extend(value)
        else:
            nested.setdefault(int(owner), {})[key] = value
    if nested:
        return [Group(tuple(members.get(index, ())), given) for index, given in sorted(nested.items())]
    return _together(flat)


def _together(flat: Mapping[str, dict[str, Any]]) -> list[Group]:
    """Parameters with equal options are one group, in the order in which they come."""
    found: list[tuple[list[str], dict[str, Any]]] = []
    for name, options in flat.items():
        same = next((names for names, given in found if given == options), None)
        if same is None:
            found.append(([name], options))
        else:
            same.append(name)
    return [Group(tuple(names), options) for names, options in found]
