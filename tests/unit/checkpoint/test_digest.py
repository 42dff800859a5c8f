"""The digest of an atom: one value however it is cut and whoever computes it, and another one for another content."""

from __future__ import annotations

import ctypes
import logging
from itertools import pairwise, product
from typing import TYPE_CHECKING

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stormjib_checkpoint import digest
from stormjib_checkpoint.boxes import Box, whole
from stormjib_checkpoint.digest import Row, native, twin
from stormjib_checkpoint.digest.definition import mix, weight, words
from stormjib_checkpoint.format import ITEM_BYTES

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path
    from random import Random

Case = tuple[str, tuple[int, ...], Box]
DTYPES = sorted(ITEM_BYTES)
SHAPES = st.lists(st.integers(1, 6), max_size=4).map(tuple) | st.tuples(
    st.integers(1, 3), st.integers(1, 3000)
)


def said(dtype: str, shape: tuple[int, ...], box: Box, data: bytes) -> int:
    """§12, word for word: slow, and with nothing of what is tested but the weights."""
    total, element = 0, words(dtype)
    points = product(*(range(offset, end) for offset, end in zip(box.offset, box.end, strict=True)))
    for number, point in enumerate(points):
        index = 0
        for length, at in zip(shape, point, strict=True):
            index = index * length + at
        for k in range(element.per_element):
            start = (number * element.per_element + k) * element.width
            word = int.from_bytes(data[start : start + element.width], "little")
            total += word * weight(index * element.per_element + k)
    return total % 2**64


def of_bytes(data: bytes, dtype: str, box: digest.Geometry, first: int, count: int, lead: int = 0) -> int:
    """The partial digest of elements that begin `lead` bytes behind an aligned address."""
    memory = ctypes.create_string_buffer(bytes(lead) + data)
    return digest.partial(ctypes.addressof(memory) + lead, dtype, box, first, count)


def cut(data: bytes, shape: tuple[int, ...], box: Box, size: int) -> bytes:
    """The elements of a box of an atom, as they lie one after the other in a file."""
    points = product(*(range(offset, end) for offset, end in zip(box.offset, box.end, strict=True)))
    indices = []
    for point in points:
        index = 0
        for length, at in zip(shape, point, strict=True):
            index = index * length + at
        indices.append(index)
    return b"".join(data[index * size : (index + 1) * size] for index in indices)


@st.composite
def boxes(draw: st.DrawFn) -> Case:
    shape = draw(SHAPES)
    offset = tuple(draw(st.integers(0, length - 1)) for length in shape)
    size = tuple(draw(st.integers(1, length - at)) for length, at in zip(shape, offset, strict=True))
    return draw(st.sampled_from(DTYPES)), shape, Box(offset, size)


@given(boxes(), st.randoms(use_true_random=False), st.integers(0, 7))
def test_kernel_and_twin_compute_what_is_written(case: Case, random: Random, lead: int) -> None:
    """§12.1, §12.2, §12.3"""
    dtype, shape, box = case
    data = random.randbytes(box.volume * ITEM_BYTES[dtype])
    geometry = digest.geometry(shape, box)
    wanted = said(dtype, shape, box, data)
    assert of_bytes(data, dtype, geometry, 0, box.volume, lead) == wanted
    memory = ctypes.create_string_buffer(data)
    assert twin.partial(ctypes.addressof(memory), words(dtype), geometry, 0, box.volume) == wanted


@given(boxes(), st.randoms(use_true_random=False))
def test_any_stretches_of_a_box_add_up(case: Case, random: Random) -> None:
    dtype, shape, box = case
    size = ITEM_BYTES[dtype]
    data = random.randbytes(box.volume * size)
    geometry = digest.geometry(shape, box)
    ends = sorted({0, box.volume, *(random.randint(0, box.volume) for _ in range(4))})
    stretches = list(pairwise(ends))
    parts = [of_bytes(data[a * size : b * size], dtype, geometry, a, b - a) for a, b in stretches]
    memory = ctypes.create_string_buffer(data)
    slow = [
        twin.partial(ctypes.addressof(memory) + a * size, words(dtype), geometry, a, b - a)
        for a, b in stretches
    ]
    assert parts == slow
    assert digest.add(parts) == of_bytes(data, dtype, geometry, 0, box.volume)


