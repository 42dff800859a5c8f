"""The published values: whoever computes digests, in whatever language, can hold what it computes to `golden/digest-vectors.json`."""

from __future__ import annotations

import ctypes
import json
import logging
import re
import sys
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch

from stormjib_checkpoint import digest
from stormjib_checkpoint.boxes import Box
from stormjib_checkpoint.digest import Geometry, Row, native, on_device, twin
from stormjib_checkpoint.digest.definition import words
from stormjib_checkpoint.format import ITEM_BYTES

if TYPE_CHECKING:
    from collections.abc import Callable

VECTORS: dict[str, Any] = json.loads((Path(__file__).parent / "golden" / "digest-vectors.json").read_text())


@dataclass(frozen=True)
class Vector:
    """One line of the file: a box of an atom, and the digest of its elements."""

    what: str
    dtype: str
    shape: list[int]
    offset: list[int]
    box: list[int]
    data: str
    """Hexadecimal; as often as `times` says, one after the other."""
    times: int
    digest: str

    @property
    def bytes(self) -> bytes:
        return bytes.fromhex(self.data) * self.times

    @property
    def geometry(self) -> Geometry:
        return digest.geometry(self.shape, Box(tuple(self.offset), tuple(self.box)))


BOXES = [Vector(**line) for line in VECTORS["boxes"]]


def kernel(vector: Vector, first: int, count: int, data: bytes) -> int:
    memory = ctypes.create_string_buffer(data)
    compiled = native.compiled(native.LIBRARY)
    return compiled(ctypes.addressof(memory), words(vector.dtype), vector.geometry, first, count)


def slow_twin(vector: Vector, first: int, count: int, data: bytes) -> int:
    memory = ctypes.create_string_buffer(data)
    return twin.partial(ctypes.addressof(memory), words(vector.dtype), vector.geometry, first, count)


def with_torch(vector: Vector, first: int, count: int, data: bytes, device: str = "cpu") -> int:
    flat = torch.frombuffer(bytearray(data), dtype=torch.uint8) if data else torch.empty(0, dtype=torch.uint8)
    return on_device.partial_on_device(flat.to(device), vector.dtype, vector.geometry, first)


def on_gpu(vector: Vector, first: int, count: int, data: bytes) -> int:
    return with_torch(vector, first, count, data, "cuda")


BY = [
    kernel,
    slow_twin,
    with_torch,
    pytest.param(
        on_gpu,
        marks=[
            pytest.mark.gpu,
            pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
        ],
    ),
]


@pytest.mark.parametrize("by", BY)
def test_published_values(by: Callable[[Vector, int, int, bytes], int]) -> None:
    """§12.7"""
    found = [digest.text(by(vector, 0, prod(vector.box), vector.bytes)) for vector in BOXES]
    assert [vector for vector, value in zip(BOXES, found, strict=True) if vector.digest != value] == []


@pytest.mark.parametrize("by", BY)
@pytest.mark.parametrize("at_once", [8, 1 << 22])
def test_published_values_from_two_stretches(
    by: Callable[[Vector, int, int, bytes], int], at_once: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(twin, "AT_ONCE", at_once)
    monkeypatch.setattr(on_device, "AT_ONCE", at_once)
    for vector in BOXES:
        data, size, count = vector.bytes, ITEM_BYTES[vector.dtype], prod(vector.box)
        middle = count // 3
        low = by(vector, 0, middle, data[: middle * size])
        high = by(vector, middle, count - middle, data[middle * size :])
        assert digest.text(digest.add([low, high])) == vector.digest, vector


def test_where_a_gpus_kernel_cannot_be_made_plain_operations_sum_up(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setitem(sys.modules, "triton", None)
    on_device._sum.cache_clear()
    with caplog.at_level(logging.WARNING):
        assert on_device._sum("cuda") is on_device.blockwise
    on_device._sum.cache_clear()
    assert "several passes" in caplog.text


def test_every_type_and_size_has_some() -> None:
    assert {vector.dtype for vector in BOXES} == set(ITEM_BYTES)
    by_size = {size: {v.what for v in BOXES if ITEM_BYTES[v.dtype] == size} for size in (1, 2, 4, 8, 16)}
    assert {len(whats) for whats in by_size.values()} == {9}


def test_the_table_of_the_format_is_of_these() -> None:
    """§12.7"""
    text = (Path(__file__).parents[3] / "checkpoint" / "FORMAT.md").read_text()
    table = {
        int(size): value
        for size, value in re.findall(r"^\| (\d+) \| `([0-9a-f]{16})` \|$", text, re.MULTILINE)
    }
    first = {ITEM_BYTES[v.dtype]: v for v in BOXES if v.what == "every type" and v.dtype != "BOOL"}
    assert table == {size: vector.digest for size, vector in first.items()}
    assert all(
        v.bytes == bytes((n * n + 37 * n + 101) % 256 for n in range(len(v.bytes))) for v in first.values()
    )


def test_the_published_state() -> None:
    """§12.8"""
    rows = [Row(name, dtype, tuple(shape), value) for name, dtype, shape, value in VECTORS["state"]]
    assert digest.whole(rows) == VECTORS["whole"]
    assert VECTORS["version"] == digest.VERSION
