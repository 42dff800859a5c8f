"""Plain torch.distributed.checkpoint both ways, with the optimizer."""

from __future__ import annotations

import pickle
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import nn
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save

from fakes.interop import commit, everything, opened, same, save_trained
from stormjib_checkpoint.dcp import StormjibWriter
from stormjib_checkpoint.errors import ExportRefused, ForeignDamaged, ForeignRefused, ImportRefused
from stormjib_checkpoint.interop import dcp as ours
from stormjib_checkpoint.interop import deepspeed
from stormjib_checkpoint.interop.inflow import bring_in
from stormjib_checkpoint.state import collect, restore
from stormjib_checkpoint.storage import Local

if TYPE_CHECKING:
    from pathlib import Path

    from torch.optim import Optimizer

pytestmark = pytest.mark.filterwarnings("ignore")
"""Torch's own about a process group that is not there, and about what it deprecates."""
FLAT = StateDictOptions(flatten_optimizer_state_dict=True)


def stepped(seed: int, steps: int = 2) -> tuple[nn.Module, Optimizer]:
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(5, 4), nn.LayerNorm(4), nn.Linear(4, 3, bias=False))
    decayed = {"params": [model[0].weight, model[2].weight], "weight_decay": 0.1}
    rest = {"params": [model[0].bias, *model[1].parameters()], "weight_decay": 0.0}
    optimizer = torch.optim.AdamW([decayed, rest], lr=0.05, betas=(0.8, 0.95))
    for _ in range(steps):
        model(torch.ones(2, 5)).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    return model, optimizer


def state_of(model: nn.Module, optimizer: Optimizer, options: StateDictOptions | None) -> dict[str, Any]:
    return {
        "model": get_model_state_dict(model),
        "optim": get_optimizer_state_dict(model, optimizer, options=options),
    }


def tensors(model: nn.Module, optimizer: Optimizer) -> dict[str, torch.Tensor]:
    return {n: v.detach() for n, v in collect(model, optimizer).items() if isinstance(v, torch.Tensor)}


def test_stock_torch_loads_what_we_bring_out(tmp_path: Path) -> None:
    model, optimizer = stepped(1)
    commit(tmp_path / "job", collect(model, optimizer), {}, world=2)
    ours.export(opened(tmp_path / "job"), tmp_path / "dcp")
    other, theirs = stepped(2, steps=1)
    state = state_of(other, theirs, FLAT)
    load(state, checkpoint_id=tmp_path / "dcp", no_dist=True)
    set_model_state_dict(other, state["model"])
    set_optimizer_state_dict(other, theirs, state["optim"], options=FLAT)
    same(tensors(model, optimizer), tensors(other, theirs))
    assert [g["weight_decay"] for g in theirs.param_groups] == [0.1, 0.0]
    assert theirs.param_groups[0]["betas"] == (0.8, 0.95)


@pytest.mark.parametrize("options", [None, FLAT])
def test_what_dcp_has_saved_through_us_goes_out_under_its_names(
    tmp_path: Path, options: StateDictOptions | None
) -> None:
    model, optimizer = stepped(1)
    save(
        state_of(model, optimizer, options),
        checkpoint_id=tmp_path / "job",
        storage_writer=StormjibWriter(),
        no_dist=True,
    )
    ours.export(opened(tmp_path / "job"), tmp_path / "dcp")
    other, theirs = stepped(2, steps=1)
    state = state_of(other, theirs, options)
    load(state, checkpoint_id=tmp_path / "dcp", no_dist=True)
    set_optimizer_state_dict(other, theirs, state["optim"], options=options)
    set_model_state_dict(other, state["model"])
    same(tensors(model, optimizer), tensors(other, theirs))
    assert [g["weight_decay"] for g in theirs.param_groups] == [0.1, 0.0]
    with pytest.raises(ExportRefused, match="no groups of an optimizer"):
        deepspeed.export(opened(tmp_path / "job"), tmp_path / "ucp", 1)


def test_the_trainers_steps_and_options_come_along(tmp_path: Path) -> None:
    """It writes neither with the tensors."""
    _, state = save_trained(tmp_path / "job")
    ours.export(opened(tmp_path / "job"), tmp_path / "dcp")
    target: dict[str, dict[str, Any]] = {
        "model": {n.removeprefix("model."): torch.zeros_like(t) for n, t in state.items() if n[0] == "m"},
        "optim": {
            "state.norm.weight.step": torch.tensor(0.0),
            "state.norm.weight.exp_avg": torch.zeros(16),
            "param_groups.norm.weight.weight_decay": 7.0,
            "param_groups.head.weight.weight_decay": 7.0,
        },
    }
    load(target, checkpoint_id=tmp_path / "dcp", no_dist=True)
    assert torch.equal(target["model"]["head.weight"], state["model.head.weight"])
    assert float(target["optim"]["state.norm.weight.step"]) == 12
    assert torch.equal(target["optim"]["state.norm.weight.exp_avg"], state["optim.norm.weight.exp_avg"])
    assert target["optim"]["param_groups.norm.weight.weight_decay"] == 0.0
    assert target["optim"]["param_groups.head.weight.weight_decay"] == 0.1


