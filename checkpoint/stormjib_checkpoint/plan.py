"""What to read for the boxes that a rank wants: which bytes of which files, in how many requests, and where each byte goes. Pure.

Each rank plans for itself, from the index alone and without a word to the others; equal wishes give equal plans.
"""

from __future__ import annotations

from collections import defaultdict
from math import prod
from operator import attrgetter
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from stormjib_checkpoint.boxes import Box, contiguous_from, intersect
from stormjib_checkpoint.format import ITEM_BYTES

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from numpy.typing import NDArray

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


class Rows(NamedTuple):
    """Many short runs that one target wants of one stored box: part of each of its rows."""

    target: int
    source: StoredBox
    shared: Box
    """What both have, in the coordinates of the atom. Its elements, row by row, are those of the runs."""
    length: int
    """Elements of a run."""
    starts: NDArray[np.int64]
    """Byte of the file at which each begins."""
    into: NDArray[np.int64]
    """Element of the target at which each begins."""
    row_bytes: int

    def cuts(self) -> Iterator[Cut]:
        """Its runs, one by one."""
        size = self.row_bytes // self.length
        for start, into in zip(self.starts.tolist(), self.into.tolist(), strict=True):
            first = (start - self.source.start) // size
            yield Cut(self.target, self.source, first, into, start, self.row_bytes)


class FilePlan(NamedTuple):
    """What is wanted of the data file of one rank."""

    rank: int
    reads: list[Read]
    rows: list[Rows]


class Cost(NamedTuple):
    """What a plan costs: bytes that are wanted, bytes that are read for them, and requests."""

    needed: int
    read: int
    requests: int

    @property
    def amplification(self) -> float:
        """Bytes read for each byte wanted."""
        return self.read / self.needed if self.needed else 1.0


def plan(
    targets: Sequence[Target], atoms: Mapping[str, IndexAtom], request: int, span: int = SPAN
) -> list[FilePlan]:
    """The reads that fill all targets, by file. `request`: so many bytes take as long to read as one more request; none is longer than `span`."""
    cuts: defaultdict[int, list[Cut]] = defaultdict(list)
    rows: defaultdict[int, list[Rows]] = defaultdict(list)
    for number, target in enumerate(targets):
        atom = atoms[target.atom]
        size = ITEM_BYTES[atom.dtype]
        for source in atom.meeting(target.box):
            found = _runs(number, source, target.box, size, request)
            if isinstance(found, Rows):
                rows[source.rank].append(found)
            else:
                cuts[source.rank] += found
    return [
        FilePlan(rank, [*coalesced(cuts[rank], request, span)], rows[rank])
        for rank in sorted(cuts.keys() | rows.keys())
    ]


def cost(file: FilePlan) -> Cost:
    """What the reads of one file cost."""
    strided = sum(len(rows.starts) * rows.row_bytes for rows in file.rows)
    return Cost(
        sum(cut.length for read in file.reads for cut in read.cuts) + strided,
        sum(read.length for read in file.reads) + strided,
        len(file.reads) + sum(len(rows.starts) for rows in file.rows),
    )


def _runs(number: int, source: StoredBox, target: Box, size: int, request: int) -> list[Cut] | Rows:
    """What a target wants of a stored box."""
    shared = intersect(source.box, target)
    if shared is None:
        return []
    cut = contiguous_from(shared, source.box, target)
    length, count = prod(shared.shape[cut:]), prod(shared.shape[:cut])
    if count == 1:
        first, into = _index(source.box, shared.offset), _index(target, shared.offset)
        return [Cut(number, source, first, into, source.start + first * size, length * size)]
    firsts, intos = _starts(source.box, shared, cut), _starts(target, shared, cut)
    gap = int(firsts[1] - firsts[0] - length) * size
    if count > FEW and length * size < SPAN // WASTE and gap > request:
        return Rows(number, source, shared, length, source.start + firsts * size, intos, length * size)
    return [
        Cut(number, source, first, into, source.start + first * size, length * size)
        for first, into in zip(firsts.tolist(), intos.tolist(), strict=True)
    ]


def _starts(box: Box, shared: Box, cut: int) -> NDArray[np.int64]:
    """Row-major numbers in `box` at which the runs of `shared` begin: one for each of its points in the dimensions before `cut`."""
    starts = np.array([_index(box, shared.offset)], dtype=np.int64)
    for dim in range(cut):
        steps = np.arange(shared.shape[dim], dtype=np.int64) * prod(box.shape[dim + 1 :])
        starts = (starts[:, None] + steps).reshape(-1)
    return starts


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
        size = cut.length // _count(cut)
        at = cut.start
        while at < cut.end:
            upto = min(cut.end, (at // span + 1) * span)
            before = (at - cut.start) // size
            yield cut._replace(first=cut.first + before, into=cut.into + before, start=at, length=upto - at)
            at = upto


def _count(cut: Cut) -> int:
    """Elements of a cut: its source box says how many bytes one has."""
    return cut.length * cut.source.box.volume // (cut.source.end - cut.source.start)
