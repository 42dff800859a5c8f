"""An import is an ordinary step, and one that was cut short is begun anew without harm."""

from __future__ import annotations

import signal
import subprocess
import sys
import tracemalloc
from typing import TYPE_CHECKING, Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from fakes.disk import Disk
from fakes.interop import everything, opened
from fakes.power import Cutting
from stormjib_checkpoint.boxes import Box, part, whole
from stormjib_checkpoint.errors import ForeignDamaged, ImportRefused, UnsupportedState
from stormjib_checkpoint.history import committed
from stormjib_checkpoint.interop import hf, inflow
from stormjib_checkpoint.interop.foreign import Chunk, Foreign, Source
from stormjib_checkpoint.interop.inflow import bring_in
from stormjib_checkpoint.interop.outflow import streams
from stormjib_checkpoint.reader import load
from stormjib_checkpoint.storage import Local
from stormjib_checkpoint.verify import verify

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

SHAPES = st.lists(st.integers(1, 6), max_size=3).map(tuple)


def cut(shape: tuple[int, ...], parts: int, dim: int) -> list[Box]:
    """As ranks cut it; an empty part is none."""
    if not shape:
        return [whole(shape)]
    found = [part(whole(shape), dim % len(shape), parts, index) for index in range(parts)]
    return [box for box in found if box.volume]


def foreign(folder: Path, tensors: dict[str, torch.Tensor], parts: int = 1, dim: int = 0) -> Foreign:
    """Tensors in one file, chunk after chunk, with something in between."""
    sources = []
    with (folder / "foreign").open("wb") as file:
        for name, tensor in tensors.items():
            chunks = []
            for box in cut(tuple(tensor.shape), parts, dim):
                file.write(b"junk")
                chunks.append(Chunk(box, folder / "foreign", file.tell()))
                file.write(tensor[tuple(map(slice, box.offset, box.end))].contiguous().numpy().tobytes())
            sources.append(Source(name, "F32", tuple(tensor.shape), tuple(chunks)))
    return Foreign(sources, {"group.0.lr": 0.5})


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    shapes=st.lists(SHAPES, min_size=1, max_size=4),
    parts=st.integers(1, 4),
    dim=st.integers(0, 2),
    world=st.integers(1, 5),
    piece=st.integers(7, 300),
)
def test_any_cut_comes_in_on_any_number_of_ranks(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    shapes: list[tuple[int, ...]],
    parts: int,
    dim: int,
    world: int,
    piece: int,
) -> None:
    monkeypatch.setattr(inflow, "PIECE_BYTES", 16 * piece)
    tensors = {f"model.{i}": torch.randn(shape) for i, shape in enumerate(shapes)}
    storage = Local("/job", Disk())
    point = bring_in(storage, foreign(tmp_path, tensors, parts, dim), 7, world)
    state: dict[str, Any] = {name: torch.zeros_like(tensor) for name, tensor in tensors.items()}
    state["group.0.lr"] = None
    load(storage, point, state)
    assert all(torch.equal(state[name], tensor) for name, tensor in tensors.items())
    assert state["group.0.lr"] == 0.5
    assert [flaw for _, flaw in verify(storage, point)] == [None] * world


def test_neither_way_takes_more_memory_than_a_window(tmp_path: Path) -> None:
    """48 MB, in windows of 1 MB: what Python allocates beside torch, and torch's own, are both small."""
    save_file(
        {"w": torch.arange(12_000_000, dtype=torch.float32).reshape(3000, 4000)}, tmp_path / "a.safetensors"
    )
    tracemalloc.start()
    bring_in(Local(tmp_path / "job"), hf.read(tmp_path), 0, 1)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 20 << 20  # a piece of 16 MB
    largest = count = 0
    for _, parts in streams(opened(tmp_path / "job"), ["model.w"], 1 << 20):
        for window in parts:
            largest, count = max(largest, len(window)), count + len(window)
    assert (largest <= 1 << 20, count) == (True, 48_000_000)


def test_a_tensor_that_does_not_fit_its_chunks_leaves_nothing(tmp_path: Path) -> None:
    good = foreign(tmp_path, {"model.w": torch.ones(4, 4)}, 2)
    (source,) = good.sources
    hole = Foreign([source._replace(chunks=source.chunks[:1])], {})
    with pytest.raises(ForeignDamaged, match=r"model\.w: its chunks do not hold it exactly once"):
        bring_in(Local(tmp_path / "job"), hole, 0, 1)
    assert not (tmp_path / "job").exists()


