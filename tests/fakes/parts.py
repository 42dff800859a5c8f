"""What ranks say of tensors that nobody made: records of any layout, with each box where a writer would have put it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from hypothesis import strategies as st

from fakes.meshes import meshes, shapes
from stormjib_checkpoint.boxes import Box, whole
from stormjib_checkpoint.format import ITEM_BYTES, Atom, DataFile, RankFile, StoredBox, box_key, file_order
from stormjib_checkpoint.layout import GenerationId

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

PAGE = 4096


@dataclass(frozen=True)
class Cut:
    """An atom and the boxes of it that are stored, each with its rank."""

    dtype: str
    shape: tuple[int, ...]
    boxes: tuple[tuple[int, Box], ...]

    def of(self, rank: int) -> list[Box]:
        """What one rank stores, by offset."""
        return sorted(box for holder, box in self.boxes if holder == rank)


def records_of(cuts: Mapping[str, Cut], heads: Sequence[int]) -> list[RankFile]:
    """The records of all ranks; `heads` are the bytes before the tensors in each one's file."""
    return [_record(cuts, rank, head, len(heads)) for rank, head in enumerate(heads)]


def _record(cuts: Mapping[str, Cut], rank: int, head: int, world: int) -> RankFile:
    tensors = [
        (file_order(cut.dtype, box_key(name, ordinal)), name, box)
        for name, cut in cuts.items()
        for ordinal, box in enumerate(cut.of(rank))
    ]
    end, boxes = head, dict[str, list[StoredBox]]()
    for (width, _), name, box in sorted(tensors):
        start, end = end, end - width * box.volume
        boxes.setdefault(name, []).append(StoredBox(rank, box.offset, box.shape, start, end))
    atoms = {
        name: Atom(cut.dtype, cut.shape, tuple(sorted(boxes.get(name, ()))))
        for name, cut in sorted(cuts.items())
    }
    data = DataFile(end, 2**30, ("0" * 16,) * -(-end // 2**30))
    return RankFile(1, GenerationId(1, 1), rank, world, "", data, atoms, {}, (), {}, {})


@st.composite
def cut_along_a_mesh(draw: st.DrawFn, world: int) -> Cut:
    """As DTensor cuts, on ranks in any order, of which one may have several of the boxes."""
    shape, mesh = draw(shapes), draw(meshes)
    held = [box for box, primary in mesh.boxes(shape) if primary and box.volume]
    first = draw(st.integers(0, world - 1))
    ranks = draw(
        st.just([(first + at) % world for at in range(len(held))])
        | st.lists(st.integers(0, world - 1), min_size=len(held), max_size=len(held))
    )
    return Cut(draw(st.sampled_from(sorted(ITEM_BYTES))), shape, tuple(zip(ranks, held, strict=True)))


@st.composite
def cut_anyhow(draw: st.DrawFn, world: int) -> Cut:
    """Cut in two, and the parts again, wherever it is."""
    shape = draw(st.lists(st.integers(1, 7), max_size=3).map(tuple))
    boxes = [whole(shape)]
    for _ in range(draw(st.integers(0, 4))):
        box = boxes.pop(draw(st.integers(0, len(boxes) - 1)))
        boxes += draw(st.sampled_from([*_halves(box), (box,)]))
    ranks = draw(st.lists(st.integers(0, world - 1), min_size=len(boxes), max_size=len(boxes)))
    return Cut(draw(st.sampled_from(["F32", "BF16"])), shape, tuple(zip(ranks, boxes, strict=True)))


def _halves(box: Box) -> list[tuple[Box, Box]]:
    """Each way to cut a box in two."""
    return [
        (Box(box.offset, _put(box.shape, dim, at)), Box(_put(box.offset, dim, box.offset[dim] + at), _put(box.shape, dim, size - at)))
        for dim, size in enumerate(box.shape)
        for at in range(1, size)
    ]  # fmt: skip


def _put(values: tuple[int, ...], dim: int, value: int) -> tuple[int, ...]:
    return (*values[:dim], value, *values[dim + 1 :])


@st.composite
def parts(draw: st.DrawFn) -> list[RankFile]:
    """Records of a few ranks with a few atoms of all kinds."""
    world = draw(st.integers(1, 6))
    cut = cut_along_a_mesh(world) | cut_anyhow(world)
    cuts = draw(st.dictionaries(st.text(max_size=2).filter(lambda name: name[:2] != "__"), cut, max_size=5))
    heads = draw(st.lists(st.sampled_from([PAGE, 2 * PAGE]), min_size=world, max_size=world))
    return records_of(cuts, heads)
