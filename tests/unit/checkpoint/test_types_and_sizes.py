"""FORMAT.md §9.10 to §9.13 and §9.17 to §9.19: every type and every size, bit for bit, or refused by name."""

from __future__ import annotations

import json
import sys
from typing import TYPE_CHECKING, Any

import pytest
import torch
import torch.distributed as dist
import xxhash
from safetensors import safe_open
from safetensors.torch import load_file
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Partial, Replicate
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.testing._internal.two_tensor import TwoTensor

from fakes.meshes import Mesh, filled, held, raw, zeros
from fakes.saving import commit_states, save_parts
from stormjib_checkpoint import layout, shardfile
from stormjib_checkpoint.boxes import Box, whole
from stormjib_checkpoint.commit import commit_step
from stormjib_checkpoint.errors import UnsupportedState
from stormjib_checkpoint.format import AS_BYTES, ITEM_BYTES, PIECE_BYTES, DataFile
from stormjib_checkpoint.image import image_of
from stormjib_checkpoint.layout import GenerationId
from stormjib_checkpoint.left import leave
from stormjib_checkpoint.opening import open_generation
from stormjib_checkpoint.reader import Checkpoint, load
from stormjib_checkpoint.shardfile import Entry, header
from stormjib_checkpoint.storage import Local
from stormjib_checkpoint.tensors import DTYPES, TAGS, Held
from stormjib_checkpoint.tensors import held as held_of
from stormjib_checkpoint.writer import Part, Staged, records_of

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

SHAPES = [(), (0,), (3,), (2, 0, 4), (3, 2)]
FILE = "step-00000001/g0.1/rank-00000.safetensors"


def test_the_table_holds_every_type_of_torch() -> None:
    """§9.10"""
    every = {value for value in vars(torch).values() if isinstance(value, torch.dtype)}
    quantized = {torch.qint8, torch.quint8, torch.qint32, torch.quint4x2, torch.quint2x4}
    assert every - quantized == TAGS.keys()
    assert {tag: dtype.itemsize for tag, dtype in DTYPES.items()} == ITEM_BYTES


def every_type() -> dict[str, Any]:
    kinds = [(dtype, shape) for dtype in TAGS for shape in SHAPES]
    return {f"{dtype}{shape}": filled(shape, dtype, seed) for seed, (dtype, shape) in enumerate(kinds)}


def test_every_type_and_shape_comes_back_bit_for_bit(tmp_path: Path) -> None:
    """§9.10, §9.17"""
    state = every_type() | {"view": torch.arange(12.0).reshape(3, 4).t()}
    turned = filled((4, 3), torch.int8, 1).view(DTYPES["I4"])
    state["view of a type that torch cannot copy"] = turned.t()
    point = commit_states(Local(tmp_path), state)
    target = {name: zeros(tuple(value.shape), value.dtype) for name, value in state.items()}
    target["view of a type that torch cannot copy"] = zeros((4, 3), DTYPES["I4"]).t()
    load(Local(tmp_path), point, target)
    assert [name for name, value in state.items() if raw(target[name]) != raw(value)] == []


def test_others_read_the_types_that_safetensors_know_and_bytes_of_the_rest(tmp_path: Path) -> None:
    """§9.11"""
    state = every_type()
    commit_states(Local(tmp_path), state)
    found = load_file(tmp_path / FILE)
    assert found.keys() == {name for name, value in state.items() if value.numel()}
    for name, stored in found.items():
        value = state[name]
        if TAGS[value.dtype] not in AS_BYTES:
            assert (stored.dtype, stored.shape) == (value.dtype, value.shape), name
        else:
            last = value.shape[-1] if value.shape else 1
            assert (stored.dtype, [*stored.shape]) == (
                torch.uint8,
                [*value.shape[:-1], last * value.dtype.itemsize],
            )
        assert raw(stored) == raw(value), name


