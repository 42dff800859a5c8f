"""DeepSpeed's universal format both ways, with the optimizer."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch

from fakes.interop import STEP, commit, everything, opened, save_trained
from fakes.universal import STATES, State, make, zero_1, zero_3
from stormjib_checkpoint.errors import ExportRefused, ForeignDamaged, ForeignRefused, ImportRefused
from stormjib_checkpoint.interop import deepspeed
from stormjib_checkpoint.interop.inflow import bring_in
from stormjib_checkpoint.storage import Local

if TYPE_CHECKING:
    from pathlib import Path

GROUPS: list[dict[str, Any]] = [
    {"names": ["b.weight", "a.weight"], "lr": 0.1, "weight_decay": 0.1, "betas": (0.9, 0.95)},
    {"names": ["a.bias"], "lr": 0.1, "weight_decay": 0.0, "betas": (0.9, 0.95)},
]


def state() -> State:
    shapes = {"a.weight": (3, 5), "a.bias": (7,), "b.weight": (2, 2, 3)}
    return {
        name: {
            key: torch.randn(shape, generator=torch.Generator().manual_seed(i + len(key))) for key in STATES
        }
        for i, (name, shape) in enumerate(shapes.items())
    }


def ours(found: State) -> dict[str, torch.Tensor]:
    return {
        f"model.{name}" if key == "fp32" else f"optim.{name}.{key}": tensor
        for name, tensors in found.items()
        for key, tensor in tensors.items()
    }


@pytest.mark.parametrize("flat", [False, True])
@pytest.mark.parametrize("step", [30, torch.tensor(30.0)])
def test_both_dialects_come_in_with_the_optimizer(tmp_path: Path, flat: bool, step: Any) -> None:
    made = state()
    make(tmp_path / "u/step30_universal", made, GROUPS, step, flat=flat)
    foreign = deepspeed.read(tmp_path / "u")
    bring_in(Local(tmp_path / "job"), foreign, 30, 3)
    found = everything(tmp_path / "job")
    for name, tensor in ours(made).items():
        assert torch.equal(found.pop(name), tensor), name
    assert {name: float(value) for name, value in found.items()} == {f"optim.{n}.step": 30.0 for n in made}
    scalars = opened(tmp_path / "job").scalars
    assert scalars["group.0.params"] == ["model.b.weight", "model.a.weight"]
    assert (scalars["group.1.weight_decay"], scalars["group.1.betas"]) == (0.0, (0.9, 0.95))


@pytest.mark.parametrize("world", [1, 2, 3])
def test_what_goes_out_is_read_as_deepspeed_reads_it(tmp_path: Path, world: int) -> None:
    _, saved = save_trained(tmp_path / "job")
    deepspeed.export(opened(tmp_path / "job"), tmp_path / "u", STEP)
    place = tmp_path / "u" / (tmp_path / "u/latest_universal").read_text()
    for name in [n.removeprefix("model.") for n in saved if n.startswith("model.")]:
        wanted = {key: saved[f"optim.{name}.{key}"].flatten() for key in ("exp_avg", "exp_avg_sq")}
        wanted["fp32"] = saved[f"model.{name}"].flatten()
        size = wanted["fp32"].numel()
        found, step = zero_1(place, name, size // 3, size // 2)
        assert float(step) == STEP
        for key, tensor in wanted.items():
            assert torch.equal(found[key], tensor[size // 3 : size // 3 + size // 2])
            parts = torch.cat([zero_3(place, name, key, rank, world) for rank in range(world)])
            assert torch.equal(parts[:size], tensor)
            assert not parts[size:].any()
    common = torch.load(place / "zero/optimizer_state.pt", weights_only=False)
    assert [group["weight_decay"] for group in common["param_groups"]] == [0.1, 0.0]
    assert float(common["optimizer_state_dict"]["state"][0]["step"]) == STEP


def test_out_and_in_again_is_the_same(tmp_path: Path) -> None:
    made = state()
    make(tmp_path / "u/step30_universal", made, GROUPS, torch.tensor(30.0), flat=False)
    bring_in(Local(tmp_path / "one"), deepspeed.read(tmp_path / "u"), 30, 1)
    deepspeed.export(opened(tmp_path / "one"), tmp_path / "v", 30)
    bring_in(Local(tmp_path / "two"), deepspeed.read(tmp_path / "v"), 30, 2)
    one, two = everything(tmp_path / "one"), everything(tmp_path / "two")
    assert one.keys() == two.keys()
    assert all(torch.equal(one[name], two[name]) for name in one)
    assert opened(tmp_path / "one").scalars == opened(tmp_path / "two").scalars


def test_a_flat_tensor_without_its_shape_is_refused(tmp_path: Path) -> None:
    make(tmp_path / "u", state(), GROUPS, 3, flat=True)
    next((tmp_path / "u").glob("zero_pp*")).unlink()
    with pytest.raises(ImportRefused, match=r"a\.bias/.*is a flat tensor of ZeRO-3.*says its shape"):
        deepspeed.read(tmp_path / "u")


def test_elements_that_do_not_fill_the_shape_are_refused(tmp_path: Path) -> None:
    made = state()
    make(tmp_path / "u", made, GROUPS, 3, flat=True)
    torch.save(made["a.bias"]["fp32"][:-1].clone(), tmp_path / "u/zero/a.bias/fp32.pt")
    with pytest.raises(ForeignDamaged, match=r"fp32\.pt has 6 elements, and a\.bias has shape \[7\]"):
        deepspeed.read(tmp_path / "u")


def test_groups_that_cannot_be_told_apart_are_left_out_and_told(tmp_path: Path) -> None:
    """ZeRO-3 cuts its shapes by size, not by group."""
    make(tmp_path / "u", state(), GROUPS, 3, flat=True)
    common = torch.load(tmp_path / "u/zero/optimizer_state.pt", weights_only=False)
    common["param_groups"].append({"lr": 1.0, "params": []})
    torch.save(common, tmp_path / "u/zero/optimizer_state.pt")
    foreign = deepspeed.read(tmp_path / "u")
    assert foreign.notes[0].startswith("3 groups of the optimizer are left out")
    assert not foreign.scalars


def test_what_is_no_universal_checkpoint_or_hides_code_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ImportRefused, match=r"run DeepSpeed's ds_to_universal\.py first"):
        deepspeed.read(tmp_path)
    make(tmp_path / "u", state(), GROUPS, 3, flat=False)
    (tmp_path / "latest_universal").write_text("../u")
    with pytest.raises(ForeignDamaged, match="no folder beside it"):
        deepspeed.read(tmp_path)
    torch.save({"param": print}, tmp_path / "u/zero/a.bias/fp32.pt")
    with pytest.raises(ForeignRefused, match=r"a\.bias/fp32\.pt: it names __builtin__\.print"):
        deepspeed.read(tmp_path / "u")


def test_without_groups_deepspeed_could_not_load_it(tmp_path: Path) -> None:
    commit(tmp_path / "job", {"model.w": torch.ones(2), "optim.w.exp_avg": torch.ones(2)}, {})
    with pytest.raises(ExportRefused, match="no groups of an optimizer"):
        deepspeed.export(opened(tmp_path / "job"), tmp_path / "u", 1)
    commit(tmp_path / "odd", {"optim.w.exp_avg": torch.ones(2), "group.0.params": ["model.w"]}, {})
    with pytest.raises(ExportRefused, match=r"optim\.w is the state of no parameter"):
        deepspeed.export(opened(tmp_path / "odd"), tmp_path / "u", 1)
