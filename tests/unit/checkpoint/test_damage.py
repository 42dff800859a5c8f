"""FORMAT.md §7: whatever is damaged is found, named, and the step before still loads."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from fakes.training import loads, state_of, train
from stormjib_checkpoint.errors import DamagedCheckpoint, LoadError, MissingCheckpoint, StateMismatch
from stormjib_checkpoint.format import ResumePoint
from stormjib_checkpoint.layout import GenerationId
from stormjib_checkpoint.opening import open_generation
from stormjib_checkpoint.reader import load
from stormjib_checkpoint.retention import Save, delete
from stormjib_checkpoint.storage import Local
from stormjib_checkpoint.verify import verify


@pytest.fixture
def run(tmp_path: Path) -> tuple[Local, Path, ResumePoint, ResumePoint]:
    storage = Local(tmp_path)
    open_generation(storage, "1.1", "uid")
    ten, twenty = train(storage, "1.1", 0, 10), train(storage, "1.1", 10, 20)
    return storage, tmp_path / "step-00000020" / "g1.1", ten, twenty


Run = tuple[Local, Path, ResumePoint, ResumePoint]


def test_damage_names_the_tensors_it_took(run: Run) -> None:
    storage, folder, _, twenty = run
    owner = next(p for p in sorted(folder.glob("*.safetensors")) if b"model.a" in p.read_bytes())
    data = bytearray(owner.read_bytes())
    data[-1] ^= 1
    owner.write_bytes(data)
    with pytest.raises(DamagedCheckpoint, match=r"model\.a"):
        loads(storage, twenty)
    found = [path for path, flaw in verify(storage, twenty) if flaw is not None]
    assert found == [f"step-00000020/g1.1/{owner.name}"]


def test_a_damaged_step_is_refused_and_the_one_before_is_taken(run: Run) -> None:
    storage, folder, ten, twenty = run
    data = bytearray((folder / "rank-00000.safetensors").read_bytes())
    data[-1] ^= 1
    (folder / "rank-00000.safetensors").write_bytes(data)
    assert open_generation(storage, "1.2", "uid").resume == twenty, "only reading every byte can tell"
    with pytest.raises(LoadError):
        loads(storage, twenty)
    assert open_generation(storage, "1.3", "uid", refused=[twenty.digest]).resume == ten
    loads(storage, ten)


def test_a_step_deleted_while_it_is_read_is_missing_and_not_damaged(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    """§7.3"""
    storage, _, _, twenty = run
    opened = storage.open

    def racing(path: str) -> object:
        if path.endswith(".safetensors"):
            monkeypatch.setattr(storage, "open", opened)
            delete(storage, Save(20, GenerationId(1, 1)))
        return opened(path)

    monkeypatch.setattr(storage, "open", racing)
    with pytest.raises(MissingCheckpoint):
        loads(storage, twenty)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"model.c": torch.zeros(1)},
            r"tensor model\.c is not in the checkpoint; the nearest there is model\.",
        ),
        ({"model.a": None}, r"scalar model\.a|tensor model\.a of the checkpoint is not in the state"),
        ({"model.a": torch.zeros(4, 3)}, r"model\.a is F32 \[3, 4\] in the checkpoint, F32 \[4, 3\]"),
        ({"model.b": torch.zeros(5)}, r"model\.b is BF16 \[5\] in the checkpoint, F32"),
        ({"group.0.lr": 1}, r"scalar group\.0\.lr is not in the checkpoint"),
    ],
)
def test_what_does_not_fit_is_refused_before_a_byte_is_filled(
    run: Run, change: dict[str, object], message: str
) -> None:
    """§7.2"""
    storage, _, _, twenty = run
    state: dict[str, object] = {name: torch.zeros_like(value) for name, value in state_of(0).items()}
    with pytest.raises(StateMismatch, match=message):
        load(storage, twenty, state | change)
    assert not any(value.any() for value in state.values() if isinstance(value, torch.Tensor))
