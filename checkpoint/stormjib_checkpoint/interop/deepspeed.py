"""DeepSpeed's universal checkpoints, out and in, with the optimizer. DeepSpeed itself is never imported.

A folder for each parameter, `zero/<parameter>/{fp32,exp_avg,exp_avg_sq,step}.pt`. What ZeRO-1 and -2 leave are dicts with the tensor under
`param`, which ZeRO-3 reads too, so that is what is written. What ZeRO-3 leaves are flat tensors; their shapes are in `*_model_states.pt`.
"""

from __future__ import annotations

import struct
from collections import OrderedDict
from math import prod
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from stormjib_checkpoint.boxes import whole
from stormjib_checkpoint.errors import ExportRefused, ForeignDamaged, ImportRefused
from stormjib_checkpoint.interop import torchzip
from stormjib_checkpoint.interop.foreign import Chunk, Described, Foreign, Place, Source, describe
from stormjib_checkpoint.interop.optimizer import (
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

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from stormjib_checkpoint.reader import Checkpoint

VERSION = "0.19.8"
"""Of the DeepSpeed whose files these are like; its readers want one."""
WEIGHT = "fp32"
PARAM = "param"
OPTIMIZER = "optimizer_state.pt"
LATEST = "latest_universal"
MODEL_STATES = ("mp_rank_00_model_states.pt", "zero_pp_rank_0_mp_rank_00_model_states.pt")
"""Where ZeRO-1 and -2 look for what is no tensor, and where ZeRO-3 does."""


# --- out --------------------------------------------------------------------------------------------------------------


def export(checkpoint: Checkpoint, folder: Path, step: int) -> None:
    """Write step `step` into a new folder, for `load_checkpoint(folder)` with `load_universal`. Raises ExportRefused, LoadError."""
    found = groups(checkpoint)
    if not found:
        raise ExportRefused(
            "no groups of an optimizer are saved, and DeepSpeed loads none without; save the optimizer with the model"
        )
    for owner in parameters(checkpoint):
        if MODEL + owner not in checkpoint.atoms:
            raise ExportRefused(f"{OPTIM}{owner} is the state of no parameter: there is no {MODEL}{owner}")
    new_folder(folder)
    place = folder / f"global_step{step}_universal"
    _tensors(checkpoint, place / "zero")
    done = float(step if (told := steps_done(checkpoint)) is None else told)
    for owner, keys in parameters(checkpoint).items():
        if STEP not in keys:
            torch.save(torch.tensor(done), place / "zero" / owner / f"{STEP}.pt")
    torch.save(_global(found, done), place / "zero" / OPTIMIZER)
    shapes = [
        OrderedDict((n, torch.Size(checkpoint.atoms[MODEL + n].shape)) for n in group.names)
        for group in found
    ]
    for name in MODEL_STATES:
        torch.save(_model_states(step, shapes), place / name)
    (folder / LATEST).write_text(place.name, "utf-8")


def _tensors(checkpoint: Checkpoint, zero: Path) -> None:
    """A file for each state of each parameter that the optimizer has."""
    owners = parameters(checkpoint)
    names = [
        n
        for owner, keys in owners.items()
        for n in (MODEL + owner, *(f"{OPTIM}{owner}.{key}" for key in keys))
    ]
    for name, parts in streams(checkpoint, names):
        owner, key = (name.removeprefix(MODEL), WEIGHT) if name.startswith(MODEL) else _owner(name)
        atom = checkpoint.atoms[name]
        tensor = torchzip.Streamed(atom.dtype, atom.shape)
        (zero / owner).mkdir(parents=True, exist_ok=True)
        value: Any = tensor if key == STEP else {PARAM: tensor, "cat_dim": 0}
        torchzip.save(zero / owner / f"{key}.pt", value, [parts])


def _owner(name: str) -> tuple[str, str]:
    owner, _, key = name.removeprefix(OPTIM).rpartition(".")
    return owner, key


def _global(found: Sequence[Group], done: float) -> dict[str, Any]:
    """What belongs to no parameter; twice, as ZeRO-1 and -2 and as ZeRO-3 look for it."""
    numbered, first = [], 0
    for group in found:
        numbered.append({**group.options, "params": list(range(first, first + len(group.names)))})
        first += len(group.names)
    inner = {"state": {0: {STEP: torch.tensor(done)}}, "param_groups": numbered}
    return {"ds_version": VERSION, "overflow": False, "param_groups": numbered, "optimizer_state_dict": inner}


def _model_states(step: int, shapes: Sequence[Mapping[str, torch.Size]]) -> dict[str, Any]:
    return {
        "module": {},
        "param_shapes": list(shapes),
        "dp_world_size": 1,
        "mp_world_size": 1,
        "global_steps": step,
        "skipped_steps": 0,
        "lr_scheduler": None,
        "ds_version": VERSION,
    }


# --- in ---------------------------------------------------------------------------------------------------------------


class _File(NamedTuple):
    """One state of one parameter."""

    owner: str
    key: str
    path: Path


def read(folder: Path) -> Foreign:
    """What a universal checkpoint holds: the folder that has `zero` in it, or the one above with `latest_universal`.

    Raises ForeignRefused, ForeignDamaged, ImportRefused.
    """
    place = _place(folder)
    zero = place / "zero"
    files = [
        _File(str(path.parent.relative_to(zero)), path.stem, path) for path in sorted(zero.glob("*/*.pt"))
    ]
    if not files:
        raise ImportRefused(f"{zero} has no parameters; run DeepSpeed's ds_to_universal.py first")
    shapes, whole_optimizer = _shapes(place), _described(zero / OPTIMIZER)
    sources = [
        _source(file, value, shapes)
        for file, value in zip(files, describe([Place(file.path) for file in files]), strict=True)
    ]
    sources += _missing_steps(files, whole_optimizer)
    found, notes = _groups(whole_optimizer, shapes, files)
    return Foreign(sources, scalars_of(found), notes)


def _place(folder: Path) -> Path:
    latest = folder / LATEST
    if (folder / "zero").is_dir() or not latest.is_file():
        return folder
    name = latest.read_text("utf-8").strip()
    if "/" in name or name in ("", ".", ".."):
        raise ForeignDamaged(f"{latest} names {name[:200]!r}, which is no folder beside it")
    return folder / name


def _described(path: Path) -> Any:
    return describe([Place(path)])[0] if path.exists() else {}


def _shapes(place: Path) -> list[dict[str, tuple[int, ...]]]:
    """By group; the ranks' files say the same."""
    states = sorted(place.glob("*mp_rank_00_model_states.pt"))
    if not states:
        return []
    told = _described(states[0])
    shapes = told.get("param_shapes") or [] if isinstance(told, dict) else []
    return [dict(group) for group in (shapes if isinstance(shapes, list) else [shapes])]


def _source(file: _File, value: Any, shapes: Sequence[Mapping[str, tuple[int, ...]]]) -> Source:
    name = MODEL + file.owner if file.key == WEIGHT else f"{OPTIM}{file.owner}.{file.key}"
    if file.key == STEP:
        return _step(name, file, value)
    flat = isinstance(value, Described)
    tensor = value if flat else value.get(PARAM) if isinstance(value, dict) else None
    if not isinstance(tensor, Described):
        raise ForeignDamaged(f"{file.path} holds no tensor under {PARAM!r}")
    shape = next((group[file.owner] for group in shapes if file.owner in group), None)
    if shape is None and flat:
        raise ImportRefused(
            f"{file.path} is a flat tensor of ZeRO-3, and no *_model_states.pt beside zero/ says its shape; copy that file too"
        )
    shape = tensor.shape if shape is None else tuple(shape)
    if prod(shape) != prod(tensor.shape):
        raise ForeignDamaged(
            f"{file.path} has {prod(tensor.shape)} elements, and {file.owner} has shape {list(shape)}"
        )
    return Source(name, tensor.dtype, shape, (Chunk(whole(shape), file.path, tensor.start),))


def _step(name: str, file: _File, value: Any) -> Source:
    if isinstance(value, Described) and not value.shape:
        return Source(name, value.dtype, (), (Chunk(whole(()), file.path, value.start),))
    if type(value) not in (int, float):
        raise ForeignDamaged(f"{file.path} holds no number of steps")
    return _number(name, value)


def _number(name: str, value: float) -> Source:
    """As torch's optimizers have it."""
    return Source(name, "F32", (), (Chunk(whole(()), struct.pack("<f", value), 0),))


def _missing_steps(files: Sequence[_File], optimizer: Any) -> list[Source]:
    """ZeRO-3 has one number for all."""
    if any(file.key == STEP for file in files):
        return []
    try:
        step = optimizer["optimizer_state_dict"]["state"][0][STEP]
    except (KeyError, TypeError, IndexError):
        return []
    owners = sorted({file.owner for file in files})
    if isinstance(step, Described):
        return [
            Source(
                f"{OPTIM}{owner}.{STEP}", step.dtype, (), (Chunk(whole(()), _optimizer(files), step.start),)
            )
            for owner in owners
        ]
    return [_number(f"{OPTIM}{owner}.{STEP}", step) for owner in owners]


def _optimizer(files: Sequence[_File]) -> Path:
    return files[0].path.parent.parent / OPTIMIZER


def _groups(
    optimizer: Any, shapes: Sequence[Mapping[str, Any]], files: Sequence[_File]
) -> tuple[list[Group], tuple[str, ...]]:
    """Options by group. Which parameters belong to which, only the shapes say, and ZeRO-3's are cut otherwise."""
    given = optimizer.get("param_groups", []) if isinstance(optimizer, dict) else []
    options = [{key: value for key, value in group.items() if key != "params"} for group in given]
    if len(options) == 1:
        names = [name for group in shapes for name in group] or sorted({file.owner for file in files})
        return [Group(tuple(names), options[0])], ()
    if len(options) == len(shapes):
        return [Group(tuple(names), one) for names, one in zip(shapes, options, strict=True)], ()
    return [], (
        f"{len(options)} groups of the optimizer are left out: the files do not say which parameters are in which",
    )
