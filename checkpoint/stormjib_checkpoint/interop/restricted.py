"""What a foreign pickle says, without doing what it says. Run as a file, in a process of its own; standard library only.

In: one JSON line `[path, offset, length]` after the other, a pickle or an archive of torch each (length null: to the end of the file). Out:
one JSON line each, `{"value": ...}` or `{"error": ...}`. A pickle can name only what `ALLOWED` lists, and gets a record or a placeholder
for it, never the thing itself: nothing of torch is imported here, and nothing is called but what stands below.
"""

from __future__ import annotations

import base64
import io
import json
import pickle
import resource
import struct
import sys
import zipfile
from dataclasses import dataclass
from typing import IO, TYPE_CHECKING, Any, Self

if TYPE_CHECKING:
    from collections.abc import Iterator

MAX_PICKLE = 256 * 1024 * 1024
"""Bytes of one pickle."""
CPU_S = 600
NODES_A_BYTE = 4
"""Values that a pickle may be made of for each of its bytes, shared ones counted as often as they are met."""
MAX_DEPTH = 64

_STORAGES = {
    "DoubleStorage": "F64", "FloatStorage": "F32", "HalfStorage": "F16", "BFloat16Storage": "BF16",
    "LongStorage": "I64", "IntStorage": "I32", "ShortStorage": "I16", "CharStorage": "I8", "ByteStorage": "U8",
    "BoolStorage": "BOOL", "ComplexFloatStorage": "C64", "ComplexDoubleStorage": "C128",
}  # fmt: skip
_DTYPES = {
    "float64": "F64", "float32": "F32", "float16": "F16", "bfloat16": "BF16", "int64": "I64", "int32": "I32",
    "int16": "I16", "int8": "I8", "uint8": "U8", "uint16": "U16", "uint32": "U32", "uint64": "U64", "bool": "BOOL",
    "complex64": "C64", "complex128": "C128", "float8_e4m3fn": "F8_E4M3", "float8_e5m2": "F8_E5M2",
    "float8_e4m3fnuz": "F8_E4M3FNUZ", "float8_e5m2fnuz": "F8_E5M2FNUZ", "float8_e8m0fnu": "F8_E8M0",
}  # fmt: skip
_ITEM = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U8": 1, "U16": 2}
_ITEM |= {"U32": 4, "U64": 8, "BOOL": 1, "C64": 8, "C128": 16}
_ITEM |= {name: 1 for name in ("F8_E4M3", "F8_E5M2", "F8_E4M3FNUZ", "F8_E5M2FNUZ", "F8_E8M0")}


class RefusedError(Exception):
    """The pickle asks for what is not allowed, or is damaged."""


@dataclass(frozen=True)
class Kind:
    """The type of a storage, or a dtype, by its tag; empty: bytes of no type."""

    tag: str


@dataclass(frozen=True)
class Stored:
    """A storage: its type, its name in the archive, and its length in elements."""

    tag: str
    key: str
    length: int


@dataclass(frozen=True)
class Tensor:
    """What a tensor is, without its bytes."""

    tag: str
    storage: Stored
    offset: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]


class Record:
    """An object of a class that is known by name only."""

    arguments: tuple[Any, ...]
    state: Any

    def __new__(cls, *arguments: Any) -> Self:
        self = super().__new__(cls)
        self.arguments, self.state = arguments, None
        return self

    def __init__(self, *_arguments: Any) -> None:
        """A pickle may go past it."""

    def __setstate__(self, state: Any) -> None:
        self.state = state


class Ordered(dict[Any, Any]):
    """An OrderedDict. Torch hangs attributes on those of a model, which say nothing of its tensors."""

    def __setstate__(self, state: Any) -> None:
        """Left out."""


def _numbers(value: Any) -> tuple[int, ...]:
    if not isinstance(value, (tuple, list)) or not all(type(n) is int and 0 <= n < 2**63 for n in value):
        raise RefusedError("sizes that are no numbers")
    return tuple(value)


def _tensor(storage: Any, offset: Any, shape: Any, stride: Any, *rest: Any) -> Tensor:
    """As torch's own functions of these names are called; `rest` says nothing of the bytes, but for a dtype."""
    kinds = [one.tag for one in rest if isinstance(one, Kind)]
    if not isinstance(storage, Stored):
        raise RefusedError("a tensor without a storage")
    (offset,) = _numbers([offset])
    return Tensor(kinds[0] if kinds else storage.tag, storage, offset, _numbers(shape), _numbers(stride))


def _parameter(tensor: Any, *_rest: Any) -> Any:
    return tensor


def _of_type(build: Any, _kind: Any, arguments: Any, _state: Any) -> Any:
    """A tensor that has attributes, or is of a class of its own; both are left out."""
    if build not in (_tensor, _parameter) or type(arguments) is not tuple:
        raise RefusedError("an object of torch that is no tensor")
    return build(*arguments)


def _size(value: Any = ()) -> tuple[int, ...]:
    return _numbers(value)


def _path(*parts: Any) -> str:
    return "/".join(str(part)[:4096] for part in parts[:64])