@pytest.mark.parametrize("options", [None, FLAT])
def test_what_stock_torch_has_saved_goes_into_an_engines_state(
    tmp_path: Path, options: StateDictOptions | None
) -> None:
    model, optimizer = stepped(1)
    save(state_of(model, optimizer, options), checkpoint_id=tmp_path / "dcp", no_dist=True)
    storage = Local(tmp_path / "job")
    point = bring_in(storage, ours.read(tmp_path / "dcp"), 30, 2)
    assert point.step == 30
    same(everything(tmp_path / "job"), tensors(model, optimizer))
    other, theirs = stepped(2, steps=0)
    restore(storage, point, other, theirs)
    same(tensors(model, optimizer), tensors(other, theirs))
    assert theirs.param_groups[1]["betas"] == (0.8, 0.95)
    assert theirs.param_groups[0]["weight_decay"] == 0.1


def test_chunks_of_several_ranks_are_put_together(tmp_path: Path) -> None:
    """Rows and columns, as FSDP and TP cut; the index is edited as if ranks had written them."""
    whole = torch.arange(24.0).reshape(6, 4)
    parts = {(0, 0): whole[:4, :3], (0, 3): whole[:4, 3:], (4, 0): whole[4:, :]}
    chunks = {f"{r}.{c}": part.contiguous() for (r, c), part in parts.items()}
    save(chunks, checkpoint_id=tmp_path, no_dist=True)
    metadata = pickle.loads((tmp_path / ".metadata").read_bytes())  # our own
    entry = metadata.state_dict_metadata["0.0"]
    entry.size, entry.chunks, places = whole.shape, [], {}
    for (row, column), part in parts.items():
        offset = torch.Size([row, column])
        entry.chunks.append(ChunkStorageMetadata(offset, part.shape))
        key = MetadataIndex(f"{row}.{column}", torch.Size([0, 0]))
        places[MetadataIndex("w", offset)] = metadata.storage_data[key]
    metadata.state_dict_metadata, metadata.storage_data = {"w": entry}, places
    (tmp_path / ".metadata").write_bytes(pickle.dumps(metadata))
    bring_in(Local(tmp_path / "job"), ours.read(tmp_path), 0, 4)
    assert torch.equal(everything(tmp_path / "job")["w"], whole)
    del metadata.state_dict_metadata["w"].chunks[1]
    places.pop(MetadataIndex("w", torch.Size([0, 3])))
    (tmp_path / ".metadata").write_bytes(pickle.dumps(metadata))
    with pytest.raises(ForeignDamaged, match="w: its chunks do not hold it exactly once: 20 of 24"):
        bring_in(Local(tmp_path / "other"), ours.read(tmp_path), 0, 1)
    assert not (tmp_path / "other").exists()


def test_tied_tensors_are_written_once_and_found_by_both_names(tmp_path: Path) -> None:
    shared = torch.arange(6.0)
    commit(tmp_path / "job", {"model.a": shared, "model.b": shared}, {})
    ours.export(opened(tmp_path / "job"), tmp_path / "dcp")
    assert len(list((tmp_path / "dcp").glob("__0_?.distcp"))) == 1
    target = {"model": {"a": torch.zeros(6), "b": torch.zeros(6)}}
    load(target, checkpoint_id=tmp_path / "dcp", no_dist=True)
    assert torch.equal(target["model"]["b"], shared)


def test_a_file_outside_or_missing_is_refused(tmp_path: Path) -> None:
    save({"w": torch.ones(2)}, checkpoint_id=tmp_path / "dcp", no_dist=True)
    path = tmp_path / "dcp/.metadata"
    metadata = pickle.loads(path.read_bytes())  # our own
    for name, error, why in (
        ("../../secret", ForeignRefused, "outside the folder"),
        ("/etc/hostname", ForeignRefused, "outside the folder"),
        ("gone.distcp", ForeignDamaged, r"gone\.distcp is missing"),
    ):
        for info in metadata.storage_data.values():
            info.relative_path = name
        path.write_bytes(pickle.dumps(metadata))
        with pytest.raises(error, match=why):
            ours.read(tmp_path / "dcp")
    with pytest.raises(ImportRefused, match=r"has no \.metadata"):
        ours.read(tmp_path)
