"""The index of a step as it is asked: which boxes of an atom lie where. Pure.

What `atoms.json` gives as a grid stays one: boxes are made when they are asked for, and where the bytes of a rank lie is added up when the
rank is first asked about, from the order in which files are written. Ranks with boxes of equal sizes share the sums.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import defaultdict
from functools import cached_property
from itertools import accumulate, groupby
from math import prod
from typing import TYPE_CHECKING, NamedTuple

from stormjib_checkpoint.boxes import intersect
from stormjib_checkpoint.errors import DamagedCheckpoint
from stormjib_checkpoint.format import ITEM_BYTES, StoredBox, box_key, file_order
from stormjib_checkpoint.layout import ATOMS, rank_data

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping, Sequence

    from stormjib_checkpoint.boxes import Box
    from stormjib_checkpoint.format import AtomRow, AtomsFile
    from stormjib_checkpoint.grids import Cell, Grid
    from stormjib_checkpoint.layout import GenerationId
    from stormjib_checkpoint.records import Json

Order = tuple[int, str]
"""A tensor's place in the order of a data file."""


class Index:
    """All atoms of a step, by name, and what else its index says."""

    def __init__(self, record: AtomsFile, sizes: Sequence[int], place: str) -> None:
        """`sizes`: the bytes of each rank's data file. `place` is the folder of the step, for errors. Raises DamagedCheckpoint where the
        record cannot be one of these files."""
        self.step: int = record.step
        self.generation: GenerationId = record.generation
        self.ties: Mapping[str, str] = record.ties
        self.absent: tuple[str, ...] = record.absent
        self.scalars: Mapping[str, Json] = record.scalars
        self._files = _Files(record, sizes, place)
        self.atoms: dict[str, IndexAtom] = {
            name: IndexAtom(name, row, self._files) for name, row in record.atoms.items()
        }

    def names_in(self, rank: int, start: int, end: int) -> list[str]:
        """The atoms that have bytes from `start` to `end` of a rank's data file, by name."""
        spans = self._files.spans(rank)
        return sorted({name for name, begin, stop in spans if begin < end and stop > start})

    def head_bytes(self, rank: int) -> int:
        """Where the tensors begin in a rank's data file; its length where it has none."""
        return self._files.head(rank)


class IndexAtom:
    """A whole tensor, unsharded: its type, its shape, and the boxes of it, on all ranks."""

    __slots__ = ("_files", "_grid", "_row", "digest", "dtype", "name", "shape")

    def __init__(self, name: str, row: AtomRow, files: _Files) -> None:
        self.name, self._row, self._files = name, row, files
        self.dtype: str = row.dtype
        self.shape: tuple[int, ...] = row.shape
        self.digest: str | None = row.digest
        """Sum of the partial digests of its boxes; None where one has none."""
        self._grid: Grid | None = None if row.grid is None else files.grids[row.grid]

    @property
    def nbytes(self) -> int:
        return prod(self.shape) * ITEM_BYTES[self.dtype]

    @property
    def boxes(self) -> tuple[StoredBox, ...]:
        """All of them, by rank, then by offset. As many as there are: to be asked by who wants to see them all."""
        if self._grid is None:
            return self._row.boxes or ()
        cells = (self._grid.cell(self.shape, number) for number in range(self._grid.cells))
        return tuple(sorted(self._stored(self._grid, cell) for cell in cells))

    @property
    def ranks(self) -> list[int]:
        """The rank of each box, in their order."""
        if self._grid is None:
            return [box.rank for box in self._row.boxes or ()]
        return sorted(self._lowest + rank for rank in self._grid.holders())

    def meeting(self, box: Box) -> list[StoredBox]:
        """The boxes that share elements with `box`. Raises DamagedCheckpoint where the index does not go with the data files."""
        if self._grid is None:
            return [one for one in self._row.boxes or () if intersect(one.box, box) is not None]
        return [self._stored(self._grid, cell) for cell in self._grid.meeting(self.shape, box)]

    @property
    def _lowest(self) -> int:
        return self._row.rank or 0

    def _stored(self, grid: Grid, cell: Cell) -> StoredBox:
        number, held, offset, shape = cell
        rank = self._lowest + held
        numbers = grid.held_by(held)
        ordinal = 0 if len(numbers) == 1 else bisect_left(numbers, number)
        start = self._files.start(rank, file_order(self.dtype, box_key(self.name, ordinal)))
        return StoredBox(rank, offset, shape, start, start + prod(shape) * ITEM_BYTES[self.dtype])


class _Entry(NamedTuple):
    """A tensor in a data file."""

    order: Order
    nbytes: int
    atom: str


class _Column:
    """Tensors that lie in this order, with others in between."""

    def __init__(self, entries: Iterable[_Entry]) -> None:
        self.entries = sorted(entries)
        self._orders = [entry.order for entry in self.entries]
        self._sums = [0, *accumulate(entry.nbytes for entry in self.entries)]

    @property
    def nbytes(self) -> int:
        return self._sums[-1]

    def before(self, order: Order) -> int:
        """Bytes of those that come before this place."""
        return self._sums[bisect_left(self._orders, order)]


class _Form(NamedTuple):
    """What atoms share that are cut alike and held by the same ranks."""

    grid: int
    lowest: int
    shape: tuple[int, ...]


class _File(NamedTuple):
    """Where the tensors of a rank's data file lie: those at an equal place, but for what lies before, as in other ranks' files, and its own."""

    head: int
    shared: _Column
    own: _Column

    def start(self, order: Order) -> int:
        """Where a tensor begins. Files have no holes: it is where those before it end."""
        return self.head + self.shared.before(order) + self.own.before(order)


