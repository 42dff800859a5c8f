"""Steps that lie on a device: the host goes on as soon as all is asked for, and what changes the state waits on the device's stream.

The device here is a thread that copies when the test lets it. What only a real one can show is in `test_engine_gpu.py`.
"""

from __future__ import annotations

import queue
import threading
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch

from fakes.digests import of, said
from stormjib_checkpoint.engine import Engine, device, pinning, torn
from stormjib_checkpoint.engine import arena as arenas
from stormjib_checkpoint.errors import TornCopy
from stormjib_checkpoint.reader import load
from stormjib_checkpoint.storage import Local
from stormjib_checkpoint.tensors import is_direct

if TYPE_CHECKING:
    from collections.abc import Iterator

PIECE = 8192
SOON_S = 10.0


class Mark:
    """Passed when the device's thread comes to it."""

    def __init__(self) -> None:
        self.passed = threading.Event()

    def synchronize(self) -> None:
        assert self.passed.wait(SOON_S)


class Device:
    """Copies in the order in which it was asked, when it may; tensors of `held` lie on it."""

    def __init__(self) -> None:
        self.may = threading.Event()
        self.held: set[int] = set()
        self.holds: list[Mark] = []
        """Marks that the stream of the thread which asked waits for."""
        self._asked: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        while (work := self._asked.get()) is not None:
            assert self.may.wait(SOON_S)
            work()

    def close(self) -> None:
        self.may.set()
        self._asked.put(None)
        self._thread.join()

    def has(self, tensor: torch.Tensor) -> bool:
        return tensor.untyped_storage().data_ptr() in self.held

    def put(self, *tensors: torch.Tensor) -> None:
        self.held |= {tensor.untyped_storage().data_ptr() for tensor in tensors}

    def mark(self) -> Mark:
        mark = Mark()
        self._asked.put(mark.passed.set)
        return mark

    # what a Lane does

    def begin(self, mark: Mark) -> None:
        self._asked.put(mark.synchronize)

    @contextmanager
    def entered(self) -> Iterator[None]:
        yield

    def copy(self, target: torch.Tensor, source: torch.Tensor) -> None:
        self._asked.put(lambda: target.copy_(source))

    def hold(self, mark: Mark) -> None:
        self.holds.append(mark)


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[Device]:
    fake = Device()

    def marks(tensors: Any) -> dict[torch.device, Mark]:
        return {torch.device("cpu"): fake.mark()} if any(map(fake.has, tensors)) else {}

    monkeypatch.setattr(device, "marks", marks)
    monkeypatch.setattr(device, "on_device", fake.has)
    monkeypatch.setattr(device, "Lane", lambda _: fake)
    monkeypatch.setattr(torn, "is_direct", lambda tensor: is_direct(tensor) and not fake.has(tensor))
    monkeypatch.setattr(pinning, "pin", lambda *_: False)
    monkeypatch.setattr(arenas, "PIECE_BYTES", PIECE)
    yield fake
    fake.close()


@pytest.fixture
def engine(tmp_path: Path) -> Iterator[Engine]:
    one = Engine(tmp_path / "job")
    yield one
    one.close()


class Trained:
    """Two parameters on the device, and Adam's moments there, but its step counts on the host."""

    def __init__(self, gpu: Device) -> None:
        torch.manual_seed(5)
        self.parameters = [torch.nn.Parameter(torch.randn(5000)), torch.nn.Parameter(torch.randn(7))]
        self.optimizer = torch.optim.AdamW(self.parameters, lr=0.1)
        self.step()
        gpu.put(*(value for name, value in self.state().items() if not name.endswith("step")))

    def step(self) -> None:
        for parameter in self.parameters:
            parameter.grad = torch.ones_like(parameter)
        self.optimizer.step()

    def state(self) -> dict[str, torch.Tensor]:
        named = {f"p{number}": parameter.detach() for number, parameter in enumerate(self.parameters)}
        for number, parameter in enumerate(self.parameters):
            named |= {f"o{number}.{key}": value for key, value in self.optimizer.state[parameter].items()}
        return named


