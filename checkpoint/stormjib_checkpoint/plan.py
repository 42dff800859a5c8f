"""What to read for the boxes that a rank wants: which bytes of which files, in how many requests, and where each byte goes. Pure.

Each rank plans for itself, from the index alone and without a word to the others; equal wishes give equal plans.
"""

from __future__ import annotations

from collections import defaultdict
from itertools import product
from math import prod
from operator import attrgetter
from typing import TYPE_CHECKING, NamedTuple

from stormjib_checkpoint.boxes import Box, contiguous_from, intersect
from stormjib_checkpoint.format import ITEM_BYTES

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from stormjib_checkpoint.format import StoredBox
    from stormjib_checkpoint.index import IndexAtom

SPAN = 16 * 1024 * 1024
"""Bytes of the longest read: what a thread has in its hands at once."""
FEW = 8
"""So many runs of one box are read one by one, whatever their length; more of them only where each is long."""
WASTE = 25
"""Of so many bytes that are wanted one may be read in vain, to have fewer requests."""


class Target(NamedTuple):
    """A box of an atom that is wanted, in memory of its own that is contiguous and row-major."""

    atom: str
    box: Box
    copies: int
    """So many ranks want the same."""


class Cut(NamedTuple):
    """Elements of a stored box that lie one after the other in its file and in the target."""

    target: int
    """Number of the target."""
    source: StoredBox
    first: int
    """The first of them, by its row-major number in the source box."""
    into: int
    """And in the target."""
    start: int
    """Byte of the file."""
    length: int
    """Bytes."""

    @property
    def end(self) -> int:
        return self.start + self.length


class Read(NamedTuple):
    """One request, and what is cut out of it."""

    start: int
    length: int
    cuts: list[Cut]


class Strip(NamedTuple):
    """Many short runs that one target wants of one stored box: the same part of each of some of its rows."""

    target: int
    source: StoredBox
    shared: Box
    """What both boxes have, in the coordinates of the atom. Its elements, row by row, are those of the runs."""
    first: int
    """Number in `shared` of the first element of these runs."""
    into: int
    """And in the target."""
    into_step: int
    """Elements of the target from one run to the next."""
    rows: int
    start: int
    """Byte of the file at which the first row begins. Who wants another part of the rows has the same."""
    row_bytes: int
    skip: int
    """Bytes of each row before the run."""
    run: int
    """Bytes of a run."""
    whole: bool
    """The rows are read whole: that is less work than a request for each run."""

    @property
    def length(self) -> int:
        """Bytes of the rows."""
        return self.rows * self.row_bytes

    def cuts(self) -> Iterator[Cut]:
        """Its runs, one by one."""
        size = (self.source.end - self.source.start) // self.source.box.volume
        for row in range(self.rows):
            start = self.start + row * self.row_bytes + self.skip
            first, into = (start - self.source.start) // size, self.into + row * self.into_step
            yield Cut(self.target, self.source, first, into, start, self.run)


class FilePlan(NamedTuple):
    """What is wanted of the data file of one rank."""

    rank: int
    reads: list[Read]
    strips: list[Strip]


class Cost(NamedTuple):
    """What a plan costs: bytes that are wanted, bytes that are read for them, and requests."""

    needed: int
    read: int
    requests: int


def plan(
    targets: Sequence[Target], atoms: Mapping[str, IndexAtom], request: int, span: int = SPAN
) -> list[FilePlan]:
    """The reads that fill all targets, by file. `request`: so many bytes take as long to read as one more request; none is longer than
    `span`, but for a single row."""
    # What has as many copies is read by itself: so those who want the same have the same requests, which can be shared.
    cuts: defaultdict[int, defaultdict[int, list[Cut]]] = defaultdict(lambda: defaultdict(list))
    strips: defaultdict[int, list[Strip]] = defaultdict(list)
    for number, target in enumerate(targets):
        atom = atoms[target.atom]
        size = ITEM_BYTES[atom.dtype]
        for source in atom.meeting(target.box):
            shared = intersect(source.box, target.box)
            if shared is None:
                continue
            runs = _Runs(number, source, target.box, shared, size)
            if runs.are_many:
                strips[source.rank] += runs.strips(request, span)
            else:
                cuts[source.rank][target.copies] += runs.cuts()
    return [
        FilePlan(
            rank,
            sorted(
                (read for some in cuts[rank].values() for read in coalesced(some, request, span)),
                key=attrgetter("start"),
            ),
            strips[rank],
        )
        for rank in sorted(cuts.keys() | strips.keys())
    ]


