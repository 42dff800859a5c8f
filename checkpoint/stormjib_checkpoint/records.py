"""Frozen records as canonical JSON, and strictly back: the files may be damaged, or written by somebody hostile.

Out: sorted keys, no blanks, a newline at the end, so that equal records are equal bytes. In: every type is checked,
keys may not come twice, NaN is refused, a missing key is named; unknown keys are ignored, because a newer minor
format may add some. Nothing is executed or imported by name.
"""

from __future__ import annotations

import contextlib
import gc
import hashlib
import hmac
import json
import math
import re
import types
import typing
from collections.abc import Callable, Iterator
from dataclasses import MISSING, fields, is_dataclass
from functools import cache, partial
from typing import Any, TypeVar

from stormjib_checkpoint.errors import FormatError
from stormjib_checkpoint.layout import GenerationId

MAJOR, MINOR = 1, 1
FORMAT = f"{MAJOR}.{MINOR}"
KNOWN_REQUIREMENTS = ("grid",)
"""Names that may stand in `requires`: what a reader must know of to read the file at all."""
_FORMAT = re.compile(r"([0-9]{1,6})\.([0-9]{1,6})")

MAX_INTEGER = 2**63 - 1
HMAC = "hmac"
"""Key of a record's HMAC-SHA-256, over the canonical record without it."""

T = TypeVar("T")

Json = Any
"""What `json.loads` gives back: dict with text keys, list, text, int, float, bool, None."""


def sha256(data: bytes) -> str:
    """The digest of a small file, 64 hexadecimal digits."""
    return hashlib.sha256(data).hexdigest()


def canonical(plain: Json) -> bytes:
    """One value as canonical JSON, with its newline."""
    text = json.dumps(plain, sort_keys=True, separators=(",", ":"), allow_nan=False, ensure_ascii=False)
    return text.encode() + b"\n"


def check_text(text: str, where: str) -> None:
    """Raises FormatError on half a surrogate pair, which no file can hold."""
    if not _is_unicode(text):
        raise FormatError(f"{where} {_no_unicode(text)}")


def _is_unicode(text: str) -> bool:
    if text.isascii():
        return True
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _no_unicode(text: str) -> str:
    return f"holds text that is no Unicode: {shown(text)}"


# --- out ------------------------------------------------------------------------------------------------------------


def encode(record: object, key: bytes | None = None) -> bytes:
    """A record as the bytes of its file, with the format, and what it `requires`, in front of its own fields; signed where there is a key."""
    needs = [*getattr(record, "requires", ())]
    value = {"format": FORMAT, "requires": needs, **typing.cast("dict[str, Json]", plain(record))}
    return canonical(value if key is None else value | {HMAC: _signature(value, key)})


def _signature(value: dict[str, Json], key: bytes) -> str:
    return hmac.new(key, canonical(value), hashlib.sha256).hexdigest()


def plain(value: object) -> Json:
    """A record as what JSON can hold."""
    kind: Any = type(value)
    if kind in _AS_THEY_ARE:  # nearly all of a long record
        return value
    if isinstance(value, GenerationId):
        return str(value)
    if is_dataclass(kind) or hasattr(kind, "_fields"):
        return {
            name: plain(item)
            for name, may_be_left_out in _outline(kind)
            if (item := getattr(value, name)) is not None or not may_be_left_out
        }
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    if isinstance(value, dict):
        return {str(key): plain(item) for key, item in value.items()}
    return value


_AS_THEY_ARE = frozenset({str, int, float, bool, type(None)})


@cache
def _outline(kind: Any) -> tuple[tuple[str, bool], ...]:
    """Names of a record's fields, and whether each is left out where it is None."""
    if not is_dataclass(kind):
        return tuple((name, name in kind._field_defaults) for name in kind._fields)
    return tuple((f.name, f.default is None) for f in fields(kind))


# --- in -------------------------------------------------------------------------------------------------------------