def pieces(box: Box, random: Random) -> Iterator[Box]:
    """Cut a box anywhere, again and again."""
    sides = [dim for dim, size in enumerate(box.shape) if size > 1]
    if not sides or random.random() < 0.2:
        yield box
        return
    dim = random.choice(sides)
    at = random.randint(1, box.shape[dim] - 1)
    low, high = list(box.shape), list(box.shape)
    low[dim], high[dim] = at, box.shape[dim] - at
    offset = list(box.offset)
    offset[dim] += at
    yield from pieces(Box(box.offset, tuple(low)), random)
    yield from pieces(Box(tuple(offset), tuple(high)), random)


@given(st.sampled_from(DTYPES), SHAPES, st.randoms(use_true_random=False))
@settings(deadline=None)
def test_the_boxes_of_any_partition_add_up(dtype: str, shape: tuple[int, ...], random: Random) -> None:
    """§4.8, §12.5"""
    size, atom = ITEM_BYTES[dtype], whole(shape)
    data = random.randbytes(atom.volume * size)
    parts = [
        of_bytes(cut(data, shape, box, size), dtype, digest.geometry(shape, box), 0, box.volume)
        for box in pieces(atom, random)
    ]
    assert digest.add(parts) == of_bytes(data, dtype, digest.geometry(shape, atom), 0, atom.volume)


@pytest.mark.parametrize(
    ("shape", "box", "sizes", "strides", "base"),
    [
        ((), Box((), ()), (1,), (1,), 0),
        ((0, 3), Box((0, 0), (0, 3)), (0,), (1,), 0),
        ((4, 5, 6), whole((4, 5, 6)), (120,), (1,), 0),
        ((4, 5, 6), Box((1, 0, 0), (2, 5, 6)), (60,), (1,), 30),
        ((4, 5, 6), Box((1, 2, 3), (1, 1, 2)), (2,), (1,), 45),
        ((4, 5, 6), Box((0, 2, 0), (4, 2, 6)), (4, 12), (30, 1), 12),
        ((4, 5, 6), Box((0, 0, 5), (4, 5, 1)), (20, 1), (6, 1), 5),
        ((2, 3, 4, 5), Box((0, 1, 0, 1), (2, 2, 4, 3)), (2, 8, 3), (60, 5, 1), 21),
    ],
)
def test_sides_that_follow_each_other_are_one(
    shape: tuple[int, ...], box: Box, sizes: tuple[int, ...], strides: tuple[int, ...], base: int
) -> None:
    assert digest.geometry(shape, box) == (sizes, strides, base)


def test_without_the_compiled_kernel_digests_are_slow_and_not_wrong(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    box, data = digest.geometry((100,), whole((100,))), bytes(range(100)) * 4
    wanted = of_bytes(data, "F32", box, 0, 100)
    native._kernel.cache_clear()
    monkeypatch.setattr(native, "LIBRARY", tmp_path / "kernel.so")
    with caplog.at_level(logging.WARNING):
        assert of_bytes(data, "F32", box, 0, 100) == wanted
        assert of_bytes(data, "F32", box, 0, 100) == wanted
    native._kernel.cache_clear()
    assert [record.name for record in caplog.records] == ["stormjib_checkpoint.digest.native"]
    assert "install gcc" in caplog.text


def test_weights_are_those_of_splitmix64() -> None:
    """§12.4: its first numbers with the seed 0, as others have published them."""
    assert [mix(z) for z in (1, 2, 3)] == [0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4, 0x06C45D188009454F]
    assert weight(2 * 1024 + 3) == (mix(3) | 1) * (mix(2**63 + 2) | 1) % 2**64


def test_a_digest_is_sixteen_digits() -> None:
    """§12.1"""
    assert digest.text(255) == "00000000000000ff"
    assert digest.number("00000000000000ff") == 255


def test_the_digest_of_a_state_says_names_types_and_shapes_too() -> None:
    row = Row("model.w", "F32", (2, 3), "0" * 16)
    other = Row("model.b", "F32", (3,), "1" * 16)
    same = digest.whole([row, other])
    assert digest.whole([other, row]) == same
    changed = [
        row._replace(name="optim.w.exp_avg"),
        row._replace(dtype="I32"),
        row._replace(shape=(3, 2)),
        row._replace(digest="2" * 16),
    ]
    assert len({same, digest.whole([row]), *(digest.whole([one, other]) for one in changed)}) == 6
