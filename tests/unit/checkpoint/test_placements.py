"""What a live DTensor says of itself is what torch would say, also of FSDP over tensor parallelism along one dimension."""

from __future__ import annotations

from contextlib import contextmanager
from math import prod
from typing import TYPE_CHECKING

import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.distributed.tensor._utils import _compute_local_shape_and_global_offset
from torch.distributed.tensor.placement_types import _StridedShard
from torch.testing._internal.distributed.fake_pg import FakeStore

from stormjib_checkpoint.errors import UnsupportedState
from stormjib_checkpoint.tensors import held, placed

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch.distributed.tensor.placement_types import Placement

placements = st.one_of(
    st.builds(Replicate),
    st.builds(Shard, st.integers(0, 1)),
    st.builds(
        lambda dim, factor: _StridedShard(dim, split_factor=factor), st.integers(0, 1), st.integers(2, 4)
    ),
)


@settings(max_examples=300)
@given(
    st.tuples(st.integers(0, 13), st.integers(0, 13)),
    st.lists(st.tuples(placements, st.integers(1, 4)), min_size=1, max_size=3),
    st.data(),
)
def test_a_box_is_where_torch_says(
    shape: tuple[int, int], axes: list[tuple[Placement, int]], data: st.DataObject
) -> None:
    mesh = [size for _, size in axes]
    coordinate = [data.draw(st.integers(0, size - 1)) for size in mesh]
    theirs = [placement for placement, _ in axes]
    try:
        box, primary, copies = placed("w", shape, theirs, mesh, coordinate)
    except UnsupportedState:
        return  # it does not lie together
    local, offset = _compute_local_shape_and_global_offset(shape, mesh, coordinate, theirs)
    assert box.shape == local
    assert box.offset == offset or not box.volume
    whole = [
        at for (placement, _), at in zip(axes, coordinate, strict=True) if isinstance(placement, Replicate)
    ]
    assert primary is not any(whole)
    assert copies == prod(size for placement, size in axes if isinstance(placement, Replicate))


@contextmanager
def ranks(rank: int, world: int) -> Iterator[None]:
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=world)
    try:
        yield
    finally:
        dist.destroy_process_group()


@pytest.mark.parametrize(("mesh", "length"), [((2, 2), 8), ((2, 2), 7), ((3, 2), 7), ((2, 3), 10)])
def test_fsdp_over_tensor_parallelism_in_a_live_model(
    monkeypatch: pytest.MonkeyPatch, mesh: tuple[int, int], length: int
) -> None:
    """Each row says which one it is. On 3 x 2 ranks torch's own words for 7 rows are wrong: the last rank has one, and not the one before."""
    seen: list[float] = []
    for rank in range(prod(mesh)):
        with ranks(rank, prod(mesh)):
            whole = init_device_mesh("cpu", mesh, mesh_dim_names=("dp", "tp"))
            model = nn.Linear(2, length, bias=False)
            rows = torch.arange(length, dtype=torch.float32).repeat_interleave(2).reshape(length, 2)
            model.weight = nn.Parameter(distribute_tensor(rows, whole["tp"], [Shard(0)], src_data_rank=None))
            fully_shard(model, mesh=whole["dp"])
            assert isinstance(model.weight, DTensor)
            assert any(isinstance(placement, _StridedShard) for placement in model.weight.placements)
            with monkeypatch.context() as patch:  # torch keeps the coordinate of the first rank of a process
                patch.setattr(DeviceMesh, "get_coordinate", lambda _, at=rank: list(divmod(at, mesh[1])))
                part = held("w", model.weight, rank, prod(mesh))
            mine = part.local[:, 0].tolist()
            assert not mine or mine == list(range(part.box.offset[0], part.box.end[0]))
            assert (part.primary, part.copies) == (True, 1)
            seen += mine
    assert sorted(seen) == list(range(length))


def test_what_does_not_lie_together_is_refused() -> None:
    """§9.12"""
    strided = [_StridedShard(0, split_factor=2)]
    with pytest.raises(UnsupportedState, match=r"w: placements .* stretches that do not lie together"):
        placed("w", (8,), strided, [2], [0])