class _Files:
    """The data files of all ranks."""

    def __init__(self, record: AtomsFile, sizes: Sequence[int], place: str) -> None:
        self.grids: Sequence[Grid] = record.grids or ()
        self._record, self._sizes, self._place = record, sizes, place
        self._files: dict[int, _File] = {}
        self._shared: dict[object, _Column] = {}
        self._check()

    def _check(self) -> None:
        """What takes no sums: nobody shall go through boxes that cannot be."""
        ranks = len(self._sizes)
        if self._record.heads is not None and self._record.world != ranks:
            raise self._damage(f"is of {self._record.world} ranks, and the step of {ranks}")
        cells = sum(self.grids[form.grid].cells * len(names) for form, names in self._forms.items())
        if cells > sum(self._sizes):
            raise self._damage(f"has {cells} boxes in files of {sum(self._sizes)} bytes together")
        for name, row in self._record.atoms.items():
            for box in row.boxes or ():
                if box.rank >= ranks or box.end > self._sizes[box.rank]:
                    raise self._damage(
                        f"has a box of {name[:200]} up to byte {box.end} of {rank_data(box.rank)}, where nothing is"
                    )

    def head(self, rank: int) -> int:
        """Where the tensors begin in a rank's file; its length where it has none."""
        if self._record.heads is None:
            return min((box.start for _, box in self._boxes.get(rank, ())), default=self._sizes[rank])
        last = 0
        for byte, count in self._record.heads:
            last += count
            if rank < last:
                return byte
        raise IndexError(rank)

    def start(self, rank: int, order: Order) -> int:
        """Where a tensor begins in a rank's file. Raises DamagedCheckpoint where the index does not go with the file."""
        return self._file(rank).start(order)

    def spans(self, rank: int) -> list[tuple[str, int, int]]:
        """All that lies in a rank's file: name of the atom, start, end. Raises DamagedCheckpoint where the index does not go with the file."""
        if self._record.heads is None:
            return [(entry.atom, box.start, box.end) for entry, box in self._boxes.get(rank, ())]
        file = self._file(rank)
        entries = (*file.shared.entries, *file.own.entries)
        starts = [file.start(entry.order) for entry in entries]
        return [(one.atom, start, start + one.nbytes) for one, start in zip(entries, starts, strict=True)]

    def _file(self, rank: int) -> _File:
        file = self._files.get(rank)
        if file is None:
            file = self._files[rank] = self._added_up(rank)
        return file

    def _added_up(self, rank: int) -> _File:
        boxes = self._boxes.get(rank, ())
        own = _Column([*self._of(self._alone.get(rank, ()), rank), *(entry for entry, _ in boxes)])
        file = _File(self.head(rank), self._shared_by(rank), own)
        end = file.head + file.shared.nbytes + file.own.nbytes
        if end != self._sizes[rank]:
            raise self._damage(f"says that {rank_data(rank)} has {end} bytes, and it has {self._sizes[rank]}")
        for entry, box in boxes:
            if file.start(entry.order) != box.start:
                raise self._damage(
                    f"says that {entry.atom[:200]} is at byte {box.start} of {rank_data(rank)}, and that what lies before it "
                    f"ends at {file.start(entry.order)}"
                )
        return file

    def _damage(self, what: str) -> DamagedCheckpoint:
        return DamagedCheckpoint(f"{self._place}/{ATOMS} {what}")

    def _shared_by(self, rank: int) -> _Column:
        """The tensors in a rank's file of atoms that lie on several ranks: the same for all ranks whose boxes have the same sizes."""
        volumes = tuple(self._volumes(form, rank) for form in self._wide)
        column = self._shared.get(volumes)
        if column is None:
            column = self._shared[volumes] = _Column(self._of(self._wide, rank))
        return column

    def _of(self, forms: Iterable[_Form], rank: int) -> Iterator[_Entry]:
        for form in forms:
            for ordinal, volume in enumerate(self._volumes(form, rank)):
                for name in self._forms[form]:
                    yield _entry(name, self._record.atoms[name].dtype, ordinal, volume)

    def _volumes(self, form: _Form, rank: int) -> tuple[int, ...]:
        """Elements of each box that a rank has of an atom of this form."""
        grid = self.grids[form.grid]
        return tuple(prod(grid.cell(form.shape, number).shape) for number in grid.held_by(rank - form.lowest))

    @cached_property
    def _forms(self) -> dict[_Form, list[str]]:
        found: dict[_Form, list[str]] = defaultdict(list)
        for name, row in self._record.atoms.items():
            if row.grid is not None and row.rank is not None:
                found[_Form(row.grid, row.rank, row.shape)].append(name)
        return found

    @cached_property
    def _wide(self) -> list[_Form]:
        return [form for form in self._forms if self.grids[form.grid].cells > 1]

    @cached_property
    def _alone(self) -> dict[int, list[_Form]]:
        """Those that lie on one rank, by rank: there may be thousands, and nobody shall ask each of them about each rank."""
        found: dict[int, list[_Form]] = defaultdict(list)
        for form in self._forms:
            if self.grids[form.grid].cells == 1:
                found[form.lowest].append(form)
        return found

    @cached_property
    def _boxes(self) -> dict[int, list[tuple[_Entry, StoredBox]]]:
        """By rank, the boxes that are given one by one."""
        found: dict[int, list[tuple[_Entry, StoredBox]]] = defaultdict(list)
        for name, row in self._record.atoms.items():
            for rank, boxes in groupby(sorted(row.boxes or ()), key=lambda box: box.rank):
                for ordinal, box in enumerate(boxes):
                    found[rank].append((_entry(name, row.dtype, ordinal, prod(box.shape)), box))
        return found


def _entry(name: str, dtype: str, ordinal: int, volume: int) -> _Entry:
    return _Entry(file_order(dtype, box_key(name, ordinal)), volume * ITEM_BYTES[dtype], name)
