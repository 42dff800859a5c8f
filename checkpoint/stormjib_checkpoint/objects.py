"""Values of a state that are no tensors, as JSON and exactly back (FORMAT.md §9.14): never a pickle, and no type by name.

What JSON holds stays as it is. What it would change or lose becomes an object of one key, the *tag*: `{"$tuple": [1, 2]}`. A dict that
could be taken for one is itself written under a tag, so that every value has one form, and every form one value.
"""

from __future__ import annotations

import base64
import math
import struct
from typing import TYPE_CHECKING, Any

from stormjib_checkpoint.errors import FormatError
from stormjib_checkpoint.records import Json, check_text, shown

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

MAX_DEPTH = 32
PLAIN_BITS = 2048
"""Longer integers are written in hexadecimal: readers of JSON, Python's among them, refuse very long ones in decimal."""

_KEPT = "text, numbers, bytes, true, false, None, and lists, tuples and dicts (keys: text or int) of them"


def to_json(value: object, where: str, depth: int = 0) -> Json:
    """`value` as JSON. Raises FormatError, which names the key, on what would not come back exactly as it is."""
    if depth > MAX_DEPTH:
        raise FormatError(f"{where} is nested deeper than {MAX_DEPTH}")
    write = _WRITERS.get(type(value))
    if write is None:
        raise FormatError(f"{where} is {shown(value)}; kept are {_KEPT}")
    return write(value, where, depth)


def from_json(value: Json, where: str) -> Any:
    """What `to_json` was given. Raises FormatError on anything that it does not write."""
    found = _read(value, where, 0)
    if to_json(found, where) != value:
        raise FormatError(f"{where} is not written as the format writes it: {shown(value)}")
    return found


def _plain(value: Any, _where: str, _depth: int) -> Json:
    return value


def _text(value: str, where: str, _depth: int) -> Json:
    check_text(value, where)
    return value


def _integer(value: int, _where: str, _depth: int) -> Json:
    return value if value.bit_length() <= PLAIN_BITS else {"$int": hex(value)}


def _float(value: float, _where: str, _depth: int) -> Json:
    return value if math.isfinite(value) else {"$float": struct.pack(">d", value).hex()}


def _bytes(value: bytes, _where: str, _depth: int) -> Json:
    return {"$bytes": base64.b64encode(value).decode()}


def _list(value: list[Any] | tuple[Any, ...], where: str, depth: int) -> Json:
    return [to_json(item, f"{where}[{index}]", depth + 1) for index, item in enumerate(value)]


def _tuple(value: tuple[Any, ...], where: str, depth: int) -> Json:
    return {"$tuple": _list(value, where, depth)}


def _dict(value: dict[Any, Any], where: str, depth: int) -> Json:
    for key in value:
        if type(key) not in (str, int):
            raise FormatError(f"{where} has the key {shown(key)}; keys are text or int")
        to_json(key, f"a key of {where}", depth)
    items = {key: to_json(item, f"{where}.{_named(key)}", depth + 1) for key, item in value.items()}
    if all(type(key) is str for key in value) and not _is_tag(value):
        return items
    ordered = sorted(items, key=lambda key: (type(key) is str, key))
    return {"$dict": [[to_json(key, where, depth), items[key]] for key in ordered]}


def _named(key: str | int) -> str:
    return key[:64] if isinstance(key, str) else shown(key)


def _is_tag(value: Mapping[str, Any]) -> bool:
    return len(value) == 1 and next(iter(value)).startswith("$")


_WRITERS: Mapping[type, Callable[[Any, str, int], Json]] = {
    type(None): _plain,
    bool: _plain,
    str: _text,
    int: _integer,
    float: _float,
    bytes: _bytes,
    list: _list,
    tuple: _tuple,
    dict: _dict,
}


def _read(value: Json, where: str, depth: int) -> Any:
    if depth > MAX_DEPTH:
        raise FormatError(f"{where} is nested deeper than {MAX_DEPTH}")
    if isinstance(value, list):
        return [_read(item, where, depth + 1) for item in value]
    if not isinstance(value, dict):
        return value
    if not _is_tag(value):
        return {key: _read(item, where, depth + 1) for key, item in value.items()}
    (tag, content), *_ = value.items()
    try:
        return _READERS[tag](content, where, depth)
    except (KeyError, TypeError, ValueError, struct.error) as error:
        raise FormatError(f"{where} has {shown(value)}, which is no value of this version") from error


def _read_dict(content: Json, where: str, depth: int) -> dict[Any, Any]:
    return {_read(key, where, depth + 1): _read(item, where, depth + 1) for key, item in content}


_READERS: Mapping[str, Callable[[Any, str, int], Any]] = {
    "$int": lambda content, _where, _depth: int(content, 16),
    "$float": lambda content, _where, _depth: struct.unpack(">d", bytes.fromhex(content))[0],
    "$bytes": lambda content, _where, _depth: base64.b64decode(content, validate=True),
    "$tuple": lambda content, where, depth: tuple(_read(item, where, depth + 1) for item in content),
    "$dict": _read_dict,
}
