"""The engine: what is saved is the state of the call, bit for bit, whatever training does meanwhile; else it is not saved."""

from __future__ import annotations

import pickle
import sys
import threading
import time
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file
from torch import nn
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict

from fakes.meshes import filled, raw, zeros
from fakes.saving import until_left
from stormjib_checkpoint import retention, room
from stormjib_checkpoint.engine import Engine, Save, pipeline, staging
from stormjib_checkpoint.engine import arena as arenas
from stormjib_checkpoint.errors import (
    ArenaTooLarge,
    NoUsableCheckpoint,
    SaveError,
    TornCopy,
    UnsupportedState,
)
from stormjib_checkpoint.history import committed
from stormjib_checkpoint.reader import load
from stormjib_checkpoint.state import collect
from stormjib_checkpoint.tensors import DTYPES, TAGS

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping
    from pathlib import Path

    from torch.optim import Optimizer

    from stormjib_checkpoint.tensors import Value

PIECE = 8192
SOON_S = 10.0


@pytest.fixture(autouse=True)
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(arenas, "PIECE_BYTES", PIECE)


@pytest.fixture
def engine(tmp_path: Path) -> Iterator[Engine]:
    one = Engine(tmp_path / "job")
    yield one
    one.close()


class Net(nn.Module):
    """An embedding of many pieces, a buffer that every forward changes, and a head."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.table = nn.Embedding(300, 40)
        self.norm = nn.BatchNorm1d(40)
        self.head = nn.Linear(40, 3)

    def forward(self, words: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.head(self.norm(self.table(words)))
        return out


def trained(steps: int = 1, **options: Any) -> tuple[Net, Optimizer]:
    model = Net()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, **options)
    for _ in range(steps):
        step(model, optimizer)
    return model, optimizer


def step(model: nn.Module, optimizer: Optimizer) -> None:
    model(torch.arange(8)).square().sum().backward()
    optimizer.step()
    optimizer.zero_grad()


def copied(state: Mapping[str, Value]) -> dict[str, Value]:
    return {name: v.detach().clone() if torch.is_tensor(v) else v for name, v in state.items()}


def assert_saved(engine: Engine, save: Save, wanted: Mapping[str, Value]) -> None:
    save.upload_completion.result(SOON_S)
    assert save.point is not None
    found = {name: zeros(tuple(v.shape), v.dtype) if torch.is_tensor(v) else v for name, v in wanted.items()}
    load(engine.storage, save.point, found)
    for name, value in wanted.items():
        same = raw(found[name]) == raw(value) if torch.is_tensor(value) else found[name] == value
        assert same, name


def arena_of(engine: Engine) -> arenas.Arena:
    """Where it stages, without a node's memory."""
    return engine._berths._berths[0].arena


