"""The index of a step, made of what its ranks say: they must agree, and together hold every tensor exactly once. Pure.

Nobody tells how a tensor was cut: a grid is found again in the boxes of all ranks, and taken where it gives back the very same ones. Records
are added one by one and none is kept: those of many ranks with thousands of tensors would fill gigabytes.
"""

from __future__ import annotations

from array import array
from itertools import chain
from math import prod
from typing import TYPE_CHECKING, NamedTuple

from stormjib_checkpoint.boxes import Box, flaw
from stormjib_checkpoint.errors import Inconsistent
from stormjib_checkpoint.format import ITEM_BYTES, AtomRow, AtomsFile, StoredBox, box_key, file_order
from stormjib_checkpoint.grids import Held, equal_runs, fit
from stormjib_checkpoint.records import canonical

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from stormjib_checkpoint.format import Atom, RankFile
    from stormjib_checkpoint.grids import Grid
    from stormjib_checkpoint.records import Json


class Indexing:
    """The index of the ranks whose records have been added."""

    def __init__(self, place: str) -> None:
        """`place` is named in errors."""
        self._place = place
        self._first: RankFile | None = None
        self._scalars = b""
        self._ties: dict[str, tuple[int, str]] = {}
        self._absent: set[str] = set()
        self._atoms: dict[str, _Whole] = {}
        self._cuttings = _Cuttings()
        self._heads: list[int] = []
        self._in_order = True

    def add(self, record: RankFile) -> None:
        """The record of the next rank. Raises Inconsistent where it does not go with those before it."""
        if self._first is None:
            self._first, self._scalars = record, canonical(record.scalars)
        self._check_equal(record, self._first)
        self._add_ties(record)
        self._absent.update(record.absent)
        for name, atom in record.atoms.items():
            self._add_atom(record.rank, name, atom)
        self._heads.append(_head(record))
        self._in_order = self._in_order and _is_in_order(record)

    def index(self) -> AtomsFile:
        """The record of the whole step. Raises Inconsistent where the ranks do not hold every atom exactly once."""
        if self._first is None:
            raise Inconsistent(f"{self._place}: no rank has a record")
        self._check_absent(self._first)
        rows, grids = self._rows()
        return AtomsFile(
            self._first.step,
            self._first.generation,
            rows,
            {name: atom for name, (_, atom) in self._ties.items() if name != atom},
            tuple(sorted(self._absent)),
            self._first.scalars,
            grids or None,
            equal_runs(self._heads) if grids else None,
        )

    def _check_equal(self, record: RankFile, first: RankFile) -> None:
        if record.attempt != first.attempt:
            raise Inconsistent(
                f"{self._place}: rank {record.rank} wrote in attempt {record.attempt!r}, rank 0 in {first.attempt!r}; "
                "ranks were restarted in between, so the parts do not belong together"
            )
        if canonical(record.scalars) != self._scalars:
            key = min(k for k, _ in {*_texts(record.scalars)} ^ {*_texts(first.scalars)})
            raise Inconsistent(f"{self._place}: {key} differs between rank 0 and rank {record.rank}")

    def _add_ties(self, record: RankFile) -> None:
        """Names of atoms may go by another name. Ranks that know a name must agree on what it is."""
        for name, atom in chain(record.ties.items(), zip(record.atoms, record.atoms, strict=True)):
            known = self._ties.get(name)
            if known is None:
                self._ties[name] = (record.rank, atom)
            elif known[1] != atom:
                raise Inconsistent(
                    f"{self._place}: to rank {known[0]} {name} is the tensor {known[1]}, to rank {record.rank} {atom}; a "
                    "tensor must be shared on all ranks that hold it, or on none"
                )

    def _add_atom(self, rank: int, name: str, atom: Atom) -> None:
        whole = self._atoms.get(name)
        if whole is None:
            whole = self._atoms[name] = _Whole(atom.dtype, atom.shape)
        if whole.shape != atom.shape or whole.dtype != atom.dtype:
            raise Inconsistent(
                f"{self._place}: rank {rank} has {name} as {atom.dtype} {list(atom.shape)}, "
                f"another rank as {whole.dtype} {list(whole.shape)}"
            )
        for box in sorted(atom.boxes) if len(atom.boxes) > 1 else atom.boxes:
            whole.boxes.append(self._cuttings.number(Held(*box[:3])))
            whole.starts.append(box.start)
            if whole.digest is not None:
                whole.digest = None if box.digest is None else whole.digest + int(box.digest, 16)

    def _check_absent(self, first: RankFile) -> None:
        """What one rank has is to no other rank absent."""
        there = {name: rank for name, (rank, _) in self._ties.items()} | dict.fromkeys(first.scalars, 0)
        for name, rank in there.items() if self._absent else ():
            if name in self._absent or name.rpartition(".")[0] in self._absent:
                raise Inconsistent(f"{self._place}: rank {rank} has {name}; to another rank it is absent")

    def _rows(self) -> tuple[dict[str, AtomRow], tuple[Grid, ...]]:
        """The rows of the index, and the grids that they name."""
        numbers: dict[Grid, int] = {}
        rows = {}
        for name, whole in sorted(self._atoms.items()):
            cutting = self._cuttings.of(whole)
            if cutting.flaw is not None:
                raise Inconsistent(
                    f"{self._place}: the ranks do not hold {name} exactly once: {cutting.flaw} (it is {whole.dtype} "
                    f"{list(whole.shape)}); mend how the ranks cut it (a layout's rule for it, or the DTensor's placements) and save again"
                )
            form, digest = (whole.dtype, whole.shape), whole.told_digest
            # Where bytes lie follows from what lies there only in files that are in order.
            if cutting.grid is not None and self._in_order:
                number = numbers.setdefault(cutting.grid, len(numbers))
                rows[name] = AtomRow(*form, None, number, cutting.lowest, digest)
            else:
                rows[name] = AtomRow(*form, self._cuttings.stored(whole), digest=digest)
        return rows, tuple(numbers)


