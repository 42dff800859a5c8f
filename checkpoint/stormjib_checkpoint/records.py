"""Frozen records as canonical JSON, and strictly back: the files may be damaged, or written by somebody hostile.

Out: sorted keys, no blanks, a newline at the end, so that equal records are equal bytes. In: every type is checked,
keys may not come twice, NaN is refused, a missing key is named; unknown keys are ignored, because a newer minor
format may add some. Nothing is executed or imported by name.
"""

from __future__ import annotations

import hashlib
import json
import math
import types
import typing
from dataclasses import MISSING, fields, is_dataclass
from functools import cache
from typing import Any, TypeVar

from stormjib_checkpoint.errors import FormatError
from stormjib_checkpoint.layout import GenerationId

MAJOR, MINOR = 0, 1
FORMAT = f"{MAJOR}.{MINOR}"
KNOWN_REQUIREMENTS: frozenset[str] = frozenset()

MAX_INTEGER = 2**63 - 1
_MAX_DEPTH = 32

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


def check_plain(value: object, where: str, depth: int = 0) -> None:
    """Refuse, by key, what JSON would not give back as it was. Raises FormatError."""
    if depth > _MAX_DEPTH:
        raise FormatError(f"{where} is nested deeper than {_MAX_DEPTH}")
    if isinstance(value, dict):
        for key, item in value.items():
            if type(key) is not str:
                raise FormatError(f"{where} has the key {_show(key)}; use text keys")
            _check_text(key, where)
            check_plain(item, f"{where}.{key[:64]}", depth + 1)
    elif type(value) is list:
        for index, item in enumerate(value):
            check_plain(item, f"{where}[{index}]", depth + 1)
    elif type(value) is str:
        _check_text(value, where)
    elif value is not None and type(value) not in (bool, int) and not _is_finite(value):
        raise FormatError(
            f"{where} is {_show(value)}; only text, finite numbers, true, false, null, lists and objects are kept"
        )


def _is_finite(value: object) -> bool:
    return type(value) is float and math.isfinite(value)


