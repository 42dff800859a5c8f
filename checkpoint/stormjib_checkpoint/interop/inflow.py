"""A foreign checkpoint as an ordinary committed step of ours: streamed, one window of a file at a time in memory.

A crash on the way leaves no manifest, so nothing that counts; the next try opens the next generation and begins anew.
"""

from __future__ import annotations

import ctypes
import os
import zlib
from contextlib import ExitStack
from typing import TYPE_CHECKING, NamedTuple

import torch

from stormjib_checkpoint import layout
from stormjib_checkpoint.boxes import flaw, part, runs, whole
from stormjib_checkpoint.commit import commit_step
from stormjib_checkpoint.errors import ForeignDamaged, ImportRefused
from stormjib_checkpoint.format import ITEM_BYTES, PIECE_BYTES, RESERVED
from stormjib_checkpoint.hashing import Hashing, Memory
from stormjib_checkpoint.history import committed
from stormjib_checkpoint.image import image_of
from stormjib_checkpoint.layout import GenerationId
from stormjib_checkpoint.left import leave
from stormjib_checkpoint.opening import open_next
from stormjib_checkpoint.tensors import DTYPES, Held
from stormjib_checkpoint.writer import Part, records_of, refuse_unstorable

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence
    from pathlib import Path

    from stormjib_checkpoint.format import ResumePoint
    from stormjib_checkpoint.image import Image
    from stormjib_checkpoint.interop.foreign import Foreign, Source
    from stormjib_checkpoint.storage import NewFile, Storage
    from stormjib_checkpoint.writer import Staged


class _Range(NamedTuple):
    """Bytes of the new file that lie one after the other in a foreign one too."""

    into: int
    length: int
    path: Path | bytes
    start: int


def bring_in(storage: Storage, foreign: Foreign, step: int, world: int) -> ResumePoint:
    """Write and commit `foreign` as step `step`, as if `world` ranks had saved it, each a part of the first dimension.

    Raises ImportRefused where steps are there or names cannot be kept, UnsupportedState by name, ForeignDamaged where chunks do not hold a tensor exactly once, StorageError.
    """
    _refuse_steps(committed(storage))
    for source in foreign.sources:
        why = flaw(source.shape, [chunk.box for chunk in source.chunks])
        if why is not None:
            raise ForeignDamaged(f"{source.name}: its chunks do not hold it exactly once: {why}")
    _refuse_names(foreign)
    opening = open_next(storage)
    # Whoever was cut short may have left all but the manifest: then the opening has just committed it.
    _refuse_steps([opening.resume] if opening.resume is not None else [])
    generation = GenerationId.parse(opening.generation)
    for rank in range(world):
        _write_rank(storage, foreign, Part(step, generation, rank, world))
    return commit_step(storage, str(generation), world, step)


def _refuse_names(foreign: Foreign) -> None:
    """Foreign names may be anything; each must be one that the format holds, and be there once."""
    seen: set[str] = set()
    for name in (*(source.name for source in foreign.sources), *foreign.scalars):
        if name in seen or name.startswith(RESERVED):
            why = (
                f"begins with {RESERVED}, which is kept for the format"
                if name not in seen
                else "is there twice"
            )
            raise ImportRefused(f"{name[:200]} {why}; rename it where it comes from")
        seen.add(name)
    refuse_unstorable(dict.fromkeys(seen) | foreign.scalars, "foreign")


def _refuse_steps(there: Sequence[ResumePoint]) -> None:
    if there:
        raise ImportRefused(
            f"step {there[0].step} is committed there; if that is an import that was cut short it is whole now, else name an empty folder"
        )


def _write_rank(storage: Storage, foreign: Foreign, who: Part) -> None:
    image = image_of([_held(source, who) for source in foreign.sources], who.rank, {})
    path = f"{layout.folder(who.step, who.generation)}/{layout.rank_data(who.rank)}"
    with storage.new(path, image.size) as file, _Files() as files:
        staged = _fill(file, image, {source.name: source for source in foreign.sources}, files)
    records = records_of(who, staged, image, foreign.scalars, {}, {}, storage.key)
    leave(storage, who.step, who.generation, who.rank, records)


def _held(source: Source, who: Part) -> Held:
    """Its box on a rank, without memory."""
    box = whole(source.shape)
    if source.shape:
        box, primary = part(box, 0, who.world, who.rank), True
    else:
        primary = zlib.crc32(source.name.encode()) % who.world == who.rank
    local = torch.empty(box.shape, dtype=DTYPES[source.dtype], device="meta")
    return Held(source.name, source.dtype, source.shape, box, local, primary, copies=1)


def _fill(file: NewFile, image: Image, sources: Mapping[str, Source], files: _Files) -> Staged:
    """Write the file piece by piece; its checksums and digests."""
    hashing = Hashing(image, PIECE_BYTES)
    left = _ranges(image, sources)
    ahead: _Range | None = None
    buffer = bytearray(min(PIECE_BYTES, image.size))
    address = ctypes.addressof(ctypes.c_char.from_buffer(buffer))
    for number in range(hashing.pieces):
        start = number * PIECE_BYTES
        piece = memoryview(buffer)[: min(PIECE_BYTES, image.size - start)]
        end = start + len(piece)
        head = image.head[start:end]
        piece[: len(head)] = head
        at = start + len(head)
        while at < end:
            one = ahead or next(left)
            count = min(one.length, end - at)
            files.read(one.path, one.start, piece[at - start : at - start + count])
            ahead = one._replace(into=at + count, length=one.length - count, start=one.start + count)
            ahead = ahead if ahead.length else None
            at += count
        for _ in hashing.blocks(number, Memory(piece, address, start)):
            pass
        file.write(start, piece)
    return hashing.staged()


def _ranges(image: Image, sources: Mapping[str, Source]) -> Iterator[_Range]:
    """All of the file behind its header, in order."""
    for held, start in zip(image.parts, image.starts, strict=True):
        item = ITEM_BYTES[held.dtype]
        found = [
            _Range(start + run.target * item, run.length * item, chunk.path, chunk.start + run.source * item)
            for chunk in sources[held.name].chunks
            for run in runs(chunk.box, held.box)
        ]
        yield from sorted(found)


class _Files(ExitStack):
    """Foreign files to read from; one is open at a time, for tensors come file by file."""

    def __init__(self) -> None:
        super().__init__()
        self._path: Path | None = None
        self._descriptor = -1

    def read(self, path: Path | bytes, start: int, into: memoryview) -> None:
        """Raises ForeignDamaged where the file ends before."""
        if isinstance(path, bytes):
            into[:] = path[start : start + len(into)]
            return
        if path != self._path:
            self.close()
            self._descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
            self.callback(os.close, self._descriptor)
            self._path = path
        while into:
            count = os.preadv(self._descriptor, [into], start)
            if count == 0:
                raise ForeignDamaged(f"{path} ends at byte {start}, inside a tensor; copy it anew")
            into, start = into[count:], start + count
