"""The files of a checkpoint as records (FORMAT.md says the same in words), with what must hold inside each one."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from math import prod
from typing import TYPE_CHECKING, NamedTuple

from stormjib_checkpoint.boxes import Box
from stormjib_checkpoint.grids import Grid  # noqa: TC001 - records are built from their annotations
from stormjib_checkpoint.layout import GenerationId
from stormjib_checkpoint.records import Json  # noqa: TC001 - records are built from their annotations

if TYPE_CHECKING:
    from collections.abc import Mapping

PIECE_BYTES = 16 * 1024 * 1024
"""A rank's data file is hashed in pieces of this size, so that a damaged place can be named and read alone."""

MAX_SMALL_FILE = 256 * 1024 * 1024
"""No record is longer; a longer one is refused before it is read."""

SUB_BYTE: Mapping[str, int] = {f"{sign}{bits}": 1 for sign in "UI" for bits in range(1, 8)}
"""Integers of less than eight bits, each in a byte of its own."""
_UNKNOWN_TO_SAFETENSORS: Mapping[str, int] = {
    **SUB_BYTE, "F4_E2M1_X2": 1, "BITS8": 1, "BITS1X8": 1, "BITS2X4": 1, "BITS4X2": 1,
    "BITS16": 2, "C32": 4, "BC32": 4, "C128": 16,
}  # fmt: skip
AS_BYTES = frozenset(_UNKNOWN_TO_SAFETENSORS)
"""Tags that safetensors lack, or count otherwise: in the data file such a tensor is U8, and only the records say what it is."""

ITEM_BYTES: Mapping[str, int] = {
    "BOOL": 1, "U8": 1, "I8": 1, "F8_E4M3": 1, "F8_E5M2": 1, "F8_E4M3FNUZ": 1, "F8_E5M2FNUZ": 1, "F8_E8M0": 1,
    "U16": 2, "I16": 2, "F16": 2, "BF16": 2,
    "U32": 4, "I32": 4, "F32": 4,
    "U64": 8, "I64": 8, "F64": 8, "C64": 8,
    **_UNKNOWN_TO_SAFETENSORS,
}  # fmt: skip
"""Bytes of an element by type tag, as torch has it in memory: an I4 is a byte, and an F4_E2M1_X2 is two numbers."""

RESERVED = "__"
"""Names of a state do not begin so: those that do are kept for the format."""

GRID = "grid"
"""In `requires` of an `atoms.json` that has grids."""

WIDEST = max(ITEM_BYTES.values())
"""Bytes of the widest element. Pieces are multiples of it: no element lies across their borders."""

_DIGEST = re.compile(r"[0-9a-f]{16}")


def box_key(name: str, ordinal: int) -> str:
    """The key in a rank's data file of its box number `ordinal` of an atom, in the order of their offsets."""
    return name if ordinal == 0 else f"{RESERVED}box.{ordinal}.{name}"


def file_order(dtype: str, key: str) -> tuple[int, str]:
    """Tensors follow each other in a data file as these are sorted: widest elements first, then by key."""
    return (-ITEM_BYTES[dtype], key)


class ResumePoint(NamedTuple):
    """A committed step: which one, the generation that wrote it (`2.7`), and the SHA-256 of its manifest."""

    step: int
    generation: str
    digest: str


class StoredBox(NamedTuple):
    """A box of an atom and where its bytes (row-major, little-endian) lie in the data file of `rank`."""

    rank: int
    offset: tuple[int, ...]
    shape: tuple[int, ...]
    start: int
    end: int
    digest: str | None = None
    """Partial digest of these elements, which does not depend on how the atom is cut. The index has the atom's instead."""

    @property
    def box(self) -> Box:
        return Box(self.offset, self.shape)


@dataclass(frozen=True)
class Atom:
    """A whole tensor, unsharded: its type, its shape, and the boxes of it that a rank has stored."""

    dtype: str
    shape: tuple[int, ...]
    boxes: tuple[StoredBox, ...]

    def __post_init__(self) -> None:
        _check_boxes(self.dtype, self.shape, self.boxes)


