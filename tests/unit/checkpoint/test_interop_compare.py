"""`stormjib ckpt diff | cat | export | import | layouts`: what people see."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from fakes.interop import commit, opened, save_trained
from stormjib_checkpoint.commands import app
from stormjib_checkpoint.errors import ExportRefused, StateMismatch
from stormjib_checkpoint.interop.compare import differences, facts, to_npy
from stormjib_checkpoint.tensors import ABSENT

if TYPE_CHECKING:
    from pathlib import Path

BASE: dict[str, Any] = {
    "model.w": torch.arange(12.0).reshape(3, 4),
    "model.n": torch.tensor([float("nan"), -0.0]),
    "optim.w": ABSENT,
    "group.0.lr": 0.1,
}


def run(*arguments: object) -> tuple[int, str]:
    done = CliRunner().invoke(app, [str(argument) for argument in arguments])
    return done.exit_code, done.output


def found(tmp_path: Path, other: dict[str, Any]) -> dict[str, str]:
    commit(tmp_path / "one", BASE, {}, world=2)
    commit(tmp_path / "two", other, {}, world=3)
    return dict(differences(opened(tmp_path / "one"), opened(tmp_path / "two")))


def test_equal_steps_do_not_differ_on_any_number_of_ranks(tmp_path: Path) -> None:
    assert (
        found(tmp_path, {name: v.clone() if isinstance(v, torch.Tensor) else v for name, v in BASE.items()})
        == {}
    )


def test_every_kind_of_difference_is_told_by_name(tmp_path: Path) -> None:
    other = BASE["model.w"].clone()
    other[0, 1] += 1
    other[2, 3] = -0.0
    assert found(
        tmp_path,
        {"model.w": other, "model.n": BASE["model.n"].half(), "group.0.lr": 0.2, "group.0.eps": 1, "optim.w.m": torch.ones(1)},
    ) == {
        "group.0.eps": "missing in the first, a value in the second",
        "group.0.lr": "0.1 in the first, 0.2 in the second",
        "model.n": "F32 [2] in the first, F16 [2] in the second",
        "model.w": "2 of 12 elements differ",
        "optim.w": "absent in the first, missing in the second",
        "optim.w.m": "missing in the first, F32 [1] in the second",
    }  # fmt: skip


def test_a_zero_with_a_sign_and_a_true_differ_from_those_without(tmp_path: Path) -> None:
    other = BASE | {"model.n": torch.tensor([float("nan"), 0.0]), "group.0.lr": 0.1}
    assert found(tmp_path, other) == {"model.n": "1 of 2 elements differ"}
    commit(tmp_path / "a", {"x": 1}, {})
    commit(tmp_path / "b", {"x": True}, {})
    assert list(differences(opened(tmp_path / "a"), opened(tmp_path / "b"))) == [
        ("x", "1 in the first, True in the second")
    ]


def test_what_a_tensor_is_like(tmp_path: Path) -> None:
    commit(
        tmp_path / "job",
        BASE | {"e": torch.zeros(0, 3), "c": torch.tensor([1 + 2j]), "s": torch.tensor(5)},
        {},
    )
    checkpoint = opened(tmp_path / "job")
    told = facts(checkpoint, "model.w")
    assert told[:3] == ("F32", (3, 4), [float(i) for i in range(8)])
    assert told[3:7] == (0, 0.0, 11.0, 5.5)
    assert told.norm == pytest.approx(506**0.5)
    assert facts(checkpoint, "model.n")[3:] == (1, 0.0, 0.0, 0.0, 0.0)
    assert facts(checkpoint, "e") == ("F32", (0, 3), [], 0, None, None, None, None)
    assert facts(checkpoint, "c").head == [1 + 2j]
    assert facts(checkpoint, "s").head == [5]
    with pytest.raises(StateMismatch, match="there is no tensor x"):
        facts(checkpoint, "x")


@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.float64, torch.int64, torch.bool, torch.bfloat16, torch.uint8]
)
@pytest.mark.parametrize("shape", [(3, 4), (), (0, 2), (7,)])
def test_a_numpy_file_holds_the_tensor(tmp_path: Path, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    tensor = (torch.arange(torch.Size(shape).numel()) % 5).reshape(shape).to(dtype)
    commit(tmp_path / "job", {"x": tensor}, {})
    to_npy(opened(tmp_path / "job"), "x", tmp_path / "x.npy")
    read = np.load(tmp_path / "x.npy")
    assert read.shape == shape
    assert (read == tensor.to(torch.float32 if dtype is torch.bfloat16 else dtype).numpy()).all()


def test_a_type_that_numpy_lacks_is_refused(tmp_path: Path) -> None:
    commit(tmp_path / "job", {"x": torch.ones(2).to(torch.float8_e4m3fn)}, {})
    with pytest.raises(ExportRefused, match="x is F8_E4M3, which numpy does not have"):
        to_npy(opened(tmp_path / "job"), "x", tmp_path / "x.npy")
    assert not (tmp_path / "x.npy").exists()


@pytest.mark.filterwarnings("ignore")  # torch's own, of DCP's metadata
@pytest.mark.parametrize("kind", ["hf", "dcp", "deepspeed-ucp"])
def test_out_and_in_by_command(tmp_path: Path, kind: str) -> None:
    job, back, out = tmp_path / "job", tmp_path / "back", tmp_path / "out"
    save_trained(job)
    assert run("export", job, out, "--to", kind) == (0, f"step 12 of generation 0.1 is in {out}\n")
    code, text = run("import", out, back, "--from", kind, "--step", 12, "--world", 2)
    assert (code, text.endswith("tensors are step 12 of generation 0.1\n")) == (0, True)
    assert run("verify", back)[0] == 0
    code, text = run("diff", job, back, "--json")
    told = json.loads(text)
    assert code == (1 if told else 0)
    weights = [name for name in told if name.startswith("model.")]
    assert not weights, "of these nothing may change"
    if kind == "hf":
        assert {why.split(" in ")[-2].split(", ")[-1] for why in told.values()} == {"missing"}
    else:
        assert {name.rpartition(".")[2] for name in told if name.startswith("optim.")} == {"step"}


def test_diff_and_cat_say_it_to_people(tmp_path: Path) -> None:
    save_trained(tmp_path / "job")
    code, text = run("diff", tmp_path / "job", tmp_path / "job", "--step", 12)
    assert (code, text) == (0, "63 tensors and 0 values are the same\n")
    code, text = run("cat", tmp_path / "job", "model.norm.weight")
    assert code == 0
    assert text.splitlines()[:2] == ["dtype    F32", "shape    (16,)"]
    assert json.loads(run("cat", tmp_path / "job", "model.norm.weight", "--json")[1])["nans"] == 0
    assert run("cat", tmp_path / "job", "model.norm.weight", "--npy", tmp_path / "x.npy")[0] == 0
    assert np.load(tmp_path / "x.npy").shape == (16,)
    code, text = run("cat", tmp_path / "job", "model.nothing")
    assert (code, text.startswith("StateMismatch: there is no tensor model.nothing")) == (1, True)


def test_layouts_shows_what_would_be_done_and_why_not_else() -> None:
    asked = (
        "layouts",
        "--nodes",
        4,
        "--ranks",
        2,
        "--parameters",
        8e9,
        "--layers",
        32,
        "--heads",
        32,
        "--allow",
        4,
        "--allow",
        3,
    )
    code, text = run(*asked, "--tp", 1, "--tp", 3)
    assert code == 0
    lines = [line.split() for line in text.splitlines()]
    assert lines[1][:4] == ["4", "Stay", "pp1.dp1.fsdp8.tp1", "4"]
    assert lines[2][:4] == ["3", "Shrink", "pp1.dp1.fsdp6.tp1", "3"]
    assert "  4 nodes, pp1.dp1.fsdp1.tp1: 3 of them live" in text
    assert "tensor groups of 3 do not fit into nodes of 2 ranks" in text
    rows = json.loads(run(*asked, "--json")[1])
    assert [row["action"] for row in rows] == ["Stay", "Shrink", "Wait"]
    assert rows[1]["best"]["transition"]["store"] == 32_000_000_000
