"""FORMAT.md §9.1 to §9.9: names, aliases, and state that is not there yet."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard
from torch.testing._internal.distributed.fake_pg import FakeStore

from fakes.disk import Disk
from fakes.saving import commit_states, save_rank
from stormjib_checkpoint.commit import commit_step
from stormjib_checkpoint.engine.plan import plan
from stormjib_checkpoint.errors import Inconsistent, StateMismatch, UnsupportedState
from stormjib_checkpoint.opening import open_next
from stormjib_checkpoint.reader import Checkpoint, load
from stormjib_checkpoint.state import collect, restore
from stormjib_checkpoint.storage import Local
from stormjib_checkpoint.tensors import ABSENT
from stormjib_checkpoint.writer import split

if TYPE_CHECKING:
    from collections.abc import Iterator

    from stormjib_checkpoint.format import ResumePoint
    from stormjib_checkpoint.tensors import Value


@pytest.fixture
def storage() -> Local:
    return Local("/job", Disk())


def rows(first: float, count: int = 3) -> torch.Tensor:
    return torch.arange(count * 2, dtype=torch.float32).reshape(count, 2) + first


class Tied(nn.Module):
    """A language model in small: the embedding and the head are one parameter."""

    def __init__(self, seed: int = 0, tied: bool = True) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.tok_emb = nn.Embedding(5, 3)
        self.encoder = nn.Linear(3, 3)
        self.lm_head = nn.Linear(3, 5, bias=False)
        if tied:
            self.lm_head.weight = self.tok_emb.weight

    def forward(self, words: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.lm_head(self.encoder(self.tok_emb(words)))
        return out


def adam(model: nn.Module, steps: int = 1) -> torch.optim.Optimizer:
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    for _ in range(steps):
        model(torch.arange(4)).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    return optimizer


def alike(one: dict[str, Value], other: dict[str, Value]) -> bool:
    return one.keys() == other.keys() and all(
        torch.equal(value, other[name]) if isinstance(value, torch.Tensor) else value == other[name]
        for name, value in one.items()
    )


# --- names ------------------------------------------------------------------------------------------------------------

WRAPPERS = ["module", "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"]


@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_a_wrapper_leaves_no_trace_in_names(storage: Local, wrapper: str) -> None:
    """§9.1, outside and inside; and what was saved with wrappers loads without."""
    model = Tied()
    optimizer = adam(model)
    point = commit_states(storage, collect(model, optimizer))
    other = Tied(1)
    other.encoder = nn.ModuleDict({wrapper: other.encoder})  # type: ignore[assignment]
    wrapped = nn.ModuleDict({wrapper: other})
    fresh = torch.optim.AdamW(wrapped.parameters())
    restore(storage, point, wrapped, fresh)
    assert alike(collect(wrapped, fresh), collect(model, optimizer))


def test_only_whole_parts_of_names_are_wrappers() -> None:
    """§9.1"""
    model = nn.ModuleDict({"mymodule": nn.Linear(1, 1), "_orig_mod2": nn.Linear(1, 1)})
    model.register_parameter("module", nn.Parameter(torch.zeros(1)))
    names = [
        name for name in collect(model, torch.optim.SGD(model.parameters())) if name.startswith("model.")
    ]
    assert sorted(names) == [
        "model._orig_mod2.bias", "model._orig_mod2.weight", "model.module", "model.mymodule.bias", "model.mymodule.weight",
    ]  # fmt: skip


@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_two_tensors_of_one_name_are_refused(wrapper: str) -> None:
    """§9.1"""
    both = nn.ModuleDict({wrapper: nn.Linear(1, 1)})
    both.register_parameter("weight", nn.Parameter(torch.zeros(1)))
    with pytest.raises(UnsupportedState, match=r"two tensors of the model are called model\.weight"):
        collect(both, torch.optim.SGD(both.parameters()))


def test_optimizer_state_goes_by_the_name_of_its_parameter() -> None:
    """§9.2; of two names of one parameter the first in the alphabet counts."""
    model = Tied()
    state = collect(model, adam(model))
    assert [name for name in state if name.startswith("optim.") and name.endswith(".exp_avg")] == [
        "optim.lm_head.weight.exp_avg", "optim.encoder.weight.exp_avg", "optim.encoder.bias.exp_avg",
    ]  # fmt: skip
    assert state["group.0.params"] == ["model.lm_head.weight", "model.encoder.weight", "model.encoder.bias"]
    assert state["group.0.betas"] == (0.9, 0.999)


@pytest.mark.parametrize("order", ["ab", "ba"])
def test_the_order_of_registration_does_not_matter(order: str) -> None:
    """§9.2"""
    shared = nn.Linear(2, 2, bias=False)
    model = nn.ModuleDict({name: shared for name in order})
    optimizer = torch.optim.SGD(model.parameters(), momentum=0.9)
    model["a"](torch.ones(2)).sum().backward()
    optimizer.step()
    state = collect(model, optimizer)
    assert [name for name in state if name.startswith("optim.")] == ["optim.a.weight.momentum_buffer"]
    assert split(state, 0, 1).ties == {"model.b.weight": "model.a.weight"}


class Renamed(Tied):
    def __init__(self) -> None:
        super().__init__(1)
        self.enc = self.encoder
        del self.encoder

    def forward(self, words: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.lm_head(self.enc(self.tok_emb(words)))
        return out


def test_a_rule_renames_tensors_their_state_and_the_groups(storage: Local) -> None:
    """§9.3"""
    model = Tied()
    optimizer = adam(model)
    point = commit_states(storage, collect(model, optimizer))
    other = Renamed()
    fresh = torch.optim.AdamW([other.tok_emb.weight, other.enc.weight, other.enc.bias])
    with pytest.raises(StateMismatch, match=r"differs|not in the checkpoint|absent"):
        restore(storage, point, other, fresh)
    assert not fresh.state, "nothing is made for a load that is refused"
    restore(storage, point, other, fresh, rename=lambda name: name.replace(".encoder.", ".enc."))
    assert torch.equal(other.enc.weight, model.encoder.weight)
    one = optimizer.state[model.encoder.weight]["exp_avg"]
    assert torch.equal(fresh.state[other.enc.weight]["exp_avg"], one)


def test_a_rule_that_makes_two_names_one_is_refused(storage: Local) -> None:
    """§9.3"""
    point = commit_states(storage, {"a.w": rows(0), "b.w": rows(1)})
    with pytest.raises(StateMismatch, match=r"rename makes c\.w of both a\.w and b\.w"):
        load(storage, point, {"c.w": rows(0)}, rename=lambda name: "c" + name[1:])


@pytest.mark.parametrize(
    ("state", "message"),
    [
        ({"model.wieght": rows(0), "lr": 1}, r"tensor model\.wieght is not in the checkpoint; the nearest there is model\.weight"),
        ({"lr": 1}, r"tensor model\.weight of the checkpoint is not in the state to fill"),
        ({"model.weight": rows(0), "lrs": 1}, "scalar lrs is not in the checkpoint; the nearest there is lr"),
        ({"model.weight": rows(0)}, "scalar lr of the checkpoint is not in the state"),
    ],
)  # fmt: skip
def test_a_name_of_one_side_is_refused_with_the_nearest(
    storage: Local, state: dict[str, Any], message: str
) -> None:
    """§9.4"""
    point = commit_states(storage, {"model.weight": rows(0), "lr": 1})
    with pytest.raises(StateMismatch, match=message):
        load(storage, point, state)


# --- aliases ----------------------------------------------------------------------------------------------------------


def test_names_of_one_tensor_are_one_atom_and_ties(storage: Local) -> None:
    """§9.5"""
    weight = rows(0)
    state = {"b": weight, "a": weight.detach(), "c": weight.view(3, 2), "d": rows(0), "e": weight.t()}
    contents = split(state, 0, 1)
    assert [part.name for part in contents.parts] == ["a", "d", "e"]
    assert contents.ties == {"b": "a", "c": "a"}
    point = commit_states(storage, state)
    atoms = Checkpoint(storage, point).atoms
    assert atoms["a"] is atoms["b"] is atoms["c"]
    assert [atoms[name].nbytes for name in ("a", "d", "e")] == [24, 24, 24]


@pytest.mark.parametrize("tied", [False, True])
def test_every_name_of_an_atom_is_satisfied(storage: Local, tied: bool) -> None:
    """§9.6"""
    weight = rows(7)
    point = commit_states(storage, {"emb": weight, "head": weight})
    one, two = torch.zeros(3, 2), torch.zeros(3, 2)
    load(storage, point, {"emb": one, "head": one if tied else two})
    assert torch.equal(one, weight)
    assert torch.equal(two, torch.zeros(3, 2) if tied else weight)


def test_a_tied_model_trains_on_bit_for_bit(storage: Local) -> None:
    """§9.6"""
    model, other = Tied(), Tied(1)
    optimizer, fresh = adam(model, 2), torch.optim.AdamW(other.parameters(), lr=0.1)
    restore(storage, commit_states(storage, collect(model, optimizer)), other, fresh)
    for one, opt in ((model, optimizer), (other, fresh)):
        one(torch.arange(4)).square().sum().backward()
        opt.step()
        opt.zero_grad()
    assert alike(collect(model, optimizer), collect(other, fresh))
    assert other.lm_head.weight is other.tok_emb.weight


def test_separate_atoms_fill_one_tensor_only_where_they_are_equal(storage: Local) -> None:
    """§9.7: what was separate when it was saved."""
    equal = commit_states(storage, {"a": rows(1), "b": rows(1)})
    target = torch.zeros(3, 2)
    load(storage, equal, {"a": target, "b": target})
    assert torch.equal(target, rows(1))
    other = commit_states(storage, {"a": rows(1), "b": rows(2)}, step=2)
    with pytest.raises(StateMismatch, match="a shares memory with b, and the checkpoint has other values"):
        load(storage, other, {"a": target, "b": target})
    assert torch.equal(target, rows(1)), "nothing was filled"


def overlapping(first: float) -> dict[str, torch.Tensor]:
    """Windows of one memory that meet in its middle third."""
    memory = rows(first, 6)
    return {"front": memory[:4], "back": memory[2:], "apart": rows(first)}


def test_what_overlaps_is_stored_apart_and_filled_where_equal(storage: Local) -> None:
    """§9.7"""
    source = overlapping(5)
    assert not split(source, 0, 1).ties
    point = commit_states(storage, source)
    target = overlapping(0)
    load(storage, point, target)
    assert all(torch.equal(target[name], source[name]) for name in source)


def test_what_overlaps_and_differs_is_refused_before_anything_is_filled(storage: Local) -> None:
    """§9.7"""
    point = commit_states(storage, {"front": rows(0, 4), "back": rows(9, 4), "apart": rows(3)})
    target = overlapping(0)
    before = {name: value.clone() for name, value in target.items()}
    with pytest.raises(StateMismatch, match=r"front shares memory with back.*memory of its own"):
        load(storage, point, target)
    assert all(torch.equal(target[name], before[name]) for name in before)


def test_columns_of_one_memory_meet_nowhere(storage: Local) -> None:
    """§9.7: their extents overlap, their elements do not."""
    memory = rows(0, 4)
    point = commit_states(storage, {"left": torch.full((4,), 1.0), "right": torch.full((4,), 2.0)})
    load(storage, point, {"left": memory[:, 0], "right": memory[:, 1]})
    assert torch.equal(memory, torch.tensor([[1.0, 2.0]] * 4))


@pytest.mark.parametrize(
    "form",
    [
        lambda base: base[:1].expand(4, 2),
        lambda base: base.as_strided((3, 2), (1, 1)),
        lambda base: base.as_strided((2, 2, 2), (2, 0, 1)),
    ],
    ids=["expanded", "sliding", "expanded inside"],
)
def test_a_tensor_that_meets_itself_is_stored_whole_and_filled_where_equal(storage: Local, form: Any) -> None:
    """§9.7"""
    source = form(rows(4))
    point = commit_states(storage, {"w": source})
    assert Checkpoint(storage, point).atoms["w"].nbytes == source.numel() * 4
    base = torch.zeros(3, 2)
    load(storage, point, {"w": form(base)})
    assert torch.equal(form(base), source)
    plain = commit_states(storage, {"w": torch.arange(float(source.numel())).reshape(source.shape)}, step=2)
    before = base.clone()
    with pytest.raises(StateMismatch, match="w shares memory with itself"):
        load(storage, plain, {"w": form(base)})
    assert torch.equal(base, before)


def test_ranks_tie_alike_or_the_step_is_not_committed(storage: Local) -> None:
    """§9.5"""
    weight = rows(0)
    with pytest.raises(Inconsistent, match="to rank 0 b is the tensor a, to rank 1 b"):
        commit_states(storage, {"a": weight, "b": weight}, {"a": rows(0), "b": rows(0)})


def test_a_tie_that_is_broken_between_two_saves_is_noticed() -> None:
    """§9.5"""
    weight = rows(0)
    state: dict[str, Value] = {"a": weight, "b": weight}
    planned = plan(state, 0, 1, (), set(), None)
    assert planned.seems_to_fit(state | {"b": weight.view(3, 2)})
    assert not planned.seems_to_fit(state | {"b": rows(0)})
    assert not planned.seems_to_fit(state | {"b": weight.view(2, 3).view(3, 2)[:]} | {"a": rows(0)})
    assert not planned.seems_to_fit(state | {"b": 0.5})


def test_a_number_that_becomes_a_tensor_is_planned_anew() -> None:
    """§4.3: the plan would know nothing of it, and the step would lack it."""
    state: dict[str, Value] = {"w": rows(0), "lr": 0.1}
    planned = plan(state, 0, 1, (), set(), None)
    assert planned.seems_to_fit(state | {"lr": 0.2})
    assert not planned.seems_to_fit(state | {"lr": torch.tensor(0.2)})


@pytest.fixture
def four_ranks() -> Iterator[None]:
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=4)
    yield
    dist.destroy_process_group()


@pytest.mark.usefixtures("four_ranks")
def test_shards_are_tied_also_where_a_rank_has_none_of_them(
    storage: Local, monkeypatch: pytest.MonkeyPatch
) -> None:
    """§4.3, §9.5, §9.17: three rows over four ranks. The others see the tie; the last one sees nothing, and says nothing."""
    mesh = init_device_mesh("cpu", (4,))
    generation = open_next(storage).generation
    for rank in range(4):
        local = rows(0)[rank : rank + 1].clone()
        size = torch.Size((3, 2))
        weight = DTensor.from_local(local, mesh, [Shard(0)], run_check=False, shape=size, stride=(2, 1))
        monkeypatch.setattr(type(mesh), "get_coordinate", lambda _, at=rank: [at])
        state = {"emb": weight, "head": weight.detach(), "bare": torch.zeros(0, 2)}
        save_rank(
            storage, step=1, generation=generation, rank=rank, world=4, state=state, train={}, samples={}
        )
    atoms = Checkpoint(storage, commit_step(storage, generation, 4, 1)).atoms
    assert atoms["emb"] is atoms["head"]
    assert {name: len(atom.boxes) for name, atom in atoms.items()} == {"emb": 3, "head": 3, "bare": 0}


# --- state that is not there yet ----------------------------------------------------------------------------------------


def some_stepped(seed: int = 0) -> tuple[Tied, torch.optim.Optimizer]:
    """Only the encoder has been trained so far."""
    model = Tied(seed)
    model.tok_emb.weight.requires_grad_(False)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    model(torch.arange(4)).square().sum().backward()
    optimizer.step()
    return model, optimizer


def point_of(storage: Local, model: nn.Module, optimizer: torch.optim.Optimizer) -> ResumePoint:
    return commit_states(storage, collect(model, optimizer))


def test_what_is_absent_is_said_to_be_absent(storage: Local) -> None:
    """§9.8"""
    found = Checkpoint(storage, point_of(storage, *some_stepped()))
    assert found.scalars["optim.lm_head.weight"] is ABSENT
    assert [name for name in found.atoms if name.startswith("optim.lm_head")] == []
    assert "optim.encoder.weight.exp_avg" in found.atoms


def test_state_that_is_neither_there_nor_absent_is_missing(storage: Local) -> None:
    """§9.8"""
    model, optimizer = some_stepped()
    state = collect(model, optimizer)
    del state["optim.lm_head.weight"]
    with pytest.raises(
        StateMismatch,
        match=r"optim\.lm_head\.weight is absent in the state to fill and not in the checkpoint",
    ):
        restore(storage, commit_states(storage, state), *some_stepped())


def test_a_load_makes_what_was_there_and_takes_away_what_was_absent(storage: Local) -> None:
    """§9.9"""
    model, optimizer = some_stepped()
    point = point_of(storage, model, optimizer)
    other = Tied(1)
    stepped = adam(other)
    fresh = torch.optim.AdamW(other.parameters(), lr=0.1)
    for target in (stepped, fresh):
        restore(storage, point, other, target)
        assert alike(collect(model, optimizer), collect(other, target))
        assert other.lm_head.weight not in target.state
        assert len(target.state) == 2


def test_a_refused_load_leaves_the_optimizer_as_it_was(storage: Local) -> None:
    """§9.9"""
    point = point_of(storage, *some_stepped())
    other = Tied(1, tied=False)
    stepped = adam(other)
    before = {
        name: v.clone() if isinstance(v, torch.Tensor) else v for name, v in collect(other, stepped).items()
    }
    with pytest.raises(StateMismatch):
        restore(storage, point, other, stepped)
    assert alike(collect(other, stepped), before)


def test_plain_loads_say_who_makes_absent_state(storage: Local) -> None:
    """§9.9"""
    point = commit_states(storage, {"optim.w": ABSENT})
    state: dict[str, Value] = {"optim.w": ABSENT}
    load(storage, point, state)
    assert state == {"optim.w": ABSENT}
    with pytest.raises(
        StateMismatch, match=r"optim\.w is absent in the checkpoint .* `restore` makes and removes"
    ):
        load(storage, point, {"optim.w.exp_avg": rows(0)})


def test_what_is_absent_on_one_rank_and_there_on_another_is_not_committed(storage: Local) -> None:
    """§9.8"""
    with pytest.raises(Inconsistent, match=r"rank 1 has optim\.w\.step; to another rank it is absent"):
        commit_states(storage, {"optim.w": ABSENT}, {"optim.w.step": rows(0)})
