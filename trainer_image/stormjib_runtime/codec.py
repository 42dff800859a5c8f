"""Typed JSON for the records of `wire`: strict on the way in, because the other side may be hostile.

`decode` checks every type and refuses unknown keys, oversized text and oversized lists; nothing is ever executed or
imported by name. Standard library only: this runs in a trainer pod. A coordinator decodes a report per agent and
second, so the checks of each record type are put together once.

`pack` and `unpack` are the same for what is sent often: a record is the list of its values, without the last ones where
they are the defaults, floats keep four digits, and all of it is deflated. So both sides must know the same fields:
`PROTOCOL` changes with them.
"""

from __future__ import annotations

import json
import math
import types
import typing
import zlib
from collections.abc import Callable, Iterable
from dataclasses import MISSING, fields, is_dataclass
from enum import Enum
from functools import cache
from itertools import repeat
from operator import attrgetter
from typing import Any, TypeVar

MAX_BYTES = 1 << 20
MAX_TEXT = 64 * 1024
MAX_ITEMS = 16 * 1024
MAX_INT = 1 << 63
_EXACT = 1 << 53
"""Below this every whole number is a float too."""

T = TypeVar("T")
_COMPACT = json.JSONEncoder(separators=(",", ":"), allow_nan=False).encode
_Check = Callable[[Any], Any]
"""Takes a value as `json` gives it, returns it as its record holds it. Raises _Wrong."""


class DecodeError(ValueError):
    """A message does not have the form of its record: names the path, the value and what is wanted."""


class _Wrong(Exception):
    """A DecodeError on its way up; each level adds its part of the path, innermost first."""

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self.path: list[str] = []


def encode(record: object) -> bytes:
    """One record as compact JSON, without the values that are the very defaults."""
    return _COMPACT(_plain(record)).encode()


def decode(kind: type[T], data: bytes | str, *, limit: int = MAX_BYTES) -> T:
    """The record of type `kind` in `data`. Raises DecodeError on anything that is not exactly that."""
    if len(data) > limit:
        raise DecodeError(f"message of {len(data)} bytes; the limit is {limit}")
    return _take(kind, data, packed=False)


def pack(record: object) -> bytes:
    """One record as a list of its values, deflated."""
    return zlib.compress(_COMPACT(_pack(typing.cast("Any", type(record)))(record)).encode())


def unpack(kind: type[T], data: bytes, *, limit: int = MAX_BYTES) -> T:
    """The record of type `kind` that `pack` wrote; `limit` is its size before it was deflated. Raises DecodeError on
    anything that is not exactly that."""
    stream = zlib.decompressobj()
    try:
        plain = stream.decompress(data, limit + 1)
    except zlib.error as error:
        raise DecodeError(f"not deflated: {error}") from error
    if len(plain) > limit:
        raise DecodeError(f"message of more than {limit} bytes")
    if not stream.eof or stream.unused_data:
        raise DecodeError("the deflated message is cut short or has something behind it")
    return _take(kind, plain, packed=True)


def _take(kind: type[T], data: bytes | str, *, packed: bool) -> T:
    try:
        plain = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise DecodeError(f"not JSON: {error}") from error
    try:
        return typing.cast("T", _check(typing.cast("Any", kind), packed)(plain))
    except _Wrong as wrong:
        raise DecodeError(f"{kind.__name__}{''.join(reversed(wrong.path))} {wrong}") from wrong


# --- out ------------------------------------------------------------------------------------------------------------


def _plain(value: Any) -> Any:
    kind = type(value)
    if kind is str or kind is int or value is None or kind is bool or kind is float:
        return value
    if isinstance(value, Enum):
        return value.value
    if is_dataclass(kind):
        given = ((name, getattr(value, name)) for name in _names(kind))
        return {
            name: _plain(item)
            for (name, item), default in zip(given, _defaults(kind), strict=True)
            if item is not default
        }
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    return value


@cache
def _names(kind: type) -> tuple[str, ...]:
    return tuple(field.name for field in fields(kind))


@cache
def _defaults(kind: type) -> tuple[Any, ...]:
    """Default of each field; MISSING, which equals nothing that is sent, where there is none."""
    return tuple(f.default if f.default_factory is MISSING else f.default_factory() for f in fields(kind))


@cache
def _pack(kind: Any) -> Callable[[Any], Any]:
    """What makes a value of this type plain. Put together once: an agent packs five samples a second."""
    origin = typing.get_origin(kind)
    if origin in (typing.Union, types.UnionType):
        inner = _pack(next(arg for arg in typing.get_args(kind) if arg is not type(None)))
        return lambda value: None if value is None else inner(value)
    if is_dataclass(kind):
        return _row_of(typing.cast("type", kind))
    if origin is tuple:
        each = _pack(typing.get_args(kind)[0])
        return lambda value: [each(item) for item in value]
    if origin is dict:
        of = _pack(typing.get_args(kind)[1])
        return lambda value: {key: of(item) for key, item in value.items()}
    if isinstance(kind, type) and issubclass(kind, Enum):
        return lambda value: value.value
    return _short if kind is float else _as_it_is


def _row_of(kind: type) -> Callable[[Any], list[Any]]:
    hints = typing.get_type_hints(kind)
    names = _names(kind)
    values = attrgetter(*names)
    alone = len(names) == 1  # then it gives no tuple
    defaults = _defaults(kind)
    packs = [
        (at, pack) for at, pack in enumerate(_pack(hints[name]) for name in names) if pack is not _as_it_is
    ]

    def row(record: Any) -> list[Any]:
        found = [values(record)] if alone else list(values(record))
        while found and found[-1] == defaults[len(found) - 1]:
            found.pop()
        length = len(found)
        for at, pack in packs:
            if at < length:
                found[at] = pack(found[at])
        return found

    return row