@dataclass(frozen=True)
class AtomRow:
    """An atom in `atoms.json`, with all its boxes: each by itself, or as a grid whose cells lie on `rank` and higher ones."""

    dtype: str
    shape: tuple[int, ...]
    boxes: tuple[StoredBox, ...] | None = None
    grid: int | None = None
    """Its number in the file."""
    rank: int | None = None
    """The lowest rank that holds a cell; those of the grid are counted from it."""
    digest: str | None = None
    """Of the whole atom: the sum of its boxes' partial digests, where each has one."""

    def __post_init__(self) -> None:
        _check_boxes(self.dtype, self.shape, self.boxes or ())
        _check_digest(self.digest)
        if (self.boxes is None) is (self.grid is None) or (self.grid is None) is not (self.rank is None):
            raise ValueError("wanted either boxes, or grid and rank")


def _check_boxes(dtype: str, shape: tuple[int, ...], boxes: tuple[StoredBox, ...]) -> None:
    item = ITEM_BYTES.get(dtype)
    if item is None:
        raise ValueError(f"unknown dtype {dtype[:40]!r}")
    for stored in boxes:
        _check_box(stored, shape, item)


def _check_box(stored: StoredBox, shape: tuple[int, ...], item: int) -> None:
    if not len(stored.offset) == len(stored.shape) == len(shape):
        raise ValueError(f"a box of {len(stored.shape)} dimensions in an atom of {len(shape)}")
    for offset, size, length in zip(stored.offset, stored.shape, shape, strict=True):
        if not 0 <= offset < offset + size <= length:
            raise ValueError(
                f"a box at {list(stored.offset)} reaches outside shape {list(shape)}, or is empty"
            )
    if stored.end - stored.start != prod(stored.shape) * item:
        raise ValueError(
            f"bytes {stored.start} to {stored.end} do not hold a box of shape {list(stored.shape)}"
        )
    _check_digest(stored.digest)


def _check_digest(digest: str | None) -> None:
    if digest is not None and _DIGEST.fullmatch(digest) is None:
        raise ValueError(f"digest {digest[:40]!r} is not 16 hexadecimal digits")