def loaded(engine: Engine, point: Any, like: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    found: dict[str, Any] = {name: torch.zeros_like(value) for name, value in like.items()}
    load(engine.storage, point, found)
    return found


def test_the_host_goes_on_while_nothing_is_copied_yet_and_the_stream_that_updates_waits(
    gpu: Device, engine: Engine
) -> None:
    trained = Trained(gpu)
    trained.step()  # the gate knows the optimizer now
    wanted = {name: value.clone() for name, value in trained.state().items()}
    save = engine.async_save(trained.state(), step=1)
    engine.guard()  # as the hook before the optimizer's step does
    assert len(gpu.holds) == 1, "the stream of this thread waits"
    assert not gpu.holds[0].passed.is_set(), "and the host does not"
    assert not save.staging_completion.done()
    trained.optimizer.state[trained.parameters[0]]["step"] += (
        1  # on the host, where the stream keeps nobody back
    )
    gpu.may.set()
    assert gpu.holds[0].passed.wait(SOON_S), "what waited for it may change the state now"
    engine.wait()
    found = loaded(engine, save.point, wanted)
    assert all(torch.equal(found[name], value) for name, value in wanted.items())


def test_the_optimizer_itself_passes_and_what_was_before_it_is_saved(gpu: Device, engine: Engine) -> None:
    trained = Trained(gpu)
    trained.step()
    gpu.may.set()
    wanted = {name: value.clone() for name, value in trained.state().items()}
    save = engine.async_save(trained.state(), step=1)
    engine.guard()
    gpu.holds[0].synchronize()  # a real stream would wait for it by itself
    trained.step()
    engine.wait()
    assert isinstance(engine.storage, Local)
    assert said(Path(engine.storage.root), 1) == {name: of(value) for name, value in wanted.items()}
    found = loaded(engine, save.point, wanted)
    assert all(torch.equal(found[name], value) for name, value in wanted.items())
    assert not torch.equal(trained.state()["p0"], wanted["p0"]), "it has stepped"


def test_what_no_known_optimizer_holds_keeps_the_host_until_it_is_compared(
    gpu: Device, engine: Engine
) -> None:
    lone = {"average": torch.arange(6000.0)}
    gpu.put(lone["average"])
    save = engine.async_save(lone, step=1)
    passed = threading.Thread(target=engine.guard)
    passed.start()
    passed.join(0.3)
    assert passed.is_alive(), "it cannot be told from outside when it changes"
    gpu.may.set()
    passed.join(SOON_S)
    assert not passed.is_alive()
    assert not gpu.holds
    engine.wait()
    assert torch.equal(loaded(engine, save.point, lone)["average"], lone["average"])


def test_a_change_before_all_was_asked_for_is_found(
    gpu: Device, engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    trained = Trained(gpu)
    trained.step()
    ask = device.Fetching.ask

    def changed_meanwhile(self: device.Fetching) -> None:
        with torch.no_grad():
            trained.parameters[1].add_(1)
        ask(self)

    monkeypatch.setattr(device.Fetching, "ask", changed_meanwhile)
    gpu.may.set()
    save = engine.async_save(trained.state(), step=1)
    with pytest.raises(TornCopy, match="p1 changed"):
        save.staging_completion.result(SOON_S)
    with pytest.raises(TornCopy):
        engine.wait()
    monkeypatch.undo()


def test_two_saves_share_the_memory_and_both_come_whole(gpu: Device, engine: Engine) -> None:
    trained = Trained(gpu)
    trained.step()
    gpu.may.set()
    saves, wanted = [], []
    for number in (1, 2, 3):
        wanted.append({name: value.clone() for name, value in trained.state().items()})
        saves.append(engine.async_save(trained.state(), step=number))
        engine.guard()
        gpu.holds[-1].synchronize()
        trained.step()
    engine.wait()
    for save, was in list(zip(saves, wanted, strict=True))[1:]:  # the first is old, and deleted
        found = loaded(engine, save.point, was)
        assert all(torch.equal(found[name], value) for name, value in was.items())


def test_a_copy_that_fails_fails_its_save_and_the_next_one_finds_room(
    gpu: Device, engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    trained = Trained(gpu)
    trained.step()
    gpu.may.set()

    def broken(*_: object) -> None:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    with monkeypatch.context() as failing:
        failing.setattr(gpu, "copy", broken)
        save = engine.async_save(trained.state(), step=1)
        engine.guard()
        with pytest.raises(RuntimeError, match="illegal memory access"):
            save.staging_completion.result(SOON_S)
    save = engine.async_save(trained.state(), step=2)
    assert save.upload_completion.result(SOON_S) is None
    assert save.point is not None


def test_what_lies_askew_is_laid_straight_on_the_device(gpu: Device, engine: Engine) -> None:
    table = torch.arange(12_000.0).reshape(120, 100)
    state = {"turned": table.t(), "conjugate": torch.complex(table, table + 1).conj(), "none": torch.empty(0)}
    gpu.put(*(value for value in state.values() if value.numel()))
    gpu.may.set()
    save = engine.async_save(state, step=1)
    engine.wait()
    found = loaded(engine, save.point, {name: value.clone() for name, value in state.items()})
    assert all(torch.equal(found[name], value) for name, value in state.items())
