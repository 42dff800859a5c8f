"""DCP's own save and load over our files, in one process: values and tensors come back, damage is found, and no file holds a pickle."""

from __future__ import annotations

import io
import json
import pickle
import threading
import zipfile
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import nn
from torch.distributed.checkpoint._hf_utils import DTYPE_MAP
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader
from torch.distributed.checkpoint.planner import LoadPlan
from torch.distributed.checkpoint.state_dict_loader import _load_state_dict_from_keys
from torch.distributed.checkpoint.state_dict_loader import load as dcp_load
from torch.distributed.checkpoint.state_dict_saver import AsyncSaveResponse, async_save, save

from stormjib_checkpoint.dcp import GatedStager, StormjibReader, StormjibWriter
from stormjib_checkpoint.dcp import stager as stagers
from stormjib_checkpoint.engine import Engine
from stormjib_checkpoint.errors import LoadError, SaveError, TornCopy
from stormjib_checkpoint.history import committed
from stormjib_checkpoint.state import collect
from stormjib_checkpoint.storage import Local
from stormjib_checkpoint.verify import verify

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from torch.distributed.checkpoint.planner import SavePlan, WriteItem

pytestmark = [
    pytest.mark.filterwarnings("ignore:torch.distributed is:UserWarning"),
    pytest.mark.filterwarnings("ignore:.*synchronize_staging.*:FutureWarning"),
]

VALUES = {
    "step": 7,
    "betas": (0.9, 0.999),
    "name": "run",
    "nothing": None,
    "raw": b"\x00\xff",
    "nan": float("inf"),
}


def state(seed: int = 0) -> dict[str, Any]:
    torch.manual_seed(seed)
    return {
        "model": {
            "w": torch.randn(33, 7),
            "b": torch.randn(5, dtype=torch.float64).to(torch.bfloat16),
            "none": torch.zeros(0, 3),
            "one": torch.tensor(3),
        },
        "list": [{"t": torch.arange(4)}, {"t": torch.ones(2)}],
        "rest": dict(VALUES),
    }


def empty() -> dict[str, Any]:
    blank = state(1)
    for tensor in tensors(blank):
        tensor.zero_()
    blank["rest"] = dict.fromkeys(VALUES)
    return blank


def tensors(nested: Any) -> Iterator[torch.Tensor]:
    if isinstance(nested, torch.Tensor):
        yield nested
    elif isinstance(nested, dict):
        for _, item in sorted(nested.items()):
            yield from tensors(item)
    elif isinstance(nested, list):
        for item in nested:
            yield from tensors(item)


def equal(one: Any, other: Any) -> bool:
    mine, theirs = list(tensors(one)), list(tensors(other))
    return len(mine) == len(theirs) and all(map(torch.equal, mine, theirs))


def load(root: Path, into: dict[str, Any], **options: Any) -> dict[str, Any]:
    dcp_load(into, checkpoint_id=str(root), storage_reader=StormjibReader(**options))
    return into


def test_what_is_saved_comes_back_with_every_type(tmp_path: Path) -> None:
    save(state(), checkpoint_id=str(tmp_path), storage_writer=StormjibWriter())
    found = load(tmp_path, empty())
    assert equal(found, state())
    assert found["rest"] == VALUES
    assert type(found["rest"]["betas"]) is tuple


def test_no_file_is_or_holds_a_pickle(tmp_path: Path) -> None:
    save(state(), checkpoint_id=str(tmp_path), storage_writer=StormjibWriter())
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert {path.suffix for path in files} == {".json", ".safetensors"}
    for path in files:
        assert not zipfile.is_zipfile(path)
        if path.suffix == ".json":
            json.loads(path.read_bytes())