def cost(file: FilePlan) -> Cost:
    """What the reads of one file cost."""
    runs = sum(strip.rows * strip.run for strip in file.strips)
    return Cost(
        sum(cut.length for read in file.reads for cut in read.cuts) + runs,
        sum(read.length for read in file.reads)
        + sum(strip.length if strip.whole else strip.rows * strip.run for strip in file.strips),
        len(file.reads) + sum(1 if strip.whole else strip.rows for strip in file.strips),
    )


class _Runs:
    """What a target and a stored box have in common, as runs that are contiguous in both."""

    def __init__(self, target: int, source: StoredBox, box: Box, shared: Box, size: int) -> None:
        self._target, self._source, self._box, self._shared, self._size = target, source, box, shared, size
        self._dims = contiguous_from(shared, source.box, box)
        """Before which a run has one element."""
        self._length = prod(shared.shape[self._dims :])

    @property
    def are_many(self) -> bool:
        """Too many, and too short, to be read one by one."""
        count = self._shared.volume // self._length
        return count > FEW and self._length * self._size < SPAN // WASTE

    def cuts(self) -> Iterator[Cut]:
        """One by one."""
        for point in self._points(self._dims):
            first, into = _index(self._source.box, point), _index(self._box, point)
            start = self._source.start + first * self._size
            yield Cut(self._target, self._source, first, into, start, self._length * self._size)

    def strips(self, request: int, span: int) -> Iterator[Strip]:
        """Rows along the last dimension before the runs: from one to the next it is equally far, in the file and in the target."""
        box, shared, dim = self._source.box, self._shared, self._dims - 1
        row = prod(box.shape[dim + 1 :])
        row_bytes, run = row * self._size, self._length * self._size
        skip = _index(box, (*box.offset[: dim + 1], *shared.offset[dim + 1 :])) * self._size
        most = max(1, span // row_bytes)
        for number, point in enumerate(self._points(dim)):
            start = self._source.start + _index(box, point) * self._size - skip
            for at in range(0, shared.shape[dim], most):
                rows = min(most, shared.shape[dim] - at)
                step = prod(self._box.shape[dim + 1 :])
                yield Strip(
                    self._target,
                    self._source,
                    shared,
                    (number * shared.shape[dim] + at) * self._length,
                    _index(self._box, point) + at * step,
                    step,
                    rows,
                    start + at * row_bytes,
                    row_bytes,
                    skip,
                    run,
                    whole=row_bytes - run <= request,
                )

    def _points(self, dims: int) -> Iterator[tuple[int, ...]]:
        """Where the runs, or rows of them, begin: all points in the first dimensions, each with the first one in the others."""
        ranges = (
            range(o, o + s)
            for o, s in zip(self._shared.offset[:dims], self._shared.shape[:dims], strict=True)
        )
        return ((*head, *self._shared.offset[dims:]) for head in product(*ranges))


def _index(box: Box, point: Sequence[int]) -> int:
    index = 0
    for size, offset, at in zip(box.shape, box.offset, point, strict=True):
        index = index * size + (at - offset)
    return index


def coalesced(cuts: Sequence[Cut], request: int, span: int) -> Iterator[Read]:
    """Requests for these cuts, in the order of the file. Small gaps are read too."""
    start = end = wanted = 0
    found: list[Cut] = []
    for cut in sorted(divided(cuts, span), key=attrgetter("start", "length", "target")):
        reached = max(end, cut.end)
        covers = wanted + max(0, cut.end - max(end, cut.start))
        wasted = (reached - start) - covers
        if found and (reached - start > span or wasted > max(request, covers // WASTE)):
            yield Read(start, end - start, found)
            found = []
        if not found:
            start, reached, covers = cut.start, cut.end, cut.length
        found.append(cut)
        end, wanted = reached, covers
    if found:
        yield Read(start, end - start, found)


def divided(cuts: Sequence[Cut], span: int) -> Iterator[Cut]:
    """The cuts, divided where the file is at a multiple of `span`, and so never longer than that."""
    for cut in cuts:
        if cut.start // span == (cut.end - 1) // span:
            yield cut
            continue
        size = (cut.source.end - cut.source.start) // cut.source.box.volume
        at = cut.start
        while at < cut.end:
            upto = min(cut.end, (at // span + 1) * span)
            before = (at - cut.start) // size
            yield cut._replace(first=cut.first + before, into=cut.into + before, start=at, length=upto - at)
            at = upto