def test_a_column_cut_of_a_type_of_ours_is_told_to_other_readers_in_bytes() -> None:
    """§9.11: `saved_offsets` too."""
    head, _ = header([Entry("w", "C128", Box((2, 3), (4, 5)))])
    table = json.loads(head[8:])
    assert table["w"] == {"dtype": "U8", "shape": [4, 80], "data_offsets": [0, 320]}
    assert json.loads(table["__metadata__"]["DCP_SHARDING_INFO"]) == {"w": {"saved_offsets": [2, 48]}}


@pytest.fixture
def rank_0_of_2() -> Iterator[None]:
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=2)
    yield
    dist.destroy_process_group()


@pytest.mark.usefixtures("rank_0_of_2")
def test_a_partial_tensor_is_refused_by_name() -> None:
    """§9.12"""
    mesh = init_device_mesh("cpu", (2,))
    value = DTensor.from_local(torch.zeros(2), mesh, [Partial()], run_check=False)
    with pytest.raises(UnsupportedState, match=r"w is placed as .*[Pp]artial.*only Shard and Replicate"):
        held_of("w", value, 0, 2)
    assert held_of(
        "w", DTensor.from_local(torch.zeros(2), mesh, [Replicate()], run_check=False), 0, 2
    ).primary


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (lambda: torch.zeros(2, 2).to_sparse(), r"w is torch.sparse_coo on cpu"),
        (lambda: torch.zeros(2, 2).to_sparse_csr(), r"w is torch.sparse_csr"),
        (lambda: torch.zeros(2, device="meta"), "w is torch.strided on meta"),
        (lambda: torch.quantize_per_tensor(torch.zeros(2), 0.1, 0, torch.qint8), r"w has dtype torch.qint8"),
        (lambda: TwoTensor(torch.zeros(2), torch.zeros(2)), "w is a TwoTensor, which wraps other tensors"),
        (lambda: torch.nested.nested_tensor([torch.zeros(2)], layout=torch.jagged), "w is torch.jagged|w is a NestedTensor"),
        (lambda: nn.UninitializedParameter(), "w has no shape yet"),
    ],
)  # fmt: skip
@pytest.mark.filterwarnings("ignore")  # torch, of what it calls beta or deprecated
def test_what_is_no_plain_tensor_is_refused_by_name(tmp_path: Path, value: Any, message: str) -> None:
    """§9.12"""
    with pytest.raises(UnsupportedState, match=message):
        commit_states(Local(tmp_path), {"w": value()})
    assert not (tmp_path / "step-00000001").exists()


