"""What lies in a foreign checkpoint: pickles told by a process of their own, tensors as ranges of files. Nothing here reads a tensor."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from typing import TYPE_CHECKING, Any, NamedTuple

from stormjib_checkpoint.errors import ForeignRefused
from stormjib_checkpoint.interop import restricted

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from stormjib_checkpoint.boxes import Box
    from stormjib_checkpoint.records import Json

TIMEOUT_S = 900
"""For all the pickles of a checkpoint together."""
MEMORY_BYTES = 4 * 1024**3
"""Address space of the process that reads them."""


class Chunk(NamedTuple):
    """A box of a tensor and where its elements lie, row-major, one after the other."""

    box: Box
    path: Path | bytes
    """Or the bytes themselves."""
    start: int


class Source(NamedTuple):
    """A tensor as it shall be called here, and the chunks that hold it."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    chunks: tuple[Chunk, ...]


class Foreign(NamedTuple):
    """A whole foreign checkpoint, by our names."""

    sources: list[Source]
    scalars: dict[str, Json]
    notes: tuple[str, ...] = ()
    """What could not be brought along, and why."""


class Place(NamedTuple):
    """A pickle, or an archive of torch: in a file from `offset` on; `length` None is to its end."""

    path: Path
    offset: int = 0
    length: int | None = None


class Described(NamedTuple):
    """A tensor of an archive: its type, its shape, and the first of its bytes in the file."""

    dtype: str
    shape: tuple[int, ...]
    start: int


class Record(NamedTuple):
    """An object of a class that is known by name: what it was made with, and what its state was set to."""

    name: str
    arguments: list[Any]
    state: Any


def describe(places: Sequence[Place]) -> list[Any]:
    """What pickles hold: plain values, `Described`, `Record`, and a dtype as its tag. Raises ForeignRefused, which names file and reason.

    The process that reads them gets neither environment nor any file but these, and may take 4 GB and ten minutes of a processor.
    """
    asked = "".join(json.dumps([os.path.abspath(p.path), p.offset, p.length]) + "\n" for p in places)
    command = [sys.executable, "-I", "-S", restricted.__file__, str(MEMORY_BYTES)]
    try:
        done = subprocess.run(
            command,
            check=False,
            input=asked,
            capture_output=True,
            text=True,
            env={},
            cwd="/",
            timeout=TIMEOUT_S,
        )
    except subprocess.TimeoutExpired as error:
        raise ForeignRefused(f"{places[0].path}: not read in {TIMEOUT_S} s") from error
    answers = done.stdout.splitlines()
    if len(answers) < len(places):
        raise ForeignRefused(
            f"{places[len(answers)].path}: its reader ended with code {done.returncode}; the file asks for more than it may have, or is damaged"
        )
    return [_value(place, json.loads(answer)) for place, answer in zip(places, answers, strict=True)]


def _value(place: Place, answer: Mapping[str, Any]) -> Any:
    if "error" in answer:
        raise ForeignRefused(
            f"{place.path}: {answer['error']}; only tensors, plain values and the records of these formats are read"
        )
    return _back(answer["value"])


def _back(value: Any) -> Any:
    if isinstance(value, list):
        return [_back(item) for item in value]
    if not isinstance(value, dict):
        return value
    ((tag, inner),) = value.items()
    match tag:
        case "$tuple":
            return tuple(map(_back, inner))
        case "$dict":
            return {_hashable(_back(key)): _back(item) for key, item in inner}
        case "$tensor":
            return Described(inner[0], tuple(inner[1]), inner[2])
        case "$record":
            return Record(inner[0], _back(inner[1]), _back(inner[2]))
        case "$float":
            return float(inner)
        case _:
            return inner


def _hashable(key: Any) -> Any:
    if isinstance(key, Record):
        return Record(key.name, _frozen(key.arguments), _frozen(key.state))
    return _frozen(key)


def _frozen(value: Any) -> Any:
    if isinstance(value, list):
        return tuple(map(_frozen, value))
    if isinstance(value, dict):
        return tuple((key, _frozen(item)) for key, item in value.items())
    return value