def _nothing(*_arguments: Any) -> None:
    return None


def _text_bytes(text: Any = "", encoding: Any = "latin1") -> bytes:
    """How protocol 2 writes bytes."""
    if type(text) is not str or encoding != "latin1":
        raise RefusedError("bytes that are no text")
    return text.encode("latin1")


def _record(name: str) -> type[Record]:
    return type(name, (Record,), {})


_DCP = "torch.distributed.checkpoint."
_RECORDS = (
    *(_DCP + "metadata." + name for name in (
        "Metadata", "MetadataIndex", "TensorStorageMetadata", "BytesStorageMetadata", "ChunkStorageMetadata",
        "TensorProperties", "_MEM_FORMAT_ENCODING", "StorageMeta",
    )),
    _DCP + "filesystem._StorageInfo",
    _DCP + "filesystem._StoragePrefix",
    "deepspeed.checkpoint.universal_checkpoint.SubparamShape",
    "deepspeed.runtime.fp16.loss_scaler.LossScaler",
    "deepspeed.runtime.fp16.loss_scaler.DynamicLossScaler",
    "deepspeed.runtime.zero.config.ZeroStageEnum",
    "deepspeed.utils.tensor_fragment.fragment_address",
)  # fmt: skip

ALLOWED: dict[str, Any] = {
    **{f"torch.{name}": Kind(tag) for name, tag in (_STORAGES | _DTYPES).items()},
    "torch.storage.UntypedStorage": Kind(""),
    "torch.UntypedStorage": Kind(""),
    "torch._utils._rebuild_tensor_v2": _tensor,
    "torch._utils._rebuild_tensor_v3": _tensor,
    "torch._utils._rebuild_parameter": _parameter,
    "torch._utils._rebuild_parameter_with_state": _parameter,
    "torch._tensor._rebuild_from_type_v2": _of_type,
    "torch.Tensor": _nothing,
    "torch.nn.parameter.Parameter": _nothing,
    "torch.Size": _size,
    "torch.serialization._get_layout": _nothing,
    "torch.device": _nothing,
    "collections.OrderedDict": Ordered,
    "collections.defaultdict": _nothing,
    "_codecs.encode": _text_bytes,
    "pathlib.PosixPath": _path,
    "pathlib._local.PosixPath": _path,
    **{name: _record(name) for name in _RECORDS},
}
"""Everything that a pickle may name."""


class Restricted(pickle.Unpickler):
    """Looks names up in `ALLOWED` and nowhere else."""

    def find_class(self, module: str, name: str) -> Any:
        try:
            return ALLOWED[f"{module}.{name}"]
        except KeyError:
            raise RefusedError(f"it names {module}.{name}"[:400]) from None

    def persistent_load(self, identity: Any) -> Stored:
        """Torch keeps storages outside the pickle: ("storage", type, key, device, elements)."""
        match identity:
            case ("storage", Kind(tag), str(key), str(), int(length)) if length >= 0:
                return Stored(tag, key, length)
        raise RefusedError("a persistent object that is no storage of torch")


# --- archives of torch ------------------------------------------------------------------------------------------------


class _Window(io.RawIOBase):
    """A part of a file as a file."""

    def __init__(self, file: IO[bytes], start: int, length: int) -> None:
        self._file, self._start, self._length, self._at = file, start, length, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = 0) -> int:
        self._at = (0, self._at, self._length)[whence] + offset
        if self._at < 0:
            raise OSError("before the start")
        return self._at

    def tell(self) -> int:
        return self._at

    def readinto(self, buffer: Any) -> int:
        count = max(0, min(len(buffer), self._length - self._at))
        self._file.seek(self._start + self._at)
        data = self._file.read(count)
        buffer[: len(data)] = data
        self._at += len(data)
        return len(data)


def described(path: str, offset: int, length: int | None) -> Any:
    """What lies there as JSON. Tensors are `{"$tensor": [tag, shape, first byte in the file]}`. Raises RefusedError."""
    with open(path, "rb") as file:
        end = file.seek(0, io.SEEK_END)
        length = end - offset if length is None else length
        if not 0 <= offset <= offset + length <= end:
            raise RefusedError(f"it ends at byte {end}, before byte {offset + length}")
        window = io.BufferedReader(_Window(file, offset, length))
        if window.peek(4)[:4] == b"PK\x03\x04":
            with zipfile.ZipFile(window) as archive:
                return _archived(archive, window, offset)
        return plain(_unpickled(window, length), {}, length)


def _archived(archive: zipfile.ZipFile, window: io.BufferedReader[_Window], offset: int) -> Any:
    entries = {name.partition("/")[2]: entry for entry in archive.infolist() for name in [entry.filename]}
    if "data.pkl" not in entries:
        raise RefusedError("an archive without data.pkl")
    order = entries.get("byteorder")
    if order is not None and _raw(window, order, 16) != b"little":
        raise RefusedError("an archive of a big-endian machine")
    if any(entry.compress_type != zipfile.ZIP_STORED for entry in entries.values()):
        raise RefusedError("a compressed archive")
    data = entries["data.pkl"]
    value = _unpickled(io.BytesIO(_raw(window, data, MAX_PICKLE)), data.file_size)
    places: dict[str, tuple[int, int]] = {}
    for name, entry in entries.items():
        if name.startswith("data/"):
            places[name[5:]] = (offset + _data_start(window, entry.header_offset), entry.file_size)
    return plain(value, places, data.file_size)


