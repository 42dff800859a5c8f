"""Where to look for the newest steps of a generation when a listing does not show them (FORMAT.md §3.8). Never believed: a step exists
when its manifest does."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING

from stormjib_checkpoint import layout
from stormjib_checkpoint.errors import FormatError, MediumFailed, NotThere, StorageError
from stormjib_checkpoint.format import MAX_SMALL_FILE, HintFile
from stormjib_checkpoint.records import decode, encode

if TYPE_CHECKING:
    from collections.abc import Iterable

    from stormjib_checkpoint.layout import GenerationId
    from stormjib_checkpoint.storage import Storage

NAMED = 16
"""Steps in a hint: more than are kept as a rule."""


def write_hint(storage: Storage, generation: GenerationId, steps: Iterable[int]) -> None:
    """Name the newest of the steps that `generation` has committed. Where that fails they are committed all the same, and listed."""
    hint = HintFile(generation, tuple(sorted(steps)[-NAMED:]))
    with contextlib.suppress(StorageError):
        storage.replace(layout.hint_file(generation), encode(hint, storage.key))


def hinted(storage: Storage, generation: GenerationId) -> tuple[int, ...]:
    """Steps that `generation` may have committed; none where nothing can be read. Raises StorageError where the storage cannot be asked."""
    path = layout.hint_file(generation)
    try:
        hint = decode(HintFile, storage.read(path, MAX_SMALL_FILE), path, storage.key)
    except (NotThere, MediumFailed, FormatError):
        return ()
    return hint.steps if hint.generation == generation else ()