def test_nothing_is_unpickled_to_load(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save(state(), checkpoint_id=str(tmp_path), storage_writer=StormjibWriter())
    monkeypatch.setattr(torch, "load", refuse)
    monkeypatch.setattr(pickle, "loads", refuse)
    monkeypatch.setattr(pickle, "Unpickler", refuse)
    assert load(tmp_path, empty())["rest"] == VALUES
    with pytest.raises(AssertionError, match="unpickled"):
        torch.load(io.BytesIO())


def refuse(*_: object, **__: object) -> None:
    raise AssertionError("unpickled")


def test_a_flipped_bit_is_found_and_named(tmp_path: Path) -> None:
    save(state(), checkpoint_id=str(tmp_path), storage_writer=StormjibWriter())
    file = next(tmp_path.rglob("*.safetensors"))
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    with pytest.raises(CheckpointException, match=r"rank-00000.safetensors: bytes .* are not those"):
        load(tmp_path, empty())


@pytest.mark.parametrize("value", [object(), {1, 2}, torch.float32, 1j])
def test_what_would_need_a_pickle_is_refused_by_its_key(tmp_path: Path, value: object) -> None:
    with pytest.raises(CheckpointException, match=r"state\.rest\.odd"):
        save({"rest": {"odd": value}}, checkpoint_id=str(tmp_path), storage_writer=StormjibWriter())
    assert committed(Local(tmp_path)) == []


def test_a_folder_that_is_saved_into_again_keeps_the_step_before(tmp_path: Path) -> None:
    writer = StormjibWriter(tmp_path)
    for seed in range(3):
        save(state(seed), storage_writer=writer)
    save(state(3), checkpoint_id=str(tmp_path), storage_writer=StormjibWriter())
    assert [(point.step, point.generation) for point in committed(Local(tmp_path))][:2] == [
        (3, "0.2"),
        (2, "0.1"),
    ]
    assert equal(load(tmp_path, empty()), state(3))
    assert equal(load(tmp_path, empty(), step=2), state(2))
    with pytest.raises(CheckpointException, match="step 9 is not committed"):
        load(tmp_path, empty(), step=9)


def test_ranks_that_see_different_steps_are_told_so(tmp_path: Path) -> None:
    """One is committed between the looks of two ranks: they must not put a model together from two steps."""
    plans = []
    for seed in range(2):
        save(state(seed), storage_writer=StormjibWriter(tmp_path))
        reader = StormjibReader(tmp_path)
        reader.read_metadata()
        plans.append(reader.prepare_local_plan(LoadPlan([])))
    assert reader.prepare_global_plan(plans[:1]) == plans[:1]
    with pytest.raises(LoadError, match=r"different steps: 0 of generation 0\.1, 1 of generation 0\.2"):
        reader.prepare_global_plan(plans)


def test_files_are_those_of_the_format(tmp_path: Path) -> None:
    save(state(), checkpoint_id=str(tmp_path), storage_writer=StormjibWriter())
    storage = Local(tmp_path)
    assert [flaw for _, flaw in verify(storage, committed(storage)[0])] == [None]
    flat = {"model.w": torch.zeros(33, 7)}
    dcp_load(flat, storage_reader=HuggingFaceStorageReader(str(tmp_path / "step-00000000/g0.1")))
    assert torch.equal(flat["model.w"], state()["model"]["w"])


def test_an_engines_checkpoint_loads_and_is_proved(tmp_path: Path) -> None:
    model, optimizer = trained(steps=2)
    engine = Engine(tmp_path)
    engine.async_save(collect(model, optimizer), step=2, train={"cursor": 5})
    engine.wait()
    engine.close()
    other, _ = trained(steps=0)
    found: dict[str, Any] = {"model": other.state_dict(), "group": {"0": {"lr": 0.0}}}
    load(tmp_path, found)
    assert all(torch.equal(found["model"][name], value) for name, value in model.state_dict().items())
    assert found["group"]["0"]["lr"] == 0.1
    with_types = {"model": {"weight": torch.zeros(4, 6, dtype=torch.float64)}}
    load(tmp_path, with_types)
    assert torch.equal(with_types["model"]["weight"], model.weight.double())


def test_torchs_own_reader_loads_what_an_engine_saved_in_every_type_that_it_knows(tmp_path: Path) -> None:
    torch.manual_seed(5)
    saved = {f"of.{tag}": (100 * torch.randn(7, 3)).to(dtype) for tag, dtype in DTYPE_MAP.items()}
    engine = Engine(tmp_path)
    engine.async_save(saved, step=1)
    engine.wait()
    engine.close()
    found = {name: torch.zeros_like(value) for name, value in saved.items()}
    dcp_load(found, storage_reader=HuggingFaceStorageReader(str(tmp_path / "step-00000001/g0.1")))
    assert len(found) == 9
    assert all(torch.equal(found[name], value) for name, value in saved.items())


def test_everything_can_be_loaded_without_a_model(tmp_path: Path) -> None:
    save(state(), checkpoint_id=str(tmp_path), storage_writer=StormjibWriter())
    found = _load_state_dict_from_keys(checkpoint_id=str(tmp_path), storage_reader=StormjibReader())
    assert equal(found, state())
    assert found["rest"] == VALUES


def test_what_dcp_cannot_do_with_us_says_so(tmp_path: Path) -> None:
    writer = StormjibWriter(tmp_path)
    with pytest.raises(CheckpointException, match="enable_plan_caching"):
        save_twice(writer, DefaultSavePlanner(enable_plan_caching=True))
    with pytest.raises(SaveError, match="use_collectives"):
        save(state(), storage_writer=writer, use_collectives=False)
    assert len(committed(Local(tmp_path))) == 1


def save_twice(writer: StormjibWriter, planner: DefaultSavePlanner) -> None:
    save(state(), storage_writer=writer, planner=planner)
    save(state(), storage_writer=writer, planner=planner)


class Forgetful(DefaultSavePlanner):
    """Leaves out one tensor that it has promised."""

    def finish_plan(self, new_plan: SavePlan) -> SavePlan:
        plan = super().finish_plan(new_plan)
        return replace(plan, items=[item for item in plan.items if item.index.fqn != "model.w"])


class Broken(DefaultSavePlanner):
    def resolve_data(self, write_item: WriteItem) -> Any:
        raise OSError("the device is gone")


def test_a_tensor_that_nobody_wrote_is_noticed(tmp_path: Path) -> None:
    with pytest.raises(CheckpointException, match=r"do not hold model\.w exactly once"):
        save(state(), checkpoint_id=str(tmp_path), storage_writer=StormjibWriter(), planner=Forgetful())
    assert committed(Local(tmp_path)) == []


def test_a_save_that_fails_leaves_the_one_before_and_the_next_one_counts(tmp_path: Path) -> None:
    writer = StormjibWriter(tmp_path)
    save(state(1), storage_writer=writer)
    with pytest.raises(CheckpointException, match="the device is gone"):
        save(state(2), storage_writer=writer, planner=Broken())
    assert equal(load(tmp_path, empty()), state(1))
    save(state(3), storage_writer=writer)
    assert [point.step for point in committed(Local(tmp_path))] == [2, 0]
    assert equal(load(tmp_path, empty()), state(3))


def test_saves_into_two_folders_may_overlap(tmp_path: Path) -> None:
    writer, stager = StormjibWriter(), GatedStager()
    folders = [tmp_path / str(number) for number in range(4)]
    answers = [
        async_save(state(seed), checkpoint_id=str(folder), storage_writer=writer, async_stager=stager)
        for seed, folder in enumerate(folders)
    ]
    for answer in answers:
        assert isinstance(answer, AsyncSaveResponse)
        answer.upload_completion.result()
    stager.close()
    assert all(equal(load(folder, empty()), state(seed)) for seed, folder in enumerate(folders))


def test_nobody_said_where(tmp_path: Path) -> None:
    with pytest.raises(CheckpointException, match="checkpoint_id="):
        save(state(), storage_writer=StormjibWriter())
    with pytest.raises(CheckpointException, match="checkpoint_id="):
        dcp_load(empty(), storage_reader=StormjibReader())


def trained(steps: int) -> tuple[nn.Linear, torch.optim.Optimizer]:
    torch.manual_seed(3)
    model = nn.Linear(6, 4)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    for _ in range(steps):
        model(torch.ones(2, 6)).sum().backward()
        optimizer.step()
    return model, optimizer


def release_after(stepped: threading.Event, held: threading.Event) -> None:
    stepped.wait(0.3)
    held.set()


def test_the_optimizer_waits_for_the_copy_and_the_copy_is_of_the_call(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stager = GatedStager()
    model, optimizer = trained(steps=1)
    optimizer.step()  # now the stager knows it
    average = torch.zeros(3)
    wanted = {name: value.clone() for name, value in model.state_dict().items()}
    held, order = threading.Event(), list[str]()
    copied = stagers._copied

    def slow(tensor: torch.Tensor) -> torch.Tensor:
        if (
            threading.current_thread().name == "stormjib-stage"
        ):  # else the optimizer's, which does not wait for a busy machine
            assert held.wait(20)
        order.append("copied")
        return copied(tensor)

    monkeypatch.setattr(stagers, "_copied", slow)
    answer = async_save(
        {"model": model.state_dict(), "average": average},
        checkpoint_id=str(tmp_path),
        storage_writer=StormjibWriter(),
        async_stager=stager,
    )
    assert isinstance(answer, AsyncSaveResponse)
    order.clear()  # what nobody guards is copied in the call
    average += 1
    model(torch.ones(2, 6)).sum().backward()
    stepped = threading.Event()
    # An optimizer that does not wait has stepped by then, and before the copy.
    release = threading.Thread(target=release_after, args=(stepped, held))
    release.start()
    optimizer.step()
    order.append("stepped")
    stepped.set()
    release.join()
    answer.upload_completion.result()
    stager.close()
    assert order == ["copied", "copied", "stepped"]
    found: dict[str, Any] = {"model": trained(0)[0].state_dict(), "average": torch.full((3,), 9.0)}
    load(tmp_path, found)
    assert all(torch.equal(found["model"][name], value) for name, value in wanted.items())
    assert found["average"].tolist() == [0, 0, 0]


def test_a_change_behind_the_gate_fails_the_save(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stager = GatedStager()
    model, optimizer = trained(steps=1)
    optimizer.step()
    held = threading.Event()
    copied = stagers._copied

    def slow(tensor: torch.Tensor) -> torch.Tensor:
        assert held.wait(20)
        return copied(tensor)

    monkeypatch.setattr(stagers, "_copied", slow)
    answer = async_save(
        model.state_dict(), checkpoint_id=str(tmp_path), storage_writer=StormjibWriter(), async_stager=stager
    )
    assert isinstance(answer, AsyncSaveResponse)
    with torch.no_grad():
        model.weight.add_(1)
    held.set()
    with pytest.raises(TornCopy, match="weight changed"):
        answer.upload_completion.result()
    stager.close()
    assert not (tmp_path / "generations").exists()