def test_a_big_endian_machine_neither_saves_nor_loads(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """§9.13"""
    storage = Local(tmp_path)
    point = commit_states(storage, {"w": torch.zeros(2)})
    monkeypatch.setattr(sys, "byteorder", "big")
    with pytest.raises(UnsupportedState, match="w: this machine is big-endian"):
        commit_states(storage, {"w": torch.zeros(2)}, step=2)
    with pytest.raises(UnsupportedState, match="w: this machine is big-endian"):
        load(storage, point, {"w": torch.zeros(2)})


@pytest.mark.parametrize("shape", [(0, 5), (1, 3), (5, 2), (7,), ()])
def test_empty_and_uneven_shards_come_back(tmp_path: Path, shape: tuple[int, ...]) -> None:
    """§9.17: four ranks, of which the last have less, or nothing."""
    storage, mesh, atom = Local(tmp_path), Mesh((4,), (0,)), filled(shape, torch.float32, 5)
    open_generation(storage, "1.1", "uid")
    for rank, (box, _) in enumerate(mesh.boxes(shape)):
        part = held("w", atom, box, rank == 0 if not shape else True)
        save_parts(storage, Part(1, GenerationId(1, 1), rank, 4), [part], {}, {}, {})
    target = zeros(shape, torch.float32)
    load(storage, commit_step(storage, "1.1", 4, 1), {"w": target})
    assert raw(target) == raw(atom)


HUGE = 2**31 + 3


def test_an_atom_of_more_than_2_31_elements(tmp_path: Path) -> None:
    """§9.18: rank 0 has 2 GiB of zeros, which its sparse file does not take; rank 1 has what follows."""
    storage = Local(tmp_path)
    open_generation(storage, "1.1", "uid")
    shape = (HUGE + 5,)
    ends = filled((5,), torch.uint8, 1)
    first = Held(
        "w", "U8", shape, Box((0,), (HUGE,)), torch.empty(HUGE, dtype=torch.uint8, device="meta"), True, 1
    )
    leave_sparse(storage, tmp_path, first)
    last = Held("w", "U8", shape, Box((HUGE,), (5,)), ends, True, 1)
    save_parts(storage, Part(1, GenerationId(1, 1), 1, 2), [last], {}, {}, {})
    checkpoint = Checkpoint(storage, commit_step(storage, "1.1", 2, 1))
    assert checkpoint.atoms["w"].nbytes == HUGE + 5
    across = torch.full((9,), 7, dtype=torch.uint8)
    checkpoint.fill_parts([Held("w", "U8", shape, Box((HUGE - 4,), (9,)), across, True, 1)])
    assert raw(across) == bytes(4) + raw(ends)


def leave_sparse(storage: Local, root: Path, part: Held) -> None:
    """What a rank leaves whose tensor is all zeros, as its file system would store it."""
    file = image_of([part], 0, {})
    path = root / layout.folder(1, GenerationId(1, 1)) / layout.rank_data(0)
    path.parent.mkdir(parents=True)
    with path.open("wb") as data:
        data.write(file.head)
        data.truncate(file.size)
    assert path.stat().st_blocks * 512 < 2**20
    pieces = [xxhash.xxh3_64_hexdigest(file.head.ljust(PIECE_BYTES, b"\0"))]
    pieces += [xxhash.xxh3_64_hexdigest(bytes(PIECE_BYTES))] * (file.size // PIECE_BYTES - 1)
    pieces += [xxhash.xxh3_64_hexdigest(bytes(file.size % PIECE_BYTES))]
    staged = Staged(DataFile(file.size, PIECE_BYTES, tuple(pieces)), ("0" * 16,))
    who = Part(1, GenerationId(1, 1), 0, 2)
    leave(storage, who.step, who.generation, who.rank, records_of(who, staged, file, {}, {}, {}, None))


def named(count: int, length: int) -> dict[str, Any]:
    return {
        f"{number:03}{'x' * length}": torch.tensor([number], dtype=torch.uint8) for number in range(count)
    }


def test_a_header_near_the_limit_of_safetensors(tmp_path: Path) -> None:
    """§9.19: just below, ours and theirs read it; just above, it is refused before anything is written."""
    storage, length = Local(tmp_path), 249_600
    state = named(200, length)
    point = commit_states(storage, state)
    with (tmp_path / FILE).open("rb") as file:
        assert 0.99 * shardfile.MAX_HEADER < int.from_bytes(file.read(8), "little") <= shardfile.MAX_HEADER
    target = {name: torch.zeros_like(value) for name, value in state.items()}
    load(storage, point, target)
    assert [int(value) for value in target.values()] == [*range(200)]
    with safe_open(tmp_path / FILE, "pt") as theirs:
        assert theirs.get_tensor(next(reversed(state))) == 199
    with pytest.raises(UnsupportedState, match=r"the 201 tensors of this rank take a header of \d+ bytes"):
        commit_states(storage, named(201, length), step=2)
    assert not (tmp_path / "step-00000002").exists()


def test_a_plain_tensor_is_the_whole_of_its_atom() -> None:
    """§4.4, §4.5"""
    parts = [held_of("w", torch.zeros(3, 2), rank, 3) for rank in range(3)]
    assert {part.box for part in parts} == {whole((3, 2))}
    assert [part.primary for part in parts].count(True) == 1
