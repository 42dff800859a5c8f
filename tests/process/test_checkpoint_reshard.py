"""Real FSDP2 ranks over Gloo: what one world size saves, another loads bit for bit, optimizer included."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import torch
from safetensors.torch import load_file
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader
from torch.distributed.checkpoint.state_dict_loader import load as dcp_load

from fakes import dcp_ranks, fsdp_ranks, gloo
from stormjib_checkpoint.commit import commit_step
from stormjib_checkpoint.history import committed
from stormjib_checkpoint.opening import open_next
from stormjib_checkpoint.step import CommittedStep
from stormjib_checkpoint.storage import Local
from stormjib_checkpoint.verify import verify

if TYPE_CHECKING:
    from pathlib import Path

    from stormjib_checkpoint.format import ResumePoint

pytestmark = pytest.mark.timeout(120)


def equal(one: Path, other: Path) -> bool:
    mine, theirs = load_file(one), load_file(other)
    return mine.keys() == theirs.keys() and all(torch.equal(mine[name], theirs[name]) for name in mine)


def flip_last_bit(file: Path) -> None:
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)


def saved(folder: Path, shape: tuple[int, ...], world: int) -> ResumePoint:
    root = str(folder / "job")
    generation = open_next(Local(root)).generation
    gloo.run(world, folder, fsdp_ranks.save, shape, root, generation, str(folder / "saved.safetensors"))
    return commit_step(Local(root), generation, world, 2)


def test_four_ranks_save_and_three_two_one_load(tmp_path: Path) -> None:
    point = saved(tmp_path, (4,), 4)
    storage = Local(tmp_path / "job")
    assert [flaw for _, flaw in verify(storage, point)] == [None] * 4
    atoms = CommittedStep(storage, point).atoms().atoms
    assert len(atoms["model.wide.weight"].boxes) == 4
    assert len(atoms["model.scale"].boxes) == 1, "empty shards leave nothing"
    for world in (3, 2, 1):
        target = tmp_path / f"loaded-{world}.safetensors"
        gloo.run(world, tmp_path, fsdp_ranks.load, (world,), str(tmp_path / "job"), point, str(target))
        assert equal(tmp_path / "saved.safetensors", target), f"on {world} ranks"
    stock_reader_agrees(tmp_path)


def stock_reader_agrees(folder: Path) -> None:
    """torch's own reader puts the boxes of our files together, without knowing of us."""
    wanted = load_file(folder / "saved.safetensors")
    state = {name: torch.zeros_like(value) for name, value in wanted.items()}
    reader = HuggingFaceStorageReader(str(folder / "job/step-00000002/g0.1"))
    with pytest.warns(UserWarning, match="single process"):
        dcp_load(state, storage_reader=reader, no_dist=True)
    assert all(torch.equal(state[name], value) for name, value in wanted.items())


def test_two_ranks_load_and_save_and_four_load(tmp_path: Path) -> None:
    point = saved(tmp_path, (2,), 2)
    other, middle, last = tmp_path / "other", tmp_path / "middle.safetensors", tmp_path / "last.safetensors"
    open_next(Local(other))
    gloo.run(
        2, tmp_path, fsdp_ranks.load_and_save, (2,), str(tmp_path / "job"), point, str(other), str(middle)
    )
    again = commit_step(Local(other), "0.1", 2, 2)
    gloo.run(4, tmp_path, fsdp_ranks.load, (4,), str(other), again, str(last))
    assert equal(tmp_path / "saved.safetensors", middle)
    assert equal(middle, last)


def test_of_replicas_one_writes_and_any_layout_loads(tmp_path: Path) -> None:
    point = saved(tmp_path, (2, 2), 4)
    storage = Local(tmp_path / "job")
    sharded = CommittedStep(storage, point).atoms().atoms["model.wide.weight"]
    assert [box.rank for box in sharded.boxes] == [0, 1], "the first replica writes"
    target = tmp_path / "loaded.safetensors"
    gloo.run(3, tmp_path, fsdp_ranks.load, (3,), str(tmp_path / "job"), point, str(target))
    assert equal(tmp_path / "saved.safetensors", target)


def test_an_engine_saves_while_ranks_train_on_and_all_fall_back_together(tmp_path: Path) -> None:
    root, target = tmp_path / "job", tmp_path / "loaded.safetensors"
    gloo.run(3, tmp_path, fsdp_ranks.engine_save, (3,), str(root), str(tmp_path / "saved.safetensors"))
    flip_last_bit(root / "step-00000003/g0.1/rank-00001.safetensors")
    gloo.run(2, tmp_path, fsdp_ranks.engine_restore, (2,), str(root), str(target))
    assert equal(tmp_path / "saved.safetensors", target)


def test_a_script_that_uses_dcp_saves_and_loads_on_other_ranks(tmp_path: Path) -> None:
    root = tmp_path / "job"
    gloo.run(3, tmp_path, dcp_ranks.save, str(root), str(tmp_path / "saved.safetensors"))
    newest = committed(Local(root))[0]
    assert (newest.step, newest.generation) == (1, "0.1")
    assert [flaw for _, flaw in verify(Local(root), newest)] == [None] * 3
    for world in (2, 1):
        target = tmp_path / f"loaded-{world}.safetensors"
        gloo.run(world, tmp_path, dcp_ranks.load, str(root), str(target))
        assert equal(tmp_path / "saved.safetensors", target), f"on {world} ranks"
    flip_last_bit(root / "step-00000001/g0.1/rank-00001.safetensors")
    gloo.run(2, tmp_path, dcp_ranks.refused, str(root))