def _raw(window: io.BufferedReader[_Window], entry: zipfile.ZipInfo, limit: int) -> bytes:
    """Of an entry that is not compressed. Its checksum is not asked: torch need not have written one."""
    window.seek(_data_start(window, entry.header_offset))
    return window.read(min(entry.file_size, limit))


def _data_start(window: io.BufferedReader[_Window], header: int) -> int:
    window.seek(header)
    local = window.read(30)
    if len(local) < 30 or local[:4] != b"PK\x03\x04":
        raise RefusedError("a damaged archive")
    name, extra = struct.unpack("<HH", local[26:30])
    return int(header + 30 + name + extra)


def _unpickled(file: Any, size: int) -> Any:
    if size > MAX_PICKLE:
        raise RefusedError(f"a pickle of {size} bytes; {MAX_PICKLE} are read")
    return Restricted(file).load()


# --- as JSON ----------------------------------------------------------------------------------------------------------


def plain(value: Any, places: dict[str, tuple[int, int]], size: int) -> Any:
    """A value as JSON: `$tensor`, `$tuple`, `$dict` (pairs), `$record` (name, arguments, state), `$bytes`, `$float`, `$tag` (a dtype)."""
    return _Plain(places, 1000 + size * NODES_A_BYTE).of(value, 0)


class _Plain:
    def __init__(self, places: dict[str, tuple[int, int]], nodes: int) -> None:
        self._places, self._left = places, nodes

    def of(self, value: Any, depth: int) -> Any:
        self._left -= 1
        if depth > MAX_DEPTH or self._left < 0:
            raise RefusedError(f"values deeper than {MAX_DEPTH}, or more than its length can be meant to say")
        if value is None or type(value) in (bool, str, int):
            return value
        if type(value) is float:
            return value if value - value == 0 else {"$float": repr(value)}
        if type(value) in (list, tuple):
            items = [self.of(item, depth + 1) for item in value]
            return items if type(value) is list else {"$tuple": items}
        if type(value) in (dict, Ordered):
            return {"$dict": [[self.of(k, depth + 1), self.of(v, depth + 1)] for k, v in value.items()]}
        return self._object(value, depth)

    def _object(self, value: Any, depth: int) -> Any:
        if type(value) is bytes:
            return {"$bytes": base64.b64encode(value).decode()}
        if type(value) is Tensor:
            return {"$tensor": self._tensor(value)}
        if type(value) is Kind:
            return {"$tag": value.tag}
        if isinstance(value, Record):
            arguments = [self.of(item, depth + 1) for item in value.arguments]
            return {"$record": [type(value).__name__, arguments, self.of(value.state, depth + 1)]}
        raise RefusedError(f"a {type(value).__name__}")

    def _tensor(self, tensor: Tensor) -> list[Any]:
        place, size = self._places.get(tensor.storage.key, (0, -1))
        item = _ITEM.get(tensor.tag, 0)
        count = 1
        for side in tensor.shape:
            count *= side
        if not item or (tensor.offset + count) * item > size:
            raise RefusedError(f"a tensor of {tensor.shape} that its storage does not hold")
        if count and tensor.stride != _contiguous(tensor.shape, tensor.stride):
            raise RefusedError(f"a tensor of {tensor.shape} that is not contiguous")
        return [tensor.tag, list(tensor.shape), place + tensor.offset * item]


def _contiguous(shape: tuple[int, ...], stride: tuple[int, ...]) -> tuple[int, ...]:
    """The strides that row-major elements have; a side of 1 may say anything."""
    wanted, step = [], 1
    for side, given in zip(reversed(shape), reversed(stride), strict=True):
        wanted.append(given if side == 1 else step)
        step *= side
    return tuple(reversed(wanted))


def _answers(lines: Iterator[str]) -> Iterator[dict[str, Any]]:
    for line in lines:
        path, offset, length = json.loads(line)
        try:
            yield {"value": described(path, offset, length)}
        except RefusedError as error:
            yield {"error": str(error)}
        except MemoryError:
            yield {"error": "it needs more memory than a reader gets"}
        except Exception as error:  # noqa: BLE001  a damaged pickle can fail in any way, and all of them mean that
            yield {"error": f"{type(error).__name__}: {error}"[:400]}


def main() -> None:
    """Answer until the input ends. The one argument is how many bytes of memory there are."""
    memory = int(sys.argv[1])
    resource.setrlimit(resource.RLIMIT_AS, (memory, memory))
    resource.setrlimit(resource.RLIMIT_CPU, (CPU_S, CPU_S))
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))
    for answer in _answers(iter(sys.stdin)):
        sys.stdout.write(json.dumps(answer, allow_nan=False, separators=(",", ":")) + "\n")


if __name__ == "__main__":
    main()
