"""An index without a step."""

from __future__ import annotations

from typing import TYPE_CHECKING

from stormjib_checkpoint.format import AtomsFile
from stormjib_checkpoint.index import Index
from stormjib_checkpoint.indexing import Indexing
from stormjib_checkpoint.layout import GenerationId

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from stormjib_checkpoint.format import AtomRow, RankFile


def index_of(rows: Mapping[str, AtomRow]) -> Index:
    """Of atoms whose boxes are given one by one; each rank's file ends with its last box."""
    boxes = [box for row in rows.values() for box in row.boxes or ()]
    world = 1 + max(box.rank for box in boxes)
    sizes = [max((box.end for box in boxes if box.rank == rank), default=0) for rank in range(world)]
    return Index(AtomsFile(1, GenerationId(1, 1), dict(rows), {}, (), {}), sizes, "step")


def indexed(ranks: Iterable[RankFile], place: str = "step") -> AtomsFile:
    """`atoms.json` of all ranks' records, in the order of their ranks; `place` is named in errors."""
    indexing = Indexing(place)
    for record in ranks:
        indexing.add(record)
    return indexing.index()
