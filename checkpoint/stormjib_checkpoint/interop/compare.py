"""Two steps side by side, and one tensor by itself; by atom, so it does not matter on how many ranks they were saved."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from stormjib_checkpoint.errors import ExportRefused, StateMismatch
from stormjib_checkpoint.format import ITEM_BYTES
from stormjib_checkpoint.interop.outflow import streams
from stormjib_checkpoint.objects import to_json
from stormjib_checkpoint.records import canonical
from stormjib_checkpoint.tensors import ABSENT, DTYPES

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from stormjib_checkpoint.index import IndexAtom
    from stormjib_checkpoint.reader import Checkpoint

HEAD = 8
"""Elements that are shown of a tensor."""
_NUMPY = {
    "F64": "<f8", "F32": "<f4", "F16": "<f2", "BF16": "<f4", "I64": "<i8", "I32": "<i4", "I16": "<i2", "I8": "|i1",
    "U64": "<u8", "U32": "<u4", "U16": "<u2", "U8": "|u1", "BOOL": "|b1", "C64": "<c8", "C128": "<c16",
}  # fmt: skip
"""BF16 is widened, which loses nothing: numpy does not have it."""


def differences(one: Checkpoint, other: Checkpoint) -> Iterator[tuple[str, str]]:
    """Name, and how the two differ in it. Bytes are read only of tensors whose digests are not there and equal. Raises DamagedCheckpoint, StorageError."""
    for name in sorted(one.atoms.keys() | one.scalars.keys() | other.atoms.keys() | other.scalars.keys()):
        why = _difference(name, one, other)
        if why is not None:
            yield name, why


def _difference(name: str, one: Checkpoint, other: Checkpoint) -> str | None:
    a, b = _kind(name, one), _kind(name, other)
    if a != b:
        return f"{a} in the first, {b} in the second"
    if name in one.scalars:
        pair = one.scalars[name], other.scalars[name]
        equal = pair[0] is pair[1] or (
            ABSENT not in pair and len({canonical(to_json(v, name)) for v in pair}) == 1
        )
        return None if equal else f"{pair[0]!r} in the first, {pair[1]!r} in the second"
    digest = one.atoms[name].digest
    if digest is not None and digest == other.atoms[name].digest:
        return None
    count = _unequal(name, one, other)
    return f"{count} of {torch.Size(one.atoms[name].shape).numel()} elements differ" if count else None


def _kind(name: str, checkpoint: Checkpoint) -> str:
    if name in checkpoint.scalars:
        return "absent" if checkpoint.scalars[name] is ABSENT else "a value"
    atom = checkpoint.atoms.get(name)
    return "missing" if atom is None else f"{atom.dtype} {list(atom.shape)}"


def _unequal(name: str, one: Checkpoint, other: Checkpoint) -> int:
    size, count = ITEM_BYTES[one.atoms[name].dtype], 0
    for (_, ours), (_, theirs) in zip(streams(one, [name]), streams(other, [name]), strict=True):
        for a, b in zip(ours, theirs, strict=True):
            if a != b:
                pair = [torch.frombuffer(part, dtype=torch.uint8).view(-1, size) for part in (a, b)]
                count += int((pair[0] != pair[1]).any(dim=1).sum())
    return count


class Facts(NamedTuple):
    """A tensor in numbers; of one without elements, or of complex numbers, only what is there."""

    dtype: str
    shape: tuple[int, ...]
    head: list[Any]
    nans: int
    smallest: float | None
    largest: float | None
    mean: float | None
    norm: float | None


def facts(checkpoint: Checkpoint, name: str) -> Facts:
    """Read a tensor once. NaN counts for nothing but `nans`. Raises StateMismatch where there is none of that name, LoadError."""
    atom = _atom(checkpoint, name)
    head: list[Any] = []
    nans, count, total, squares = 0, 0, 0.0, 0.0
    ends: list[float] = []
    for part in _tensors(checkpoint, name, atom):
        head += part[: max(0, HEAD - len(head))].tolist()
        if part.is_complex() or not part.numel():
            continue
        numbers = part.double()
        good = numbers[~numbers.isnan()]
        nans += numbers.numel() - good.numel()
        count += good.numel()
        total, squares = total + float(good.sum()), squares + float((good * good).sum())
        ends += [float(good.min()), float(good.max())] if good.numel() else []
    told = (min(ends), max(ends), total / count, squares**0.5) if ends else (None,) * 4
    return Facts(atom.dtype, atom.shape, head, nans, *told)


def to_npy(checkpoint: Checkpoint, name: str, path: Path) -> None:
    """Write a tensor as numpy has it. Raises ExportRefused where numpy lacks the type, StateMismatch, LoadError."""
    atom = _atom(checkpoint, name)
    if atom.dtype not in _NUMPY:
        raise ExportRefused(f"{name} is {atom.dtype}, which numpy does not have; it has {', '.join(_NUMPY)}")
    fields = f"{{'descr': '{_NUMPY[atom.dtype]}', 'fortran_order': False, 'shape': {tuple(atom.shape)}, }}"
    text = fields.ljust(-(-(len(fields) + 11) // 64) * 64 - 11) + "\n"
    with path.open("xb") as file:
        file.write(b"\x93NUMPY\x01\x00" + len(text).to_bytes(2, "little") + text.encode())
        for part in _tensors(checkpoint, name, atom):
            file.write((part.float() if atom.dtype == "BF16" else part).numpy().data)


def _atom(checkpoint: Checkpoint, name: str) -> IndexAtom:
    if name not in checkpoint.atoms:
        raise StateMismatch(f"there is no tensor {name}; `stormjib ckpt show` lists them")
    return checkpoint.atoms[name]


def _tensors(checkpoint: Checkpoint, name: str, atom: IndexAtom) -> Iterator[torch.Tensor]:
    """The elements in order, as flat tensors."""
    dtype = DTYPES[atom.dtype]
    for _, parts in streams(checkpoint, [name]):
        for part in parts:
            yield (
                torch.frombuffer(part, dtype=torch.uint8).view(dtype)
                if len(part)
                else torch.empty(0, dtype=dtype)
            )