def _as_it_is(value: Any) -> Any:
    return value


def _short(value: float) -> float | int:
    if not value:
        return 0
    rounded = float(f"{value:.4g}")
    if math.isinf(rounded):
        return value  # the largest floats would round to what JSON does not have
    return int(rounded) if rounded.is_integer() and abs(rounded) < _EXACT else rounded


# --- in -------------------------------------------------------------------------------------------------------------


@cache
def _check(kind: Any, packed: bool) -> _Check:
    origin = typing.get_origin(kind)
    if origin in (typing.Union, types.UnionType):
        return _optional(_check(next(arg for arg in typing.get_args(kind) if arg is not type(None)), packed))
    if is_dataclass(kind):
        return (_row if packed else _record)(typing.cast("type", kind))
    if origin is tuple:
        return _tuple(_check(typing.get_args(kind)[0], packed))
    if origin is dict:
        return _dict(_check(typing.get_args(kind)[1], packed))
    if isinstance(kind, type) and issubclass(kind, Enum):
        return _enum(kind)
    return {str: _text, int: _whole, float: _float}.get(kind) or _exactly(kind)


def _optional(inner: _Check) -> _Check:
    return lambda value: None if value is None else inner(value)


def _record(kind: type) -> _Check:
    hints = typing.get_type_hints(kind)
    checks = {name: _check(hints[name], False) for name in _names(kind)}
    required = {f.name for f in fields(kind) if f.default is MISSING and f.default_factory is MISSING}

    def check(value: Any) -> Any:
        if type(value) is not dict:
            raise _Wrong(f"is {_show(value)}; wanted an object")
        given: dict[str, Any] = {}
        for key, item in value.items():
            if key not in checks:
                raise _Wrong(f"has unknown key {key[:64]!r}; known: {', '.join(sorted(checks))}")
            try:
                given[key] = checks[key](item)
            except _Wrong as wrong:
                wrong.path.append(f".{key}")
                raise
        if not required <= given.keys():
            raise _Wrong(f"lacks {', '.join(sorted(required - given.keys()))}")
        return kind(**given)

    return check


def _row(kind: type) -> _Check:
    hints = typing.get_type_hints(kind)
    names = _names(kind)
    checks = [_check(hints[name], True) for name in names]
    least = sum(default is MISSING for default in _defaults(kind))

    def check(value: Any) -> Any:
        if type(value) is not list:
            raise _Wrong(f"is {_show(value)}; wanted a list of its values")
        if not least <= len(value) <= len(checks):
            raise _Wrong(f"has {len(value)} values; wanted {least} to {len(checks)}: {', '.join(names)}")
        try:
            return kind(*[one(item) for one, item in zip(checks, value, strict=False)])
        except _Wrong as wrong:
            wrong.path.append(f".{names[_first_wrong(checks, value)]}")
            raise

    return check


def _tuple(inner: _Check) -> _Check:
    def check(value: Any) -> tuple[Any, ...]:
        if type(value) is not list or len(value) > MAX_ITEMS:
            raise _Wrong(f"is {_show(value)}; wanted a list of at most {MAX_ITEMS} items")
        try:
            return tuple([inner(item) for item in value])
        except _Wrong as wrong:
            wrong.path.append(f"[{_first_wrong(repeat(inner), value)}]")
            raise

    return check


def _first_wrong(checks: Iterable[_Check], values: Iterable[Any]) -> int:
    """Where the first value is that does not pass: looked for once more, so that good messages need not count along."""
    for at, (check, value) in enumerate(zip(checks, values, strict=False)):
        try:
            check(value)
        except _Wrong:
            return at
    raise AssertionError("a value was refused and then was not")


def _dict(inner: _Check) -> _Check:
    def check(value: Any) -> dict[str, Any]:
        if type(value) is not dict or len(value) > MAX_ITEMS:
            raise _Wrong(f"is {_show(value)}; wanted an object of at most {MAX_ITEMS} keys")
        items = {}
        for key, item in value.items():
            try:
                items[key] = inner(item)
            except _Wrong as wrong:
                wrong.path.append(f".{key[:64]}")
                raise
        return items

    return check


def _enum(kind: type[Enum]) -> _Check:
    members = {member.value: member for member in kind}

    def check(value: Any) -> Enum:
        member = members.get(value) if type(value) is str else None
        if member is None:
            raise _Wrong(f"is {_show(value)}; wanted one of {', '.join(map(str, members))}")
        return member

    return check


def _text(value: Any) -> str:
    if type(value) is not str:
        raise _Wrong(f"is {_show(value)}; wanted str")
    if len(value) > MAX_TEXT:
        raise _Wrong(f"holds {len(value)} characters; the limit is {MAX_TEXT}")
    return value


def _whole(value: Any) -> int:
    if type(value) is not int:
        raise _Wrong(f"is {_show(value)}; wanted int")
    if -MAX_INT < value < MAX_INT:
        return value
    raise _Wrong("is beyond 64 bits")


def _float(value: Any) -> float:
    if type(value) is int:
        return float(_whole(value))
    if type(value) is not float:
        raise _Wrong(f"is {_show(value)}; wanted float")
    if not math.isfinite(value):
        raise _Wrong(f"is {value}; JSON has no such number")
    return value


def _exactly(kind: type) -> _Check:
    def check(value: Any) -> Any:
        if type(value) is not kind:
            raise _Wrong(f"is {_show(value)}; wanted {kind.__name__}")
        return value

    return check


def _show(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."