def _texts(scalars: Mapping[str, Json]) -> Iterator[tuple[str, bytes]]:
    """Compared as they are written: to Python 0.0 equals -0.0, and 1 equals true."""
    return ((key, canonical(value)) for key, value in scalars.items())


class _Whole:
    """An atom as it comes together, in 16 bytes a box."""

    __slots__ = ("boxes", "digest", "dtype", "shape", "starts")

    def __init__(self, dtype: str, shape: tuple[int, ...]) -> None:
        self.dtype, self.shape = dtype, shape
        self.boxes = array("q")
        """Numbers of its boxes, by rank, then by offset."""
        self.starts = array("q")
        """Where each begins in the file of its rank."""
        self.digest: int | None = 0
        """Sum of the partial digests of its boxes. None where one has none."""

    @property
    def told_digest(self) -> str | None:
        return None if self.digest is None else f"{self.digest % 2**64:016x}"


class _Cutting(NamedTuple):
    """How an atom is cut: a grid, whose cells tile it however many there are; other boxes, which were looked at one by one; or not exactly
    once."""

    grid: Grid | None
    lowest: int
    flaw: str | None


class _Cuttings:
    """How atoms are cut: found once for all that are cut alike, which are nearly all of thousands in a large model."""

    def __init__(self) -> None:
        self._numbers: dict[Held, int] = {}
        self._held: list[Held] = []
        self._known: dict[tuple[tuple[int, ...], bytes], _Cutting] = {}

    def number(self, held: Held) -> int:
        """One number for equal boxes on one rank."""
        number = self._numbers.setdefault(held, len(self._held))
        if number == len(self._held):
            self._held.append(held)
        return number

    def of(self, whole: _Whole) -> _Cutting:
        """How an atom is cut."""
        key = (whole.shape, whole.boxes.tobytes())
        known = self._known.get(key)
        if known is None:
            known = self._known[key] = _cutting(whole.shape, [self._held[number] for number in whole.boxes])
        return known

    def stored(self, whole: _Whole) -> tuple[StoredBox, ...]:
        """The boxes of an atom."""
        item = ITEM_BYTES[whole.dtype]
        pairs = zip((self._held[number] for number in whole.boxes), whole.starts, strict=True)
        return tuple(StoredBox(*held, start, start + prod(held.shape) * item) for held, start in pairs)


def _cutting(shape: tuple[int, ...], held: Sequence[Held]) -> _Cutting:
    fitting = fit(shape, held)
    if fitting is not None:
        return _Cutting(*fitting, None)
    return _Cutting(None, 0, flaw(shape, [Box(box.offset, box.shape) for box in held]))


def _head(record: RankFile) -> int:
    """Where the tensors begin in a rank's data file; its length where it has none."""
    starts = (box.start for atom in record.atoms.values() for box in atom.boxes)
    return min(starts, default=record.data.bytes)


def _is_in_order(record: RankFile) -> bool:
    """Whether a rank's tensors lie in the order of the format, one after the other, to the end of its file."""
    end = _head(record)
    for _, box in sorted(_in_file(record)):
        if box.start != end:
            return False
        end = box.end
    return end == record.data.bytes


def _in_file(record: RankFile) -> Iterator[tuple[tuple[int, str], StoredBox]]:
    for name, atom in record.atoms.items():
        for ordinal, box in enumerate(sorted(atom.boxes)):
            yield file_order(atom.dtype, box_key(name, ordinal)), box
