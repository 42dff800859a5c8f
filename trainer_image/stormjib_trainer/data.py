"""The texts: bytes, split by file into training and validation, cut into windows that can be read at any index.

The default text is the source of the Python standard library: it is wherever Python is, it needs no download, and a
small model learns it in minutes. It differs between Python versions, so its SHA-256 is part of a checkpoint.
"""

from __future__ import annotations

import hashlib
import os
import sysconfig
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from stormjib_checkpoint.order import Source
from stormjib_trainer.errors import DataError

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

VALIDATION_EVERY = 20
"""Every 20th file is for validation."""
SEPARATOR = b"\0"
"""Stands between two files; the text itself does not hold it."""
_NOT_LIBRARY = frozenset(
    {"test", "tests", "idlelib", "lib2to3", "turtledemo", "ensurepip", "site-packages", "dist-packages"}
)


@dataclass(frozen=True)
class Text:
    """Training and validation bytes, cut into windows of `context` bytes."""

    train: torch.Tensor
    validation: torch.Tensor
    context: int
    sha256: str

    @property
    def samples(self) -> int:
        """Number of training windows."""
        return _windows(self.train, self.context)

    @property
    def validation_samples(self) -> int:
        """Number of validation windows that do not overlap."""
        return _windows(self.validation, self.context)


@dataclass(frozen=True)
class Corpus:
    """The texts of all sources, in the order of their names."""

    texts: Mapping[str, Text]
    context: int

    def sources(self, weights: Mapping[str, int]) -> tuple[Source, ...]:
        """What an `Order` mixes."""
        return tuple(Source(name, text.samples, weights[name]) for name, text in self.texts.items())

    def fingerprints(self) -> dict[str, str]:
        """SHA-256 of each source."""
        return {name: text.sha256 for name, text in self.texts.items()}

    @property
    def sha256(self) -> str:
        """Of all of them."""
        return hashlib.sha256(repr(self.fingerprints()).encode()).hexdigest()

    def batch(self, places: Iterable[tuple[int, int]]) -> torch.Tensor:
        """These windows, each given by number of source and index in it, and the byte that follows each of them:
        (number of places, context + 1), int64."""
        texts = [text.train for text in self.texts.values()]
        return _stack((_cut(texts[which], index, self.context) for which, index in places), self.context)

    def validation_batch(self, indices: Iterable[int], of: int) -> torch.Tensor:
        """Windows `indices` of `of` that lie evenly spread over the validation texts of all sources."""
        most = self.validation_samples
        return _stack((self._validation(i * most // of) for i in indices), self.context)

    def _validation(self, index: int) -> torch.Tensor:
        for text in self.texts.values():
            if index < text.validation_samples:
                return _cut(text.validation, index, self.context)
            index -= text.validation_samples
        raise IndexError(index)

    @property
    def validation_samples(self) -> int:
        """Number of validation windows of all sources."""
        return sum(text.validation_samples for text in self.texts.values())


def load(paths: Mapping[str, str], context: int) -> Corpus:
    """Read the text of each source: `stdlib`, a file, or every file of a folder. Raises DataError."""
    return Corpus(
        {name: _load(f"data.sources.{name}.path", paths[name], context) for name in sorted(paths)}, context
    )


def _load(knob: str, path: str, context: int) -> Text:
    files = _stdlib() if path == "stdlib" else _files(knob, path)
    train, validation = _read(files)
    text = Text(_tensor(train), _tensor(validation), context, _digest(train, validation))
    if not (text.samples and text.validation_samples):
        raise DataError(
            f"{knob} = {path}: {len(train)} bytes to train on and {len(validation)} to validate on; "
            f"each must hold a window of model.context = {context} bytes and one more"
        )
    return text


def _stdlib() -> list[str]:
    """Library modules only: tests and tools are as many bytes again, and not everywhere. Version-specific build
    folders such as config-3.11-x86_64-linux-gnu would differ between two builds of one version."""
    found: list[str] = []
    for folder, folders, names in os.walk(sysconfig.get_paths()["stdlib"]):
        folders[:] = [f for f in folders if f not in _NOT_LIBRARY and not f.startswith("config-")]
        found += [f"{folder}/{n}" for n in names if n.endswith(".py") and not n.startswith("_sysconfigdata")]
    return sorted(found)


def _files(knob: str, path: str) -> list[str]:
    if os.path.isdir(path):
        files = sorted(f"{folder}/{name}" for folder, _, names in os.walk(path) for name in names)
    elif os.path.exists(path):
        files = [path]
    else:
        raise DataError(f"{knob} = {path}: no such file or folder (and not `stdlib`)")
    for file in files:
        if not os.path.isfile(file):
            raise DataError(
                f"{knob} = {path}: {file} is no regular file. A stream can only be read from its start, so no job could go "
                "on in it on another number of ranks and lose nothing; write it to a file first"
            )
    return files


def _read(files: Sequence[str]) -> tuple[bytearray, bytearray]:
    """Training and validation text. Split by file, so that no window of validation stands in a file that was trained
    on; where files are few, the end of the text is cut off instead."""
    train, validation = bytearray(), bytearray()
    few = len(files) < VALIDATION_EVERY
    for i, path in enumerate(files, start=1):
        into = validation if i % VALIDATION_EVERY == 0 and not few else train
        into += _read_file(path)
        into += SEPARATOR
    if few:
        cut = len(train) - len(train) // VALIDATION_EVERY
        train, validation = train[:cut], train[cut:]
    return train, validation


def _read_file(path: str) -> bytes:
    try:
        with open(path, "rb", buffering=0) as file:  # each rank reads hundreds of files before its first step
            text = file.readall()
    except OSError as error:
        raise DataError(f"cannot read {path}: {error}") from error
    return text.replace(SEPARATOR, b"") if SEPARATOR in text else text


def _digest(train: bytearray, validation: bytearray) -> str:
    digest = hashlib.sha256(train)
    digest.update(SEPARATOR)  # no file ends in two of them
    digest.update(validation)
    return digest.hexdigest()


def _tensor(text: bytearray) -> torch.Tensor:
    return torch.frombuffer(text, dtype=torch.uint8) if text else torch.empty(0, dtype=torch.uint8)


def _windows(text: torch.Tensor, context: int) -> int:
    return max(0, (text.numel() - 1) // context)


def _cut(text: torch.Tensor, index: int, context: int) -> torch.Tensor:
    return text[index * context : index * context + context + 1]


def _stack(rows: Iterable[torch.Tensor], context: int) -> torch.Tensor:
    windows = [*rows]
    return torch.stack(windows).long() if windows else torch.empty(0, context + 1, dtype=torch.int64)