@dataclass(frozen=True)
class DataFile:
    """A rank's tensors: length of the file and xxh3_64 (16 hexadecimal digits) of each piece of it."""

    bytes: int
    piece_bytes: int
    pieces: tuple[str, ...]

    def __post_init__(self) -> None:
        if not 0 < self.piece_bytes <= 2**30 or self.piece_bytes % WIDEST:
            raise ValueError(f"pieces of {self.piece_bytes} bytes")
        if len(self.pieces) != -(-self.bytes // self.piece_bytes):
            raise ValueError(
                f"{len(self.pieces)} pieces of {self.piece_bytes} bytes for a file of {self.bytes}"
            )


@dataclass(frozen=True)
class RankFile:
    """`rank-k.json`: what one rank left. `atoms` names all it held; boxes only where its copy is the primary one."""

    step: int
    generation: GenerationId
    rank: int
    world: int
    attempt: str
    data: DataFile
    atoms: dict[str, Atom]
    ties: dict[str, str]
    """Other name of an atom -> the atom's."""
    absent: tuple[str, ...]
    """States that are not there: `optim.w` of a parameter w that has never been stepped."""
    scalars: dict[str, Json]
    samples: dict[int, tuple[int, ...]]

    def __post_init__(self) -> None:
        _check_names(self)
        if self.rank >= self.world:
            raise ValueError(f"rank {self.rank} of {self.world}")
        for name, atom in self.atoms.items():
            if any(stored.rank != self.rank or stored.end > self.data.bytes for stored in atom.boxes):
                raise ValueError(f"atom {name[:200]!r} has a box outside this rank's file")


@dataclass(frozen=True)
class AtomsFile:
    """`atoms.json`: the index of a step, in one coordinate system for all ranks. `index.Index` answers from it."""

    step: int
    generation: GenerationId
    atoms: dict[str, AtomRow]
    ties: dict[str, str]
    absent: tuple[str, ...]
    scalars: dict[str, Json]
    grids: tuple[Grid, ...] | None = None
    """The ways in which atoms are cut, by number. None where every atom has its boxes."""
    heads: tuple[tuple[int, ...], ...] | None = None
    """Where the tensors begin in the data file of each rank, as runs (byte, count of ranks). There where grids are."""

    def __post_init__(self) -> None:
        _check_names(self)
        _check_heads(self)
        grids, world = self.grids or (), self.world
        for name, row in self.atoms.items():
            if row.grid is not None and row.rank is not None:
                _check_grid(name, row, grids, row.rank, world)

    @property
    def world(self) -> int:
        """How many ranks the heads are of; 0 where there are none."""
        return sum(count for _, count in self.heads or ())

    @property
    def requires(self) -> tuple[str, ...]:
        """What a reader must know of."""
        return () if self.grids is None else (GRID,)


def _check_heads(record: AtomsFile) -> None:
    heads = record.heads or ()
    if any(len(run) != 2 or not run[1] for run in heads):
        raise ValueError("heads are runs of two numbers, of at least one rank each")
    if len({bool(record.grids), bool(heads), record.grids is not None, record.heads is not None}) > 1:
        raise ValueError("wanted grids and heads, or neither of them")


def _check_grid(name: str, row: AtomRow, grids: tuple[Grid, ...], rank: int, world: int) -> None:
    if row.grid is None or row.grid >= len(grids):
        raise ValueError(f"atom {name[:200]!r} has grid {row.grid} of {len(grids)}")
    grid = grids[row.grid]
    if not grid.fits(row.shape):
        raise ValueError(
            f"atom {name[:200]!r} has shape {list(row.shape)}, which grid {row.grid} does not cut"
        )
    if rank + grid.top >= world:
        raise ValueError(f"atom {name[:200]!r} has a cell on rank {rank + grid.top} of {world}")


def _check_names(record: RankFile | AtomsFile) -> None:
    """Each name says one thing, a tie leads to an atom, and what is absent has no parts."""
    every = [*record.atoms, *record.ties, *record.scalars]
    names = set(every)
    if len(names) < len(every) or len(set(record.absent)) < len(record.absent):
        raise ValueError("a name comes twice")
    for name, atom in record.ties.items():
        if atom not in record.atoms:
            raise ValueError(f"{name[:200]!r} is tied to {atom[:200]!r}, which is no atom here")
    owners = names | {name.rpartition(".")[0] for name in names}
    for name in record.absent:
        if name in owners:
            raise ValueError(f"{name[:200]!r} is absent and there")


@dataclass(frozen=True)
class TrainFile:
    """`train.json`: what the trainer needs besides tensors (step, cursor, schedule, seed), as it gave it."""

    step: int
    generation: GenerationId
    train: dict[str, Json]


@dataclass(frozen=True)
class LedgerRef:
    """The ledger segment that a manifest vouches for: `ledger/gG/FIRST-LAST.jsonl`."""

    first: int
    last: int
    sha256: str


@dataclass(frozen=True)
class Manifest:
    """`MANIFEST.json`: written last; a step exists when it does. Holds nothing but what the other files say."""

    step: int
    generation: GenerationId
    job_uid: str
    world: int
    files: dict[str, str]
    """Name of each small file beside it -> SHA-256."""
    data: dict[str, int]
    """Name of each data file beside it -> bytes."""
    ledger: LedgerRef | None


@dataclass(frozen=True)
class DoubtFile:
    """`doubts/g2.7.json`: why a generation has ended itself: its numbers were wrong from some step on."""

    generation: GenerationId
    step: int
    """In which it was seen."""
    trusted: int
    """The newest step whose state is not in doubt."""
    numbers: dict[str, Json]
    """What the trainer wants to compare with when the steps are done again, as it gave it."""


@dataclass(frozen=True)
class GenerationFile:
    """`generations/gG.json`: whose child a generation is and where it began."""

    generation: GenerationId
    parent: GenerationId | None
    job_uid: str
    resume: ResumePoint | None

    def __post_init__(self) -> None:
        if self.parent is not None and self.parent >= self.generation:
            raise ValueError(f"parent {self.parent} is not below {self.generation}")
        if self.resume is not None and not GenerationId.parse(self.resume.generation) < self.generation:
            raise ValueError(f"resumes from {self.resume.generation}, which is not below {self.generation}")


@dataclass(frozen=True)
class HintFile:
    """`hints/gG.json`: the newest steps that a generation has committed, oldest first. The only file that is written over."""

    generation: GenerationId
    steps: tuple[int, ...]


@dataclass(frozen=True)
class LedgerLine:
    """One step of a ledger segment: the sample ids that each rank fed to the model, by rank."""

    step: int
    ranks: tuple[tuple[int, ...], ...] = field(default=())