def decode(kind: type[T], data: bytes, where: str, key: bytes | None = None) -> T:
    """The record in the bytes of a file. With a key it must be signed with it. Raises FormatError on anything that is not exactly that."""
    with _no_collection():
        value = parse(data, where)
        _check_format(value, where)
        if key is not None:
            _check_signature(value, key, where)
        return typing.cast("T", build(kind, value, where))


@contextlib.contextmanager
def _no_collection() -> Iterator[None]:
    """A long record is tens of thousands of objects and no cycle. With torch in memory, to look for cycles among all that there is, again and
    again meanwhile, takes as long as to read it."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def _check_signature(value: dict[str, Json], key: bytes, where: str) -> None:
    if HMAC not in value:
        raise FormatError(
            f"{where} has no HMAC, and a key is set: it was written without one, or by somebody else"
        )
    signed = {name: item for name, item in value.items() if name != HMAC}
    try:
        proved = hmac.compare_digest(str(value[HMAC]).encode(), _signature(signed, key).encode())
    except (ValueError, RecursionError) as error:
        raise FormatError(f"{where} is no JSON of ours: {error}") from error
    if not proved:
        raise FormatError(f"{where} has another HMAC than its key gives: it was altered, or has another key")


def parse(data: bytes, where: str) -> dict[str, Json]:
    """One JSON object. Raises FormatError."""
    try:
        value = json.loads(
            data.decode(), object_pairs_hook=_object, parse_constant=_constant, parse_float=_finite
        )
        if b"\\u" in data:
            canonical(value)  # half a surrogate pair is no text: nobody could print or store it
    except (ValueError, RecursionError) as error:
        raise FormatError(f"{where} is no JSON of ours: {error}") from error
    if not isinstance(value, dict):
        raise FormatError(f"{where} is {shown(value)}; wanted an object")
    return value


def _object(pairs: list[tuple[str, Json]]) -> dict[str, Json]:
    value = dict(pairs)
    if len(value) != len(pairs):
        raise ValueError("a key comes twice")
    return value


def _finite(digits: str) -> float:
    value = float(digits)
    if not math.isfinite(value):
        raise ValueError(f"{digits[:40]} is no number")
    return value


def _constant(name: str) -> Json:
    raise ValueError(f"{name} is no number")


def _check_format(value: dict[str, Json], where: str) -> None:
    text = value.get("format")
    match = _FORMAT.fullmatch(text) if isinstance(text, str) else None
    if match is None:
        raise FormatError(f"{where} has no format; it is not a file of a Stormjib checkpoint")
    if int(match[1]) != MAJOR:
        raise FormatError(
            f"{where} has format {text}; this version reads {MAJOR}.x. {_what_to_do(int(match[1]))}"
        )
    needs = value.get("requires", [])
    unknown = [n for n in needs if n not in KNOWN_REQUIREMENTS] if isinstance(needs, list) else [needs]
    if unknown:
        raise FormatError(
            f"{where} requires {shown(unknown[0])}, which this version does not know. Use a newer one."
        )


def _what_to_do(major: int) -> str:
    if major == 0:
        return "0.x was never released: save to a new folder, or load with the commit that wrote it."
    return "Use the version that wrote it."


def build(kind: Any, value: Json, where: str) -> Any:
    """`value` as `kind`: a record, Json, or text, int, tuple[X, ...], dict[str | int, X], X | None of them. Raises FormatError."""
    try:
        return _reader(kind)(value)
    except _Wrong as wrong:
        raise FormatError(f"{where}{''.join(reversed(wrong.places))}{wrong.problem}") from wrong


class _Wrong(Exception):
    """Where it is gathers on the way out: to say it on the way in would cost more than all else."""

    def __init__(self, problem: str) -> None:
        super().__init__(problem)
        self.problem = problem
        self.places: list[str] = []


_Reader = Callable[[Json], Any]


@cache
def _reader(kind: Any) -> _Reader:
    origin = typing.get_origin(kind)
    if kind is Any:
        return lambda value: value
    if origin in (typing.Union, types.UnionType):
        inner = next(arg for arg in typing.get_args(kind) if arg is not types.NoneType)
        return partial(_maybe, _reader(inner))
    if kind is GenerationId:
        return _generation
    if is_dataclass(kind) or hasattr(kind, "_fields"):
        return partial(_record, kind)
    if origin is tuple:
        inner = typing.get_args(kind)[0]
        return _integers if inner is int else partial(_tuple, _reader(inner))
    if origin is dict:
        key_kind, inner = typing.get_args(kind)
        return partial(_dict, key_kind, _reader(inner))
    return partial(_scalar, kind)


def _maybe(read: _Reader, value: Json) -> Any:
    return None if value is None else read(value)


def _record(kind: Any, value: Json) -> Any:
    if type(value) is not dict:
        raise _Wrong(f" is {shown(value)}; wanted an object")
    readers, optional = _fields(kind)
    known = {}
    key = ""
    try:
        for key, read in readers.items():
            if key in value:
                known[key] = read(value[key])
    except _Wrong as wrong:
        wrong.places.append(f": {key}")
        raise
    missing = readers.keys() - known.keys() - optional if len(known) < len(readers) else ()
    if missing:
        raise _Wrong(f" lacks {min(missing)}")
    try:
        return kind(**known)
    except ValueError as error:
        raise _Wrong(f": {error}") from error


@cache
def _fields(kind: Any) -> tuple[dict[str, _Reader], frozenset[str]]:
    readers = {name: _reader(hint) for name, hint in typing.get_type_hints(kind).items()}
    if not is_dataclass(kind):
        return readers, frozenset(kind._field_defaults)  # a named tuple
    optional = {f.name for f in fields(kind) if f.default is not MISSING or f.default_factory is not MISSING}
    return readers, frozenset(optional)


def _items(value: Json) -> list[Json]:
    if type(value) is not list:
        raise _Wrong(f" is {shown(value)}; wanted a list")
    return value


def _integers(value: Json) -> tuple[int, ...]:
    """Offsets and shapes, which are many, and sample ids, of which there are many in one list."""
    for item in _items(value):
        if type(item) is not int or not 0 <= item <= MAX_INTEGER:
            _scalar(int, item)
    return tuple(value)


def _tuple(read: _Reader, value: Json) -> tuple[Any, ...]:
    found = []
    for item in _items(value):
        try:
            found.append(read(item))
        except _Wrong as wrong:
            wrong.places.append(f"[{len(found)}]")
            raise
    return tuple(found)


def _dict(key_kind: Any, read: _Reader, value: Json) -> dict[Any, Any]:
    if type(value) is not dict:
        raise _Wrong(f" is {shown(value)}; wanted an object")
    found = {}
    for key, item in value.items():
        known = _key(key_kind, key)
        try:
            found[known] = read(item)
        except _Wrong as wrong:
            wrong.places.append(f".{key[:64]}")
            raise
    return found


def _key(kind: Any, key: str) -> Any:
    if kind is not int:
        return key
    if not (key.isascii() and key.isdecimal() and len(key) <= 18 and str(int(key)) == key):
        raise _Wrong(f" has the key {shown(key)}; wanted a number")
    return int(key)


def _generation(value: Json) -> GenerationId:
    try:
        return GenerationId.parse(_scalar(str, value))
    except ValueError as error:
        raise _Wrong(f": {error}") from error


def _scalar(kind: Any, value: Json) -> Any:
    if type(value) is not kind:
        raise _Wrong(f" is {shown(value)}; wanted {kind.__name__}")
    if kind is str and not _is_unicode(value):
        raise _Wrong(f" {_no_unicode(value)}")
    if kind is int and not 0 <= value <= MAX_INTEGER:
        raise _Wrong(f" is {shown(value)}; wanted 0 to 2^63-1")
    return value


def shown(value: object) -> str:
    """A value as it may stand in an error: short."""
    try:
        text = repr(value)
    except ValueError:  # Python prints no integer of thousands of digits
        text = f"<{type(value).__name__} of thousands of digits>"
    return text if len(text) <= 80 else text[:77] + "..."