@contextmanager
def held(engine: Engine, state: Mapping[str, Value], piece: int = -1) -> Iterator[threading.Event]:
    """Within it, copying gets as far as a piece (the last one), which sets the event, and no further."""
    engine.reserve(state)
    arena, planned = arena_of(engine), engine._plan
    assert planned is not None
    number = range(-(-planned.image.size // PIECE))[piece]
    reached, go_on = threading.Event(), threading.Event()
    take = arena.take

    def take_later(asked: int) -> None:
        if asked == number:
            reached.set()
            assert go_on.wait(SOON_S)
        take(asked)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(arena, "take", take_later)
        yield reached
        assert reached.wait(SOON_S)
        go_on.set()


def test_the_state_of_the_call_is_saved_while_the_optimizer_goes_on(engine: Engine) -> None:
    model, optimizer = trained()
    engine.prepare(model, optimizer)
    saves = []
    for number in range(1, 6):
        state = collect(model, optimizer)
        wanted = copied(state)
        saves.append((engine.async_save(state, step=number, train={"step": number}), wanted))
        step(model, optimizer)
    for save, wanted in saves[-2:]:  # the older ones are deleted by now
        assert_saved(engine, save, wanted)
    engine.wait()
    until_left(engine.storage, [5, 4])


def test_the_optimizer_waits_until_the_last_byte_is_copied(engine: Engine) -> None:
    model, optimizer = trained()
    engine.prepare(model, optimizer)
    state = collect(model, optimizer)
    wanted = copied(state)
    stepping = threading.Thread(target=step, args=(model, optimizer))
    with held(engine, state):
        save = engine.async_save(state, step=1)
        stepping.start()
        stepping.join(0.2)
        assert stepping.is_alive()
        assert not save.staging_completion.done()
    stepping.join(SOON_S)
    assert save.figures.waited_s > 0.1
    assert_saved(engine, save, wanted)
    assert raw(model.table.weight) != raw(wanted["model.table.weight"])


def test_an_interrupt_of_whoever_waits_reaches_it(engine: Engine) -> None:
    """A script that ends by a handler that raises is not to go on training because it was at the gate then."""
    model, optimizer = trained()
    engine.prepare(model, optimizer)
    state = collect(model, optimizer)
    take = arena_of(engine).take

    def interrupted(piece: int) -> None:
        if threading.current_thread() is threading.main_thread():
            raise KeyboardInterrupt
        started.set()
        assert raised.wait(SOON_S)
        take(piece)

    def save_and_wait() -> None:
        engine.async_save(state, step=1)
        assert started.wait(SOON_S)
        engine.guard()

    started, raised = threading.Event(), threading.Event()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(arena_of(engine), "take", interrupted)
        with pytest.raises(KeyboardInterrupt):
            save_and_wait()
        raised.set()
    engine.wait()
    save, wanted = engine.async_save(state, step=2), copied(state)
    assert_saved(engine, save, wanted)


@pytest.mark.parametrize("hands", [0, 3])
def test_whoever_waits_copies_and_so_do_the_hands_kept_for_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, hands: int
) -> None:
    """The thread that copies gets no processor time, because training has them all: it is held at its first piece."""
    monkeypatch.setattr(pipeline, "hands", lambda: hands)
    engine = Engine(tmp_path / "job")
    state: dict[str, Value] = {"table": torch.randn(8 * PIECE // 4)}
    with held(engine, state, piece=0) as reached:
        save = engine.async_save(state, step=1)
        assert reached.wait(SOON_S)
        workers: set[threading.Thread] = set()
        all_here, fill = threading.Event(), staging.Copying._fill

        def noted(copying: staging.Copying, piece: int) -> None:
            workers.add(threading.current_thread())
            if len(workers) > hands:
                all_here.set()
            assert all_here.wait(SOON_S)
            fill(copying, piece)

        monkeypatch.setattr(staging.Copying, "_fill", noted)
        waiting = threading.Thread(target=engine.guard, name="waiting")
        waiting.start()
        assert all_here.wait(SOON_S), "they have not all come"
        assert sorted(thread.name for thread in workers) == ["stormjib-hand"] * hands + ["waiting"]
        assert not save.staging_completion.done()
    waiting.join(SOON_S)
    assert_saved(engine, save, state)
    engine.close()


def test_what_has_to_be_brought_to_the_host_first_is_there_once_at_a_time(engine: Engine) -> None:
    state: dict[str, Value] = {
        str(n): torch.randn(PIECE // 4, 3).t() for n in range(6)
    }  # no plain memory: it has to be laid out first
    save = engine.async_save(state, step=1)
    engine.guard()
    assert_saved(engine, save, state)


def test_an_optimizer_in_the_backward_pass_waits_too(engine: Engine) -> None:
    model = Net()
    optimizers: dict[torch.Tensor, Optimizer] = {
        p: torch.optim.SGD([p], lr=0.1, momentum=0.9) for p in model.parameters()
    }

    def at_once(parameter: torch.Tensor) -> None:
        optimizers[parameter].step()
        optimizers[parameter].zero_grad()

    for parameter in model.parameters():
        parameter.register_post_accumulate_grad_hook(at_once)  # type: ignore[no-untyped-call]
    model(torch.arange(8)).square().sum().backward()
    engine.prepare(model, optimizers[model.head.bias])
    state: dict[str, Value] = dict(model.named_parameters())
    wanted = copied(state)
    backward = threading.Thread(target=lambda: model(torch.arange(8)).square().sum().backward())
    with held(engine, state):
        save = engine.async_save(state, step=1)
        backward.start()
        backward.join(0.2)
        assert backward.is_alive()
    backward.join(SOON_S)
    assert_saved(engine, save, wanted)


def test_the_hidden_step_of_torch_waits_too(engine: Engine) -> None:
    """`get_optimizer_state_dict` steps an optimizer that has no state yet."""
    model, optimizer = trained(0)
    state = collect(model, optimizer)
    wanted = copied(state)
    asking = threading.Thread(target=get_optimizer_state_dict, args=(model, optimizer))
    with held(engine, state):
        save = engine.async_save(state, step=1)
        asking.start()
        asking.join(0.2)
        assert asking.is_alive()
    asking.join(SOON_S)
    assert optimizer.state
    assert_saved(engine, save, wanted)


CHANGES: dict[str, Callable[[torch.Tensor], Any]] = {
    "one row of an embedding": lambda table: table.detach()[7].add_(1),
    "through data": lambda table: table.data[7].add_(1),
    "through numpy": lambda table: table.detach().numpy().__iadd__(1),
}


@pytest.mark.parametrize("change", CHANGES)
def test_what_changes_while_it_is_copied_is_not_saved(engine: Engine, change: str) -> None:
    table = nn.Parameter(torch.randn(3000, 40))
    state: dict[str, Value] = {"ema.table": table, "z": torch.randn(9)}
    good = engine.async_save(state, step=1)
    good.upload_completion.result(SOON_S)
    with held(engine, state) as reached:
        save = engine.async_save(state, step=2)
        assert reached.wait(SOON_S)
        CHANGES[change](table)
    with pytest.raises(TornCopy, match=r"step 2 is not saved: ema\.table changed.*guard\(\).*volatile="):
        save.staging_completion.result(SOON_S)
    with pytest.raises(TornCopy):
        save.upload_completion.result(SOON_S)
    with pytest.raises(TornCopy, match="step 2"):
        engine.async_save(state, step=3)
    assert [point.step for point in committed(engine.storage)] == [1]
    wanted = copied(state)
    assert_saved(engine, engine.async_save(state, step=3), wanted)


def test_a_change_that_was_over_before_its_tensor_was_copied_is_found(engine: Engine) -> None:
    last = torch.randn(3000, 40)
    state: dict[str, Value] = {"a": torch.randn(3000, 40), "b": last}
    with held(engine, state, 2):
        save = engine.async_save(state, step=1)
        last.add_(1)
    with pytest.raises(TornCopy, match="b changed"):
        save.staging_completion.result(SOON_S)


def test_a_step_that_goes_round_the_gate_is_found(engine: Engine) -> None:
    """What an optimizer holds is trusted, and a sample of it compared all the same."""
    model, optimizer = trained()
    state = collect(model, optimizer)
    with held(engine, state) as reached:
        save = engine.async_save(state, step=1)
        assert reached.wait(SOON_S)
        for parameter in model.parameters():
            parameter.data.sub_(0.5)
    with pytest.raises(TornCopy, match=r"guard\(\)"):
        save.staging_completion.result(SOON_S)


def test_guard_makes_any_change_wait(engine: Engine) -> None:
    average = torch.randn(3000, 40)
    state: dict[str, Value] = {"ema.average": average}
    wanted = copied(state)

    def update() -> None:
        engine.guard()
        average.mul_(0.9)

    updating = threading.Thread(target=update)
    with held(engine, state):
        save = engine.async_save(state, step=1)
        updating.start()
        updating.join(0.2)
        assert updating.is_alive()
    updating.join(SOON_S)
    assert_saved(engine, save, wanted)


def test_volatile_tensors_are_those_of_the_call(tmp_path: Path) -> None:
    """Buffers of a model, and what the patterns name: forward and averages may change them at once."""
    engine = Engine(tmp_path / "job", volatile=["ema.*"])
    model, optimizer = trained()
    engine.prepare(model, optimizer)
    average = torch.randn(3000, 40)
    state = {**collect(model, optimizer), "ema.table": average}
    wanted = copied(state)
    with held(engine, state):
        save = engine.async_save(state, step=1)
        model(torch.arange(8))
        average.data.add_(1)
    assert_saved(engine, save, wanted)
    assert raw(model.norm.running_mean) != raw(wanted["model.norm.running_mean"])  # type: ignore[arg-type]
    engine.close()


def test_a_load_while_a_step_is_copied_spoils_that_step_only(engine: Engine) -> None:
    model, optimizer = trained()
    state = collect(model, optimizer)
    other = Net()
    with held(engine, state):
        save = engine.async_save(state, step=1)
        model.load_state_dict({name: v + 1 for name, v in other.state_dict().items()})
    with pytest.raises(TornCopy):
        save.upload_completion.result(SOON_S)
    with pytest.raises(TornCopy):
        engine.wait()
    wanted = copied(state)
    assert_saved(engine, engine.async_save(state, step=2), wanted)


def test_what_is_freed_while_it_is_copied_is_saved(engine: Engine) -> None:
    model, optimizer = trained()
    state = collect(model, optimizer)
    wanted = copied(state)
    with held(engine, state):
        save = engine.async_save(state, step=1)
        state.clear()
        del model, optimizer
    assert_saved(engine, save, wanted)


def test_every_form_comes_back_and_others_can_read_it(engine: Engine, tmp_path: Path) -> None:
    state: dict[str, Value] = {str(dtype): filled((3, 5), dtype, 1) for dtype in TAGS}
    state |= {"scalar": torch.tensor(3.5), "none": torch.zeros(0, 4), "turned": torch.randn(6, 5000).t()}
    state |= {"wide": torch.randn(5000, 4)[:, ::2], "lr": 0.1, "betas": (0.9, 0.99)}
    save = engine.async_save(state, step=1)
    assert_saved(engine, save, state)
    file = load_file(tmp_path / "job/step-00000001/g0.1/rank-00000.safetensors")
    assert file.keys() == {name for name, v in state.items() if torch.is_tensor(v) and v.numel()}
    assert torch.equal(file["turned"], state["turned"])


def test_ties_absent_states_and_odd_values_go_through_the_engine(tmp_path: Path) -> None:
    """§9.3, §9.5, §9.8: also where the pattern names only the other name of a volatile tensor, of a type torch cannot copy."""
    engine = Engine(tmp_path / "job", volatile=["z.*"])
    model, optimizer = trained(0)
    bare = filled((3, 5), DTYPES["I4"], 1)
    odd = {"numbers": (float("inf"), {7: b"x"})}
    state: dict[str, Value] = {**collect(model, optimizer), "a.bare": bare, "z.bare": bare, **odd}
    wanted = copied({name: value for name, value in state.items() if not name.endswith(".bare")})
    with held(engine, state):
        save = engine.async_save(state, step=1)
        old = raw(bare)
        bare.view(torch.uint8).add_(1)
    wanted |= {name: filled((3, 5), DTYPES["I4"], 1) for name in ("a.bare", "z.bare")}
    assert old == raw(filled((3, 5), DTYPES["I4"], 1))
    assert_saved(engine, save, wanted)
    engine.async_save(collect(model, optimizer), step=2)
    engine.close()
    again, stepped = Engine(tmp_path / "job"), trained(1)
    assert again.restore(*stepped, rename=lambda name: name) == {}
    assert not stepped[1].state
    again.close()


def test_a_state_of_another_form_is_planned_anew(engine: Engine) -> None:
    for rows in (10, 3000, 20):
        state: dict[str, Value] = {"a": torch.randn(rows, 4), f"only in {rows}": torch.randn(2)}
        wanted = copied(state)
        assert_saved(engine, engine.async_save(state, step=rows if rows != 20 else 4000), wanted)
    state = {name: v.double() if torch.is_tensor(v) else v for name, v in state.items()}
    with pytest.raises(SaveError, match="type or the sharding"):
        engine.async_save(state, step=4001).upload_completion.result(SOON_S)
    assert_saved(engine, engine.async_save(state, step=4002), state)


@pytest.mark.parametrize("amsgrad", [False, True])
def test_memory_is_taken_before_the_first_save(engine: Engine, amsgrad: bool) -> None:
    model, optimizer = trained(0, amsgrad=amsgrad)
    engine.prepare(model, optimizer)
    before = arena_of(engine)
    step(model, optimizer)
    engine.async_save(collect(model, optimizer), step=1).upload_completion.result(SOON_S)
    assert (arena_of(engine) is before) != amsgrad, (
        "three moments are more than is expected, and are saved all the same"
    )


def test_a_third_save_waits_and_says_so(engine: Engine) -> None:
    state: dict[str, Value] = {"a": torch.randn(3000, 4)}
    engine.reserve(state)
    arena_of(engine).take(0)
    saves = [engine.async_save(state, step=number) for number in (1, 2)]
    threading.Timer(0.2, arena_of(engine).free, [0]).start()
    third = engine.async_save(state, step=3)
    assert third.figures.busy_s > 0.1
    assert third.figures.call_s >= third.figures.busy_s
    for save in (*saves, third):
        save.upload_completion.result(SOON_S)
        assert 0 < save.figures.staged_s <= save.figures.durable_s <= save.figures.committed_s


def test_too_little_memory_is_refused_before_it_is_taken(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(room, "free", lambda: 10_000)
    with pytest.raises(
        ArenaTooLarge, match=r"needs as much host memory.*10000 are free.*raise the memory limit"
    ):
        engine.reserve({"a": torch.randn(3000)})


def test_what_cannot_be_stored_names_the_key(engine: Engine) -> None:
    state: dict[str, Value] = {"a": torch.randn(3)}
    with pytest.raises(UnsupportedState, match=r"state\.when"):
        engine.async_save({**state, "when": object()}, step=1)
    with pytest.raises(UnsupportedState, match=r"train\.when"):
        engine.async_save(state, step=1, train={"when": object()})
    assert_saved(engine, engine.async_save({**state, "pair": (1, 2)}, step=1), {**state, "pair": (1, 2)})
    with pytest.raises(UnsupportedState, match=r"state\.pair"):
        engine.async_save({**state, "pair": {1, 2}}, step=2).upload_completion.result(SOON_S)


def test_what_is_passed_may_change_after_the_call(engine: Engine) -> None:
    numbers, told = [1, 2], {"step": 1}
    state: dict[str, Value] = {"a": torch.randn(3000, 4), "numbers": numbers}
    wanted = copied({**state, "numbers": [1, 2]})
    with held(engine, state):
        save = engine.async_save(state, step=1, train=told)
        numbers.append(3)
        told["step"] = 7
    assert_saved(engine, save, wanted)
    assert save.point is not None
    assert load(engine.storage, save.point, copied(wanted)) == {"step": 1}


def test_it_goes_on_where_it_was(tmp_path: Path) -> None:
    first = Engine(tmp_path)
    model, optimizer = trained(3)
    assert first.restore(*trained(0)) is None
    wanted = copied(collect(model, optimizer))
    first.async_save(collect(model, optimizer), step=3, train={"step": 3})
    first.close()
    second = Engine(tmp_path)
    assert (first.generation, second.generation) == ("0.1", "0.2")
    other, fresh = trained(0)
    assert second.restore(other, fresh) == {"step": 3}
    assert all(raw(v) == raw(wanted[name]) for name, v in collect(other, fresh).items() if torch.is_tensor(v))
    second.close()


def flip(path: Path, at: int = 5000) -> None:
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(data)


def test_a_damaged_step_is_passed_over_and_with_none_left_nothing_is_saved(tmp_path: Path) -> None:
    engine = Engine(tmp_path)
    state: dict[str, Value] = {"a": torch.randn(3000, 4)}
    for number in (1, 2):
        engine.async_save(state, step=number, train={"step": number}).upload_completion.result(SOON_S)
    engine.close()
    files = [tmp_path / f"step-0000000{number}/g0.1/rank-00000.safetensors" for number in (1, 2)]
    flip(files[1])
    again = Engine(tmp_path)
    assert again.load(copied(state)) == {"step": 1}
    assert again.resume is not None
    assert again.resume.step == 1
    again.close()
    flip(files[0])
    last = Engine(tmp_path)
    with pytest.raises(NoUsableCheckpoint):
        last.load(copied(state))
    with pytest.raises(SaveError, match="half-way"):
        last.async_save(state, step=9)
    last.close()


OBJECT_COLLECTIVES = [name for name in dir(dist) if name.endswith(("_object", "_object_list"))]
found_classes: list[str] = []
watching = threading.Event()


def audited(event: str, _: object) -> None:
    if event == "pickle.find_class" and watching.is_set():
        found_classes.append(event)


sys.addaudithook(audited)


def test_no_save_and_no_load_pickles_anything(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """§1.5"""
    trained()  # torch imports what derives from Pickler in its first step
    sprung: list[str] = []

    def trap(name: str) -> Callable[..., None]:
        def spring(*_: object, **__: object) -> None:
            sprung.append(name)
            raise AssertionError(f"{name} was called")

        return spring

    pickling = [(pickle, name) for name in ("load", "loads", "dump", "dumps", "Unpickler", "Pickler")]
    traps: list[tuple[Any, str]] = [*pickling, (torch, "load"), (torch, "save")]
    traps += [(dist, name) for name in OBJECT_COLLECTIVES]
    assert len(traps) > 12
    for module, name in traps:
        monkeypatch.setattr(module, name, trap(name))
    watching.set()
    engine = Engine(tmp_path, volatile=["ema.*"])
    model, optimizer = trained(2)
    engine.prepare(model, optimizer)
    state = {**collect(model, optimizer), "ema.a": torch.randn(5)}
    assert_saved(engine, engine.async_save(state, step=2, train={"step": 2}), copied(state))
    engine.async_save(collect(model, optimizer), step=3)
    engine.close()
    again = Engine(tmp_path)
    assert again.restore(*trained(0)) == {}
    again.close()
    assert (sprung, found_classes) == ([], [])
    with pytest.raises(AssertionError, match="all_gather_object"):
        dist.all_gather_object([], None)
    monkeypatch.undo()
    pickle.loads(pickle.dumps(Net))
    watching.clear()
    assert found_classes, "the audit hook sees what is unpickled"


def test_nobody_waits_until_a_step_is_proved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither `wait` nor `close`, although the disk is to be left alone for a minute between two pieces."""
    monkeypatch.setattr(retention, "rest_s", lambda _took: 60.0)
    engine = Engine(tmp_path)
    began = time.monotonic()
    for number in (1, 2, 3):
        engine.async_save({"w": torch.ones(10)}, step=number)
        engine.wait()
    assert engine._tidier._going, "a step is half proved"
    engine.close()
    assert time.monotonic() - began < 30
    assert [point.step for point in committed(engine.storage)] == [3, 2, 1], "so nothing was deleted"
