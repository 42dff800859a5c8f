"""The index of a step, made of what its ranks say: they must agree, and together hold every tensor exactly once. Pure.

Nobody tells how a tensor was cut: a grid is found again in the boxes of all ranks, and taken where it gives back the very same ones.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from stormjib_checkpoint.boxes import Box, flaw
from stormjib_checkpoint.errors import Inconsistent
from stormjib_checkpoint.format import AtomRow, AtomsFile, box_key, file_order
from stormjib_checkpoint.grids import Held, equal_runs, fit
from stormjib_checkpoint.records import canonical

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping, Sequence

    from stormjib_checkpoint.format import RankFile, StoredBox
    from stormjib_checkpoint.grids import Grid
    from stormjib_checkpoint.records import Json


def index_of(ranks: Sequence[RankFile], place: str) -> AtomsFile:
    """`atoms.json` of all ranks' records; `place` is named in errors. Raises Inconsistent."""
    first = ranks[0]
    _check_equal(ranks, place)
    ties, absent = _ties(ranks, place), _absent(ranks, place)
    rows, grids = _rows(_atoms(ranks, place), place, all(_is_in_order(record) for record in ranks))
    heads = equal_runs([_head(record) for record in ranks]) if grids else None
    return AtomsFile(first.step, first.generation, rows, ties, absent, first.scalars, grids or None, heads)


def _check_equal(ranks: Sequence[RankFile], place: str) -> None:
    first, scalars = ranks[0], canonical(ranks[0].scalars)
    for record in ranks[1:]:
        if record.attempt != first.attempt:
            raise Inconsistent(
                f"{place}: rank {record.rank} wrote in attempt {record.attempt!r}, rank 0 in {first.attempt!r}; "
                "ranks were restarted in between, so the parts do not belong together"
            )
        if canonical(record.scalars) != scalars:
            key = min(k for k, _ in {*_texts(record.scalars)} ^ {*_texts(first.scalars)})
            raise Inconsistent(f"{place}: {key} differs between rank 0 and rank {record.rank}")


def _texts(scalars: Mapping[str, Json]) -> Iterator[tuple[str, bytes]]:
    """Compared as they are written: to Python 0.0 equals -0.0, and 1 equals true."""
    return ((key, canonical(value)) for key, value in scalars.items())


class _Whole(NamedTuple):
    """An atom, with the boxes of all ranks."""

    dtype: str
    shape: tuple[int, ...]
    boxes: list[StoredBox]


def _atoms(ranks: Iterable[RankFile], place: str) -> dict[str, _Whole]:
    """The atoms of all ranks. Raises Inconsistent where two differ about one."""
    found: dict[str, _Whole] = {}
    for record in ranks:
        for name, atom in record.atoms.items():
            whole = found.get(name)
            if whole is None:
                whole = found[name] = _Whole(atom.dtype, atom.shape, [])
            if whole.shape != atom.shape or whole.dtype != atom.dtype:
                raise Inconsistent(
                    f"{place}: rank {record.rank} has {name} as {atom.dtype} {list(atom.shape)}, "
                    f"another rank as {whole.dtype} {list(whole.shape)}"
                )
            whole.boxes.extend(atom.boxes)
    return found


def _rows(
    atoms: Mapping[str, _Whole], place: str, in_order: bool
) -> tuple[dict[str, AtomRow], tuple[Grid, ...]]:
    """The rows of the index, and the grids that they name. `in_order`: where bytes lie follows from what lies there, as grids need it.

    Raises Inconsistent where an atom is not tiled exactly once.
    """
    cuttings = _Cuttings()
    numbers: dict[Grid, int] = {}
    rows = {}
    for name, (dtype, shape, boxes) in sorted(atoms.items()):
        cutting = cuttings.of(shape, boxes)
        if cutting.flaw is not None:
            raise Inconsistent(f"{place}: the ranks do not hold {name} exactly once: {cutting.flaw}")
        digest = _sum(boxes)
        if cutting.grid is not None and in_order:
            number = numbers.setdefault(cutting.grid, len(numbers))
            rows[name] = AtomRow(dtype, shape, None, number, cutting.lowest, digest)
        else:
            rows[name] = AtomRow(
                dtype, shape, tuple(box._replace(digest=None) for box in sorted(boxes)), digest=digest
            )
    return rows, tuple(numbers)


class _Cutting(NamedTuple):
    """How an atom is cut: a grid, whose cells tile it however many there are; other boxes, which need a look; or not exactly once."""

    grid: Grid | None
    lowest: int
    flaw: str | None


class _Cuttings:
    """Found once for all atoms that are cut alike: of a large model, a handful for thousands of them."""

    def __init__(self) -> None:
        self._known: dict[tuple[tuple[int, ...], tuple[Held, ...]], _Cutting] = {}

    def of(self, shape: tuple[int, ...], boxes: Iterable[StoredBox]) -> _Cutting:
        """How an atom of this shape is cut into `boxes`."""
        held = tuple([Held(*box[:3]) for box in boxes])
        known = self._known.get((shape, held))
        if known is None:
            known = self._known[shape, held] = _cutting(shape, held)
        return known


def _cutting(shape: tuple[int, ...], held: Sequence[Held]) -> _Cutting:
    fitting = fit(shape, held)
    if fitting is not None:
        return _Cutting(*fitting, None)
    return _Cutting(None, 0, flaw(shape, [Box(box.offset, box.shape) for box in held]))


def _sum(boxes: Iterable[StoredBox]) -> str | None:
    """The digest of an atom: partial digests of its boxes add up to it. None where one has none."""
    digest = 0
    for box in boxes:
        if box.digest is None:
            return None
        digest += int(box.digest, 16)
    return f"{digest % 2**64:016x}"


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


def _head(record: RankFile) -> int:
    """Where the tensors begin in a rank's data file; its length where it has none."""
    starts = (box.start for atom in record.atoms.values() for box in atom.boxes)
    return min(starts, default=record.data.bytes)


def _ties(ranks: Iterable[RankFile], place: str) -> dict[str, str]:
    """Names of atoms that go by another name. Ranks that know a name must agree on what it is. Raises Inconsistent."""
    ties: dict[str, tuple[int, str]] = {}
    for record in ranks:
        for name, atom in (record.ties | {name: name for name in record.atoms}).items():
            first, known = ties.setdefault(name, (record.rank, atom))
            if known != atom:
                raise Inconsistent(
                    f"{place}: to rank {first} {name} is the tensor {known}, to rank {record.rank} {atom}; a tensor must "
                    "be shared on all ranks that hold it, or on none"
                )
    return {name: atom for name, (_, atom) in ties.items() if name != atom}


def _absent(ranks: Iterable[RankFile], place: str) -> tuple[str, ...]:
    """What no rank has. Raises Inconsistent where one has it."""
    ranks = tuple(ranks)
    absent = {name for record in ranks for name in record.absent}
    for record in ranks:
        for name in (*record.atoms, *record.ties, *record.scalars):
            if name in absent or name.rpartition(".")[0] in absent:
                raise Inconsistent(f"{place}: rank {record.rank} has {name}; to another rank it is absent")
    return tuple(sorted(absent))