@pytest.mark.parametrize(
    ("names", "scalars", "why"),
    [
        (["a", "a"], {}, "a is there twice"),
        (["a"], {"a": 1}, "a is there twice"),
        (["__box.1.a"], {}, r"__box\.1\.a begins with __"),
        (["a\ud800"], {}, "no Unicode"),
        (["a"], {"b": {1, 2}}, "foreign.b"),
    ],
)
def test_names_and_values_that_cannot_be_kept_leave_nothing(
    tmp_path: Path, names: list[str], scalars: dict[str, Any], why: str
) -> None:
    (source,) = foreign(tmp_path, {"model.w": torch.ones(2)}).sources
    bad = Foreign([source._replace(name=name) for name in names], scalars)
    with pytest.raises((ImportRefused, UnsupportedState), match=why):
        bring_in(Local(tmp_path / "job"), bad, 0, 1)
    assert not (tmp_path / "job").exists()


def test_a_file_that_is_cut_short_is_named_and_nothing_counts(tmp_path: Path) -> None:
    source = foreign(tmp_path, {"model.w": torch.ones(40, 4)}, 2)
    data = (tmp_path / "foreign").read_bytes()
    (tmp_path / "foreign").write_bytes(data[:-1])
    with pytest.raises(ForeignDamaged, match="foreign ends at byte"):
        bring_in(Local(tmp_path / "job"), source, 0, 2)
    assert not committed(Local(tmp_path / "job"))
    (tmp_path / "foreign").write_bytes(data)
    bring_in(Local(tmp_path / "job"), source, 0, 2)
    assert torch.equal(everything(tmp_path / "job")["model.w"], torch.ones(40, 4))


def cuts(source: Foreign) -> Iterator[tuple[bool, Disk]]:
    """What a power cut leaves after each call of an import to the file system, and whether the import was over."""
    disk = Disk()
    bring_in(Local("/job", disk), source, 3, 2)
    cutting = Cutting()
    for number, entry in enumerate(disk.log):
        cutting.go(entry)
        yield number == len(disk.log) - 1, Disk(cutting.least().copy())


def test_wherever_the_power_goes_it_can_be_repeated(tmp_path: Path) -> None:
    tensors = {"model.w": torch.arange(12.0).reshape(4, 3), "model.b": torch.ones(3)}
    source = foreign(tmp_path, tensors)
    tried = 0
    for over, disk in cuts(source):
        storage = Local("/job", disk)
        try:
            point = bring_in(storage, source, 3, 2)
        except ImportRefused:
            (point,) = committed(storage)  # the manifest was there, or all but it: the step is whole
        state: dict[str, Any] = {name: torch.zeros_like(tensor) for name, tensor in tensors.items()}
        state["group.0.lr"] = None
        load(storage, point, state)
        assert all(torch.equal(state[name], tensor) for name, tensor in tensors.items())
        assert point.step == 3
        tried += 1
        assert not over or len(committed(storage)) == 1
    assert tried > 20


KILLED = """
import os, signal, sys
from pathlib import Path
from stormjib_checkpoint.interop import hf, inflow
from stormjib_checkpoint.storage import Local
blocks, left = inflow.Hashing.blocks, [int(sys.argv[3])]
def dying(self, piece, memory):
    left[0] -= 1
    if not left[0]:
        os.kill(os.getpid(), signal.SIGKILL)
    return blocks(self, piece, memory)
inflow.Hashing.blocks, inflow.PIECE_BYTES = dying, 4096
inflow.bring_in(Local(sys.argv[2]), hf.read(Path(sys.argv[1])), 5, 2)
"""


def test_an_import_that_is_killed_is_repeated(tmp_path: Path) -> None:
    w = torch.arange(9000.0).reshape(90, 100)
    (tmp_path / "hf").mkdir()
    save_file({"w": w}, tmp_path / "hf/a.safetensors")
    job = tmp_path / "job"
    for piece in (3, 9):  # in the first rank's file, and in the second's
        done = subprocess.run(
            [sys.executable, "-c", KILLED, str(tmp_path / "hf"), str(job), str(piece)], check=False
        )
        assert done.returncode == -signal.SIGKILL
        assert not committed(Local(job))
    bring_in(Local(job), hf.read(tmp_path / "hf"), 5, 2)
    assert torch.equal(everything(job)["model.w"], w)
    assert [point.step for point in committed(Local(job))] == [5]