def _check_text(text: str, where: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise FormatError(f"{where} holds text that is no Unicode: {_show(text)}") from error


# --- out ------------------------------------------------------------------------------------------------------------


def encode(record: object) -> bytes:
    """A record as the bytes of its file, with the format in front of its own fields."""
    return canonical({"format": FORMAT, "requires": [], **typing.cast("dict[str, Json]", plain(record))})


def plain(value: object) -> Json:
    """A record as what JSON can hold."""
    if isinstance(value, GenerationId):
        return str(value)
    if is_dataclass(value) and not isinstance(value, type):
        return {f.name: plain(getattr(value, f.name)) for f in fields(value)}
    if isinstance(value, tuple) and hasattr(value, "_asdict"):
        return {key: plain(item) for key, item in value._asdict().items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    if isinstance(value, dict):
        return {str(key): plain(item) for key, item in value.items()}
    return value


# --- in -------------------------------------------------------------------------------------------------------------


def decode(kind: type[T], data: bytes, where: str) -> T:
    """The record in the bytes of a file. Raises FormatError on anything that is not exactly that."""
    value = parse(data, where)
    _check_format(value, where)
    return typing.cast("T", build(kind, value, where))


def parse(data: bytes, where: str) -> dict[str, Json]:
    """One JSON object. Raises FormatError."""
    try:
        value = json.loads(data, object_pairs_hook=_object, parse_constant=_constant)
    except (ValueError, RecursionError) as error:
        raise FormatError(f"{where} is no JSON of ours: {error}") from error
    if not isinstance(value, dict):
        raise FormatError(f"{where} is {_show(value)}; wanted an object")
    return value


def _object(pairs: list[tuple[str, Json]]) -> dict[str, Json]:
    value = dict(pairs)
    if len(value) != len(pairs):
        raise ValueError("a key comes twice")
    for key in value:
        key.encode()  # half a surrogate pair is no text: nobody could print or store it
    return value


def _constant(name: str) -> Json:
    raise ValueError(f"{name} is no number")


def _check_format(value: dict[str, Json], where: str) -> None:
    text = value.get("format")
    major, dot, minor = text.partition(".") if isinstance(text, str) else ("", "", "")
    if not (dot and major.isdecimal() and minor.isdecimal()):
        raise FormatError(f"{where} has no format; it is not a file of a Stormjib checkpoint")
    if int(major) != MAJOR:
        raise FormatError(
            f"{where} has format {text}; this version reads {MAJOR}.x. Use the version that wrote it."
        )
    needs = value.get("requires", [])
    unknown = [n for n in needs if n not in KNOWN_REQUIREMENTS] if isinstance(needs, list) else [needs]
    if unknown:
        raise FormatError(
            f"{where} requires {_show(unknown[0])}, which this version does not know. Use a newer one."
        )


def build(kind: Any, value: Json, where: str) -> Any:
    """`value` as `kind`: a record, Json, or text, int, tuple[X, ...], dict[str | int, X], X | None of them."""
    origin = typing.get_origin(kind)
    if kind is Any:
        return value
    if origin in (typing.Union, types.UnionType):
        inner = next(arg for arg in typing.get_args(kind) if arg is not types.NoneType)
        return None if value is None else build(inner, value, where)
    if kind is GenerationId:
        return _generation(value, where)
    if is_dataclass(kind) or hasattr(kind, "_fields"):
        return _record(kind, value, where)
    if origin is tuple:
        return _tuple(typing.get_args(kind)[0], value, where)
    if origin is dict:
        return _dict(kind, value, where)
    return _scalar(kind, value, where)


def _record(kind: Any, value: Json, where: str) -> Any:
    if not isinstance(value, dict):
        raise FormatError(f"{where} is {_show(value)}; wanted an object")
    hints, optional = _hints(kind)
    missing = hints.keys() - value.keys() - optional
    if missing:
        raise FormatError(f"{where} lacks {min(missing)}")
    known = {key: build(hint, value[key], f"{where}: {key}") for key, hint in hints.items() if key in value}
    try:
        return kind(**known)
    except ValueError as error:
        raise FormatError(f"{where}: {error}") from error


@cache
def _hints(kind: type) -> tuple[dict[str, Any], frozenset[str]]:
    hints = typing.get_type_hints(kind)
    if not is_dataclass(kind):
        return hints, frozenset()
    optional = {f.name for f in fields(kind) if f.default is not MISSING or f.default_factory is not MISSING}
    return hints, frozenset(optional)


def _tuple(inner: Any, value: Json, where: str) -> tuple[Any, ...]:
    if not isinstance(value, list):
        raise FormatError(f"{where} is {_show(value)}; wanted a list")
    if inner is int:  # the long lists: sample ids
        return tuple(_scalar(int, item, where) for item in value)
    return tuple(build(inner, item, f"{where}[{i}]") for i, item in enumerate(value))


def _dict(kind: Any, value: Json, where: str) -> dict[Any, Any]:
    if not isinstance(value, dict):
        raise FormatError(f"{where} is {_show(value)}; wanted an object")
    key_kind, inner = typing.get_args(kind)
    return {
        _key(key_kind, key, where): build(inner, item, f"{where}.{key[:64]}") for key, item in value.items()
    }


def _key(kind: Any, key: str, where: str) -> Any:
    if kind is not int:
        return key
    if not (key.isascii() and key.isdecimal() and len(key) <= 18 and str(int(key)) == key):
        raise FormatError(f"{where} has the key {_show(key)}; wanted a number")
    return int(key)


def _generation(value: Json, where: str) -> GenerationId:
    try:
        return GenerationId.parse(_scalar(str, value, where))
    except ValueError as error:
        raise FormatError(f"{where}: {error}") from error


def _scalar(kind: Any, value: Json, where: str) -> Any:
    if type(value) is not kind:
        raise FormatError(f"{where} is {_show(value)}; wanted {kind.__name__}")
    if kind is str:
        _check_text(value, where)
    if kind is int and not 0 <= value <= MAX_INTEGER:
        raise FormatError(f"{where} is {_show(value)}; wanted 0 to 2^63-1")
    return value


def _show(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."
