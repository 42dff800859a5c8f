"""`stormjib ckpt`: what people see."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import pytest
import torch
from typer.testing import CliRunner

from fakes.meshes import Mesh, held
from fakes.saving import commit_states, save_parts
from fakes.training import save, train
from stormjib_checkpoint.commands import app
from stormjib_checkpoint.commit import commit_step
from stormjib_checkpoint.layout import GenerationId
from stormjib_checkpoint.opening import open_generation, open_next
from stormjib_checkpoint.storage import Local
from stormjib_checkpoint.writer import Part

if TYPE_CHECKING:
    from pathlib import Path


@pytest.fixture
def root(tmp_path: Path) -> Path:
    storage = Local(tmp_path)
    open_generation(storage, "1.1", "uid")
    train(storage, "1.1", 0, 10)
    open_generation(storage, "1.2", "uid")
    train(storage, "1.1", 10, 20)
    train(storage, "1.2", 10, 12)
    return tmp_path


def run(*words: object) -> tuple[int, str]:
    done = CliRunner().invoke(app, [str(word) for word in words])
    return done.exit_code, done.output


def test_ls_tells_living_steps_from_a_zombies(root: Path) -> None:
    code, text = run("ls", root)
    assert code == 0
    rows = [line.split(maxsplit=4) for line in text.splitlines()[1:]]
    assert [(row[0], row[1], row[4].strip()) for row in rows] == [
        ("10", "1.1", "committed"),
        ("12", "1.2", "committed"),
        ("20", "1.1", "committed, but in no living history"),
    ]


def test_show_names_tensors_and_refuses_steps_that_do_not_exist(root: Path) -> None:
    code, text = run("show", root)
    assert code == 0
    assert "step 12 of generation 1.2" in text
    assert "model.a" in text
    assert "3x4" in text
    assert "scalar" in text
    code, text = run("show", root, "--step", 20)
    assert code == 2
    assert "there are: 12, 10" in text


def test_show_tells_ties_absent_states_and_values(tmp_path: Path) -> None:
    weight = torch.zeros(2)
    commit_states(Local(tmp_path), {"emb": weight, "head": weight, "optim.emb": ..., "betas": (0.9, 0.99)})
    code, text = run("show", tmp_path)
    assert code == 0
    rows = [line.split() for line in text.splitlines()]
    assert ["head", "is", "emb"] in rows
    assert ["optim.emb", "absent"] in rows
    assert "betas = {'$tuple': [0.9, 0.99]}" in text
    shown = json.loads(run("show", tmp_path, "--json")[1])
    assert (shown["ties"], shown["absent"]) == ({"head": "emb"}, ["optim.emb"])


def test_show_tells_ranks_that_follow_each_other_as_one(tmp_path: Path) -> None:
    storage, mesh, atom = Local(tmp_path), Mesh((5,), (0,)), torch.arange(10.0)
    open_generation(storage, "1.1", "uid")
    for rank, (box, primary) in enumerate(mesh.boxes((10,))):
        parts = [held("w", atom, box, primary)]
        save_parts(storage, Part(1, GenerationId(1, 1), rank, mesh.world), parts, {}, {}, {})
    commit_step(storage, "1.1", mesh.world, 1)
    assert ["w", "F32", "10", "0-4"] in [line.split() for line in run("show", tmp_path)[1].splitlines()]
    assert json.loads(run("show", tmp_path, "--json")[1])["tensors"]["w"]["ranks"] == [0, 1, 2, 3, 4]


def test_verify_finds_a_flipped_bit(root: Path) -> None:
    assert run("verify", root)[0] == 0
    path = root / "step-00000012" / "g1.2" / "rank-00001.safetensors"
    data = bytearray(path.read_bytes())
    data[100] ^= 4
    path.write_bytes(data)
    code, text = run("verify", root)
    assert code == 1
    assert "rank-00001.safetensors" in text
    assert run("verify", root, "--step", 10)[0] == 0


def test_audit_counts_the_living_history_only(root: Path) -> None:
    code, text = run("audit", root)
    told = "12 steps up to 12, 48 samples, 0 of them more than once, 0 changes of the number of ranks"
    assert (code, text.splitlines()[0]) == (0, told)
    assert "no cursor says what should have been fed" in text
    segment = root / "ledger" / "g1.2" / "00000011-00000012.jsonl"
    segment.write_bytes(segment.read_bytes().replace(b"11", b"99", 1))
    code, text = run("audit", root)
    assert code == 1
    assert "SHA-256" in text
    assert "no samples written down for steps [11]" in text


def test_what_is_listed_shown_and_proved_comes_as_json_too(root: Path) -> None:
    rows = json.loads(run("ls", root, "--json")[1])
    assert [(row["step"], row["world"], row["state"]) for row in rows][:2] == [
        (10, 2, "committed"),
        (12, 2, "committed"),
    ]
    shown = json.loads(run("show", root, "--json")[1])
    assert (shown["step"], shown["generation"]) == (12, "1.2")
    assert shown["tensors"]["model.a"] == {"dtype": "F32", "shape": [3, 4], "ranks": [0]}
    assert json.loads(run("verify", root, "--json")[1])["damage"] == {}
    path = root / "step-00000012" / "g1.2" / "rank-00001.safetensors"
    path.write_bytes(path.read_bytes()[:-1] + b"~")
    code, text = run("verify", root, "--json")
    assert code == 1
    assert list(json.loads(text)["damage"]) == ["step-00000012/g1.2/rank-00001.safetensors"]


def test_finish_commits_what_a_dead_job_left_complete(root: Path) -> None:
    storage = Local(root)
    save(storage, "1.2", 12, 14)
    save(storage, "1.2", 14, 16)
    (root / "step-00000016/g1.2/rank-00001.json").unlink()
    code, text = run("finish", root)
    assert code == 0
    assert "committed: 14" in text
    assert "given up: step-00000016/g1.2: rank-00001.json not written yet" in text
    assert run("finish", root)[1].splitlines()[-1] == "committed: nothing new"


def test_gc_deletes_what_the_job_would(root: Path) -> None:
    storage = Local(root)
    for step in (14, 16):
        train(storage, "1.2", step - 2, step)
    before = run("ls", root)[1]
    code, text = run("gc", root, "--dry-run")
    assert (code, text.splitlines()[-1]) == (0, "2 saves would be deleted")
    assert run("ls", root)[1] == before
    code, text = run("gc", root)
    assert code == 0
    assert text.splitlines() == ["step-00000012/g1.2", "step-00000020/g1.1", "2 saves deleted"]
    assert run("gc", root, "--keep", 1)[0] == 2


def test_finish_gc_and_audit_come_as_json_too(root: Path) -> None:
    storage = Local(root)
    save(storage, "1.2", 12, 14)
    save(storage, "1.2", 14, 16)
    (root / "step-00000016/g1.2/rank-00001.json").unlink()
    found = json.loads(run("finish", root, "--json")[1])
    assert found["committed"] == [14]
    assert ["rank-00001.json not written yet" in why for why in found["given_up"]] == [True]
    counts = json.loads(run("audit", root, "--json")[1])
    numbers = {"steps": 14, "last": 14, "samples": 56, "twice": 0, "reshapes": 0}
    assert counts == numbers | {"planned": False, "gaps": [], "unplanned": [], "problems": []}
    train(storage, "1.2", 16, 18)
    old = ["step-00000012/g1.2", "step-00000016/g1.2", "step-00000020/g1.1"]
    assert json.loads(run("gc", root, "--dry-run", "--json")[1]) == {"dry_run": True, "deleted": old}
    found = json.loads(run("gc", root, "--json")[1])
    assert found == {"dry_run": False, "deleted": old}
    segment = root / "ledger" / "g1.2" / "00000013-00000014.jsonl"
    segment.unlink()
    code, text = run("audit", root, "--json")
    assert code == 1
    assert json.loads(text)["gaps"] == [13, 14]


def test_who_looks_sees_how_far_it_is(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    storage = Local(root)
    save(storage, "1.2", 12, 14)
    for command in ("verify", "finish", "gc"):
        assert CliRunner().invoke(app, [command, str(root)]).stderr == "", "nobody looks"
    for step in (14, 16):
        train(storage, "1.2", step, step + 2)
    save(storage, "1.2", 18, 20)
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TERM", "xterm")
    for command, word in (("verify", "reading"), ("finish", "committing"), ("gc", "deleting")):
        done = CliRunner().invoke(app, [command, str(root)])
        assert (done.exit_code, word in done.stderr) == (0, True)


def test_errors_are_one_line(root: Path) -> None:
    (root / "generations" / "g1.2.json").write_text("{}")
    code, text = run("ls", root)
    assert code == 1
    assert text.startswith("DamagedCheckpoint: generations/g1.2.json has no format")
    assert run("ls", root / "nothing")[0] == 2


def test_plan_tells_what_a_load_would_read_and_reads_nothing(tmp_path: Path) -> None:
    """What is told is what is read: `fakes.reshard_table` compares the two for every row of its table."""
    storage = Local(tmp_path)
    generation = open_next(storage).generation
    for rank, (box, primary) in enumerate(Mesh((4,), (0,)).boxes((64, 6000))):
        parts = [held("model.w", torch.randn(64, 6000), box, primary)]
        save_parts(storage, Part(1, GenerationId.parse(generation), rank, 4), parts, {}, {}, {})
    commit_step(storage, generation, 4, 1)
    for data in tmp_path.rglob("*.safetensors"):
        data.unlink()
    code, text = run("plan", tmp_path, "--to", "dp3", "--json")
    told = json.loads(text)
    assert (code, told["bytes"]) == (0, 1_536_000)
    assert [rank["storage"] for rank in told["ranks"]] == [528_000, 528_000, 480_000]
    whole = json.loads(run("plan", tmp_path, "--to", "rep4", "--json")[1])
    assert sum(rank["storage"] for rank in whole["ranks"]) == 1_536_000, "read once for all four"
    near = json.loads(run("plan", tmp_path, "--to", "dp4", "--near", "2", "--json")[1])
    assert [(rank["storage"], rank["memory"]) for rank in near["ranks"]] == [
        (384_000, 0),
        (384_000, 0),
        (0, 384_000),
        (384_000, 0),
    ]
    assert "1.000 of each byte, in 6 requests" in run("plan", tmp_path, "--to", "dp3")[1]


@pytest.mark.parametrize(
    ("to", "why"),
    [("dp0", "'dp0' is no axis with a size"), ("dp2.dp3", "comes twice"), ("tp2", "axis tp"), ("7", "'7'")],
)
def test_plan_refuses_axes_that_it_does_not_understand(root: Path, to: str, why: str) -> None:
    code, text = run("plan", root, "--to", to)
    assert code == 1
    assert "SpecError" in text
    assert why in text


def test_plan_with_a_spec_of_ones_own(tmp_path: Path) -> None:
    storage = Local(tmp_path)
    commit_states(storage, {"model.w": torch.randn(64, 6000)})
    spec = tmp_path / "spec.json"
    spec.write_text(
        '{"axes": ["tp"], "sizes": {"unit": null}, "rules": [{"match": "w", "shard": [{"tp": 1, "unit": "unit"}]}]}'
    )
    code, text = run("plan", tmp_path, "--to", "tp3", "--spec", spec, "--size", "unit=2", "--json")
    assert code == 0
    assert sum(rank["storage"] for rank in json.loads(text)["ranks"]) == 1_536_000
    code, text = run("plan", tmp_path, "--to", "tp3", "--spec", spec, "--size", "unit")
    assert (code, "--size unit is not of the form NAME=NUMBER" in text) == (1, True)


def test_equal_tensors_have_one_digest_on_however_many_ranks_they_were_saved(tmp_path: Path) -> None:
    """§12.8"""
    atom, found = torch.randn(6, 4), []
    for number, (world, values) in enumerate([(1, atom), (3, atom), (3, atom + 1)]):
        storage = Local(tmp_path / str(number))
        generation = open_next(storage).generation
        for rank, (box, primary) in enumerate(Mesh((world,), (0,)).boxes((6, 4))):
            who = Part(1, GenerationId.parse(generation), rank, world)
            save_parts(storage, who, [held("model.w", values, box, primary)], {}, {}, {})
        commit_step(storage, generation, world, 1)
        found.append(json.loads(run("show", tmp_path / str(number), "--json")[1])["tensors_digest"])
    assert found[0] == found[1] != found[2]
    assert found[0] in run("show", tmp_path / "0")[1]
