"""The box algebra against numpy's and torch's own cutting."""

from __future__ import annotations

from math import prod

import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st

from fakes.meshes import Mesh, meshes, shapes
from stormjib_checkpoint.boxes import Box, flaw, intersect, part, runs, slabs, whole


def slices(box: Box) -> tuple[slice, ...]:
    return tuple(slice(o, e) for o, e in zip(box.offset, box.end, strict=True))


@given(length=st.integers(0, 20), parts=st.integers(1, 7))
def test_part_cuts_as_torch_chunk_does(length: int, parts: int) -> None:
    chunks = torch.arange(length).chunk(parts)
    mine = [part(whole((length,)), 0, parts, index) for index in range(parts)]
    held = [list(range(box.offset[0], box.end[0])) for box in mine if box.volume]
    assert held == [chunk.tolist() for chunk in chunks if chunk.numel()]


@given(shape=shapes, mesh=meshes)
def test_the_primary_boxes_of_any_mesh_tile_any_shape(shape: tuple[int, ...], mesh: Mesh) -> None:
    boxes = [box for box, primary in mesh.boxes(shape) if primary]
    assert flaw(shape, boxes) is None


@given(shape=shapes, mesh=meshes, data=st.data())
def test_a_missing_or_doubled_box_is_found(shape: tuple[int, ...], mesh: Mesh, data: st.DataObject) -> None:
    boxes = [box for box, primary in mesh.boxes(shape) if primary and box.volume]
    if not boxes:
        return
    victim = data.draw(st.integers(0, len(boxes) - 1))
    assert "elements are there" in str(flaw(shape, boxes[:victim] + boxes[victim + 1 :]))
    assert "overlap" in str(flaw(shape, [*boxes, boxes[victim]]))


def test_a_box_outside_is_found() -> None:
    assert "outside" in str(flaw((2, 2), [Box((0, 1), (2, 2))]))
    assert "outside" in str(flaw((2, 2), [Box((0,), (4,))]))


@st.composite
def two_boxes(draw: st.DrawFn) -> tuple[tuple[int, ...], Box, Box]:
    shape = tuple(draw(st.lists(st.integers(1, 6), min_size=0, max_size=3)))

    def one() -> Box:
        begin = tuple(draw(st.integers(0, s - 1)) for s in shape)
        return Box(begin, tuple(draw(st.integers(1, s - b)) for s, b in zip(shape, begin, strict=True)))

    return shape, one(), one()


@given(two_boxes())
def test_runs_copy_exactly_what_two_boxes_share(case: tuple[tuple[int, ...], Box, Box]) -> None:
    shape, source, target = case
    atom = np.arange(prod(shape)).reshape(shape)
    flat_source = atom[slices(source)].reshape(-1)
    got = np.full(source.volume and target.volume, -1)
    found = list(runs(source, target))
    for run in found:
        assert (got[run.target : run.target + run.length] == -1).all(), "an element is copied twice"
        got[run.target : run.target + run.length] = flat_source[run.source : run.source + run.length]
    wanted = np.full(shape, -1)
    shared = intersect(source, target)
    if shared is not None:
        wanted[slices(shared)] = atom[slices(shared)]
    assert (got == wanted[slices(target)].reshape(-1)).all()
    assert [run.source for run in found] == sorted(run.source for run in found)


def test_whole_rows_are_one_run() -> None:
    assert [tuple(run) for run in runs(Box((0, 0), (8, 5)), Box((2, 0), (3, 5)))] == [(10, 0, 15)]
    assert len(list(runs(Box((0, 0), (8, 6)), Box((0, 3), (8, 3))))) == 8


@given(shape=st.lists(st.integers(1, 7), max_size=4).map(tuple), most=st.integers(1, 50))
def test_slabs_are_runs_of_a_box_one_after_the_other(shape: tuple[int, ...], most: int) -> None:
    numbers = np.arange(prod(shape)).reshape(shape)
    found = list(slabs(whole(shape), most))
    assert all(box.volume <= most for box in found)
    assert (np.concatenate([numbers[slices(box)].reshape(-1) for box in found]) == numbers.reshape(-1)).all()


def test_slabs_keep_the_place_of_a_box() -> None:
    assert list(slabs(Box((2, 3), (2, 4)), 4)) == [Box((2, 3), (1, 4)), Box((3, 3), (1, 4))]
