"""Archives as `torch.save` writes them, with tensors streamed in: none has to be in memory, and none is pickled."""

from __future__ import annotations

import io
import pickle
import struct
import zipfile
from collections import OrderedDict
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from stormjib_checkpoint.errors import ExportRefused
from stormjib_checkpoint.format import ITEM_BYTES

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping
    from pathlib import Path

_STORAGES: Mapping[str, type] = {
    "F64": torch.DoubleStorage, "F32": torch.FloatStorage, "F16": torch.HalfStorage, "BF16": torch.BFloat16Storage,
    "I64": torch.LongStorage, "I32": torch.IntStorage, "I16": torch.ShortStorage, "I8": torch.CharStorage,
    "U8": torch.ByteStorage, "BOOL": torch.BoolStorage, "C64": torch.ComplexFloatStorage,
    "C128": torch.ComplexDoubleStorage,
}  # fmt: skip
ALIGNMENT = 64
"""Of a tensor's first byte in the archive, as torch has it."""


class Streamed(NamedTuple):
    """Stands for a tensor in what is saved; its bytes come when they are written."""

    dtype: str
    shape: tuple[int, ...]


class _Storage(NamedTuple):
    key: str
    dtype: str
    length: int


def save(path: Path, value: Any, streams: Iterable[Iterator[memoryview]]) -> None:
    """Save `value`, in which each `Streamed` takes the next of `streams`. Raises ExportRefused where torch has no storage for a type."""
    with path.open("xb") as file:
        write(file, value, streams)


def write(file: io.BufferedWriter | io.BytesIO, value: Any, streams: Iterable[Iterator[memoryview]]) -> None:
    """As `save`, into a file that begins here."""
    pickled = io.BytesIO()
    pickler = _Pickler(pickled, 2)
    pickler.dump(value)
    with zipfile.ZipFile(file, "w", zipfile.ZIP_STORED) as archive:
        archive.writestr("archive/data.pkl", pickled.getvalue())
        archive.writestr("archive/byteorder", b"little")
        for storage, stream in zip(pickler.storages, streams, strict=True):
            _entry(archive, file, storage, stream)
        archive.writestr("archive/version", b"3\n")


def _entry(
    archive: zipfile.ZipFile,
    file: io.BufferedWriter | io.BytesIO,
    storage: _Storage,
    stream: Iterator[memoryview],
) -> None:
    entry = zipfile.ZipInfo(f"archive/data/{storage.key}")
    entry.file_size = storage.length * ITEM_BYTES[storage.dtype]
    large = entry.file_size * 1.05 > zipfile.ZIP64_LIMIT  # as zipfile asks itself
    begin = file.tell() + 30 + len(entry.filename) + (20 if large else 0) + 4
    padding = -begin % ALIGNMENT
    entry.extra = struct.pack("<HH", 0x4246, padding) + b"Z" * padding
    with archive.open(entry, "w") as into:
        for part in stream:
            into.write(part)


class _Pickler(pickle.Pickler):
    """Writes the names that `torch.save` writes, and keeps storages outside."""

    def __init__(self, file: io.BytesIO, protocol: int) -> None:
        super().__init__(file, protocol)
        self.storages: list[_Storage] = []

    def reducer_override(self, value: Any) -> Any:
        if not isinstance(value, Streamed):
            return NotImplemented
        if value.dtype not in _STORAGES:
            raise ExportRefused(
                f"a tensor of type {value.dtype}: torch's archives of this kind hold {', '.join(_STORAGES)}"
            )
        storage = _Storage(str(len(self.storages)), value.dtype, torch.Size(value.shape).numel())
        self.storages.append(storage)
        hooks: OrderedDict[str, Any] = OrderedDict()
        arguments = (storage, 0, tuple(value.shape), _strides(value.shape), False, hooks)
        return torch._utils._rebuild_tensor_v2, arguments

    def persistent_id(self, value: Any) -> Any:
        if not isinstance(value, _Storage):
            return None
        return ("storage", _STORAGES[value.dtype], value.key, "cpu", value.length)


def _strides(shape: tuple[int, ...]) -> tuple[int, ...]:
    strides, step = [], 1
    for side in reversed(shape):
        strides.append(step)
        step *= max(side, 1)
    return tuple(reversed(strides))
