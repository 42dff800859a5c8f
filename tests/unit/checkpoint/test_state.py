"""Models and optimizers by name: into fresh ones, without pickle, without hidden steps, and readable by others."""

from __future__ import annotations

import io
import pickle
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import nn

from fakes.saving import save_rank
from stormjib_checkpoint.commit import commit_step
from stormjib_checkpoint.errors import StateMismatch, UnsupportedState
from stormjib_checkpoint.opening import open_next
from stormjib_checkpoint.state import collect, restore
from stormjib_checkpoint.storage import Local
from stormjib_checkpoint.tensors import ABSENT

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from pathlib import Path

    from torch.optim import Optimizer

    from stormjib_checkpoint.format import ResumePoint


class Net(nn.Module):
    def __init__(self, seed: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.inner = nn.Linear(5, 7)
        self.norm = nn.BatchNorm1d(7)
        self.head = nn.Linear(7, 3, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.head(self.norm(self.inner(x)))
        return out


def groups(model: nn.Module) -> list[dict[str, Any]]:
    decayed = [p for p in model.parameters() if p.ndim > 1]
    plain = [p for p in model.parameters() if p.ndim <= 1]
    return [{"params": decayed, "weight_decay": 0.1}, {"params": plain, "weight_decay": 0.0, "lr": 0.5}]


OPTIMIZERS: dict[str, Callable[[nn.Module], Optimizer]] = {
    "adamw": lambda model: torch.optim.AdamW(groups(model), lr=0.01, betas=(0.8, 0.9)),
    "amsgrad": lambda model: torch.optim.Adam(model.parameters(), lr=0.01, amsgrad=True),
    "sgd": lambda model: torch.optim.SGD(model.parameters(), lr=0.01),
    "momentum": lambda model: torch.optim.SGD(groups(model), lr=0.01, momentum=0.9),
    "tensor lr": lambda model: torch.optim.AdamW(model.parameters(), lr=torch.tensor(0.01)),
    "adafactor": lambda model: torch.optim.Adafactor(model.parameters(), lr=0.01),
}


def step(model: nn.Module, optimizer: Optimizer) -> None:
    torch.manual_seed(7)
    model(torch.randn(4, 5)).square().sum().backward()
    optimizer.step()
    optimizer.zero_grad()


def saved(storage: Local, state: Mapping[str, Any], **train: Any) -> ResumePoint:
    generation = open_next(storage).generation
    save_rank(storage, step=3, generation=generation, rank=0, world=1, state=state, train=train, samples={})
    return commit_step(storage, generation, 1, 3)


def same(one: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    return one.keys() == other.keys() and all(
        torch.equal(value, other[name]) if isinstance(value, torch.Tensor) else value == other[name]
        for name, value in one.items()
    )


def test_a_model_of_another_type_is_restored_only_where_that_is_said(tmp_path: Path) -> None:
    model = Net(1)
    optimizer = OPTIMIZERS["adamw"](model)
    step(model, optimizer)
    point = saved(Local(tmp_path), collect(model, optimizer))
    other = Net(2).bfloat16()
    fresh = OPTIMIZERS["adamw"](other)
    with pytest.raises(StateMismatch, match="name it in cast="):
        restore(Local(tmp_path), point, other, fresh)
    restore(Local(tmp_path), point, other, fresh, cast=["model.*"])
    for mine, theirs in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(theirs, mine.bfloat16())
        assert torch.equal(fresh.state[theirs]["exp_avg"], optimizer.state[mine]["exp_avg"])


@pytest.mark.parametrize("kind", OPTIMIZERS)
@pytest.mark.parametrize("used", [False, True])
def test_training_goes_on_bit_for_bit_in_a_fresh_model(tmp_path: Path, kind: str, used: bool) -> None:
    model = Net(1)
    optimizer = OPTIMIZERS[kind](model)
    step(model, optimizer)
    optimizer.param_groups[0]["weight_decay"] = 0.25
    point = saved(Local(tmp_path), collect(model, optimizer), epoch=2)
    other = Net(2)
    fresh = OPTIMIZERS[kind](other)
    if used:
        step(other, fresh)
    assert restore(Local(tmp_path), point, other, fresh) == {"epoch": 2}
    assert same(collect(model, optimizer), collect(other, fresh))
    assert fresh.param_groups[0]["weight_decay"] == 0.25
    for _ in range(2):
        step(model, optimizer)
        step(other, fresh)
    assert same(collect(model, optimizer), collect(other, fresh))


def test_state_that_is_not_there_yet_is_neither_lost_nor_made_up(tmp_path: Path) -> None:
    model = Net(1)
    optimizer = torch.optim.AdamW(model.parameters())
    state = collect(model, optimizer)
    assert not optimizer.state, "no hidden step"
    parameters = [f"optim.{name}" for name, _ in model.named_parameters()]
    assert [name for name, value in state.items() if value is ABSENT] == parameters
    point = saved(Local(tmp_path), state)
    other = Net(2)
    stepped = torch.optim.AdamW(other.parameters())
    step(other, stepped)
    restore(Local(tmp_path), point, other, stepped)
    assert same(collect(other, stepped), state), "what the checkpoint lacks is taken away"


def test_options_of_the_machine_are_not_restored(tmp_path: Path) -> None:
    model = Net(1)
    point = saved(Local(tmp_path), collect(model, torch.optim.AdamW(model.parameters(), foreach=True)))
    fresh = torch.optim.AdamW(model.parameters(), foreach=False, betas=(0.1, 0.2))
    restore(Local(tmp_path), point, model, fresh)
    assert fresh.param_groups[0]["foreach"] is False
    assert fresh.param_groups[0]["betas"] == (0.9, 0.999)


def test_an_option_that_only_one_torch_knows_stays_as_it_is(tmp_path: Path) -> None:
    model = Net(1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.3)
    state = collect(model, optimizer)
    del state["group.0.nesterov"]
    point = saved(Local(tmp_path), state | {"group.0.from_the_future": 1})
    optimizer.param_groups[0]["nesterov"] = True
    optimizer.param_groups[0]["lr"] = 9.0
    restore(Local(tmp_path), point, model, optimizer)
    assert optimizer.param_groups[0]["nesterov"] is True
    assert optimizer.param_groups[0]["lr"] == 0.3
    assert "from_the_future" not in optimizer.param_groups[0]


def test_other_groups_are_refused(tmp_path: Path) -> None:
    model = Net(1)
    point = saved(Local(tmp_path), collect(model, torch.optim.SGD(model.parameters())))
    with pytest.raises(StateMismatch, match=r"group\.0\.params differs"):
        restore(Local(tmp_path), point, model, torch.optim.SGD(groups(model)))


def test_wrappers_leave_no_trace_in_names() -> None:
    model = Net(1)
    wrapped = nn.ModuleDict({"module": model})
    names = collect(wrapped, torch.optim.SGD(wrapped.parameters()))
    assert names.keys() == collect(model, torch.optim.SGD(model.parameters())).keys()
    both = nn.ModuleDict({"module": nn.Linear(1, 1), "weight_holder": nn.Linear(1, 1)})
    both.register_parameter("weight", nn.Parameter(torch.zeros(1)))
    with pytest.raises(UnsupportedState, match=r"two tensors of the model are called model\.weight"):
        collect(both, torch.optim.SGD(both.parameters()))


def test_a_foreign_parameter_is_refused() -> None:
    with pytest.raises(UnsupportedState, match="after the model was sharded"):
        collect(Net(1), torch.optim.SGD(Net(2).parameters()))


@pytest.mark.parametrize(
    ("state", "message"),
    [
        ({"w": torch.zeros(2).to_sparse()}, "w is torch.sparse_coo"),
        ({"w": torch.zeros(2, device="meta")}, "on meta"),
        ({"__metadata__": torch.zeros(1)}, "kept for the format"),
        ({"x": object()}, r"state\.x is <object"),
        ({"x": [{"y": {1, 2}}]}, r"state\.x\[0\]\.y is \{1, 2\}"),
        ({"x": [...]}, r"state\.x\[0\] is Ellipsis"),
        ({"x": ..., "x.y": 1}, "x is absent and there"),
    ],
)
def test_what_cannot_be_stored_is_refused_by_name(
    tmp_path: Path, state: dict[str, Any], message: str
) -> None:
    with pytest.raises(UnsupportedState, match=message):
        saved(Local(tmp_path), state)
    assert not (tmp_path / "step-00000003").exists()


def test_train_and_samples_are_checked_too(tmp_path: Path) -> None:
    storage = Local(tmp_path)
    common: dict[str, Any] = {"step": 1, "generation": "0.1", "rank": 0, "world": 1, "state": {}}
    with pytest.raises(UnsupportedState, match=r"train\.loss is Ellipsis"):
        save_rank(storage, **common, train={"loss": ...}, samples={})
    with pytest.raises(UnsupportedState, match="samples of step 4"):
        save_rank(storage, **common, train={}, samples={4: [-1]})


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_from_gpu_to_cpu_and_back(tmp_path: Path) -> None:
    model = Net(1).cuda()
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    model(torch.randn(4, 5, device="cuda")).square().sum().backward()
    optimizer.step()
    point = saved(Local(tmp_path), collect(model, optimizer))
    for device, fused in (("cpu", False), ("cuda", True)):
        other = Net(2).to(device)
        fresh = torch.optim.AdamW(other.parameters(), fused=fused)
        restore(Local(tmp_path), point, other, fresh)
        moved = {
            name: v.cpu() if isinstance(v, torch.Tensor) else v for name, v in collect(other, fresh).items()
        }
        wanted = {
            n: v.cpu() if isinstance(v, torch.Tensor) else v for n, v in collect(model, optimizer).items()
        }
        assert same(moved, wanted)
        other(torch.randn(4, 5, device=device)).square().sum().backward()
        fresh.step()


def test_nothing_is_pickled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = Net(0)  # torch imports what derives from Pickler in its first step
    step(first, torch.optim.AdamW(first.parameters()))
    trapped: list[str] = []

    def trap(name: str) -> Callable[..., None]:
        def sprung(*_: object, **__: object) -> None:
            trapped.append(name)
            raise AssertionError(f"{name} was called")

        return sprung

    for module, name in (
        (pickle, "load"),
        (pickle, "loads"),
        (pickle, "dump"),
        (pickle, "dumps"),
        (pickle, "Unpickler"),
        (pickle, "Pickler"),
    ):
        monkeypatch.setattr(module, name, trap(f"pickle.{name}"))
    monkeypatch.setattr(torch, "load", trap("torch.load"))
    monkeypatch.setattr(torch, "save", trap("torch.save"))
    model = Net(1)
    optimizer = torch.optim.AdamW(model.parameters())
    step(model, optimizer)
    point = saved(Local(tmp_path), collect(model, optimizer))
    other = Net(2)
    restore(Local(tmp_path), point, other, torch.optim.AdamW(other.parameters()))
    assert trapped == []
    with pytest.raises(AssertionError, match=r"torch\.save"):
        torch.save({}, io.BytesIO())
