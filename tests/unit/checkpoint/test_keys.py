"""FORMAT.md §10: with a key, no record is made or changed by anybody without it; and what a key does not do."""

from __future__ import annotations

import hashlib
import hmac
import json
import shutil
import subprocess
import sys
from typing import TYPE_CHECKING, Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner

from fakes.saving import commit_states, save_rank
from fakes.training import WORLD, loads, save, train
from stormjib_checkpoint.commands import app
from stormjib_checkpoint.commit import commit_step
from stormjib_checkpoint.doubts import doubt_of, write_doubt
from stormjib_checkpoint.engine import Engine
from stormjib_checkpoint.errors import (
    BadKey,
    DamagedCheckpoint,
    FormatError,
    Inconsistent,
)
from stormjib_checkpoint.format import DoubtFile, GenerationFile, ResumePoint, TrainFile
from stormjib_checkpoint.history import history, newest, write_generation
from stormjib_checkpoint.keys import KEY_FILE, from_environment
from stormjib_checkpoint.layout import GenerationId
from stormjib_checkpoint.opening import open_generation
from stormjib_checkpoint.records import canonical, decode, encode, sha256
from stormjib_checkpoint.storage import Local
from stormjib_checkpoint.verify import verify

if TYPE_CHECKING:
    from pathlib import Path

KEY, OTHER = b"k" * 32, b"o" * 32
RECORDS = ["MANIFEST.json", "atoms.json", "train.json", "rank-00000.json", "rank-00001.json"]


def job(root: Path, key: bytes | None = KEY) -> ResumePoint:
    storage = Local(root, key=key)
    open_generation(storage, "1.1", "uid")
    return train(storage, "1.1", 0, 10)


def test_every_record_is_signed_over_all_else_that_it_says(tmp_path: Path) -> None:
    """§10.1"""
    job(tmp_path)
    write_doubt(Local(tmp_path, key=KEY), DoubtFile(GenerationId(1, 1), 10, 5, {}))
    files = [path for path in tmp_path.rglob("*.json")]
    assert len(files) == len(RECORDS) + 3
    for path in files:
        record = json.loads(path.read_bytes())
        signature = record.pop("hmac")
        assert signature == hmac.new(KEY, canonical(record), hashlib.sha256).hexdigest(), path.name


def test_who_has_the_key_writes_equal_bytes(tmp_path: Path) -> None:
    """§10.1"""
    one = job(tmp_path / "one")
    assert one == job(tmp_path / "other")
    assert one != job(tmp_path / "another key", OTHER)
    assert commit_step(Local(tmp_path / "one", key=KEY), "1.1", WORLD, 10) == one


@pytest.mark.parametrize("key", [KEY, None])
def test_what_is_signed_loads_with_the_key_and_without_any(tmp_path: Path, key: bytes | None) -> None:
    """§10.2"""
    loads(Local(tmp_path, key=key), job(tmp_path))


@pytest.mark.parametrize(("wrote", "message"), [(None, "has no HMAC"), (OTHER, "another HMAC")])
def test_a_reader_with_a_key_refuses_what_is_not_signed_with_it(
    tmp_path: Path, wrote: bytes | None, message: str
) -> None:
    """§10.2, §10.5"""
    point, storage = job(tmp_path, wrote), Local(tmp_path, key=KEY)
    with pytest.raises(DamagedCheckpoint, match=message):
        loads(storage, point)
    with pytest.raises(DamagedCheckpoint, match=message):
        open_generation(storage, "1.2", "uid")
    with pytest.raises(DamagedCheckpoint, match=message):
        history(storage, GenerationId(1, 1))


def forged(path: Path, key: bytes | None, **change: Any) -> None:
    """The record changed, and every digest that leads to it made anew, as somebody can who can write files."""
    record = json.loads(path.read_bytes()) | change
    record.pop("hmac", None)
    path.write_bytes(
        canonical(
            record
            if key is None
            else record | {"hmac": hmac.new(key, canonical(record), "sha256").hexdigest()}
        )
    )
    if path.name != "MANIFEST.json":
        manifest = path.parent / "MANIFEST.json"
        files = json.loads(manifest.read_bytes())["files"] | {path.name: sha256(path.read_bytes())}
        forged(manifest, key, files=files)


@pytest.mark.parametrize("name", RECORDS[1:])
@pytest.mark.parametrize("key", [None, OTHER])
def test_a_forged_record_is_found_with_a_key_and_only_then(
    tmp_path: Path, name: str, key: bytes | None
) -> None:
    """§2.4, §10.2, §10.3: the forger has made all digests anew, the resume point's too."""
    job(tmp_path)
    folder = tmp_path / "step-00000010" / "g1.1"
    forged(folder / name, key, color="red")
    point = ResumePoint(10, "1.1", sha256((folder / "MANIFEST.json").read_bytes()))
    loads(Local(tmp_path), point)
    with pytest.raises(DamagedCheckpoint, match="HMAC"):
        loads(Local(tmp_path, key=KEY), point)


def test_a_committer_with_a_key_signs_nothing_that_a_rank_has_not_signed(tmp_path: Path) -> None:
    """§10.2: else whoever can write files could have a step signed."""
    storage = Local(tmp_path, key=KEY)
    open_generation(storage, "1.1", "uid")
    save(Local(tmp_path), "1.1", 0, 10)
    with pytest.raises(Inconsistent, match=r"rank-00000\.json has no HMAC"):
        commit_step(storage, "1.1", WORLD, 10)
    assert newest(storage) is None


@pytest.mark.parametrize(
    ("forge", "message"),
    [
        (lambda data: canonical({k: v for k, v in json.loads(data).items() if k != "hmac"}), "has no HMAC"),
        (lambda data: data.replace(b'"step":10}', b'"step":11}'), "has another HMAC"),
        (lambda _: encode(TrainFile(9, GenerationId(1, 1), {}), KEY), r"is of step 9 of 1\.1"),
        (lambda data: data[:-9], "is no JSON of ours"),
    ],
)
def test_a_committer_looks_at_what_the_trainer_left_too(tmp_path: Path, forge: Any, message: str) -> None:
    """§5.1, §10.2"""
    storage = Local(tmp_path, key=KEY)
    open_generation(storage, "1.1", "uid")
    save(storage, "1.1", 0, 10)
    path = tmp_path / "step-00000010/g1.1/train.json"
    path.write_bytes(forge(path.read_bytes()))
    with pytest.raises(Inconsistent, match=rf"train\.json {message}"):
        commit_step(storage, "1.1", WORLD, 10)
    assert newest(storage) is None


def test_a_committer_without_the_key_leaves_a_signed_step_as_it_is(tmp_path: Path) -> None:
    """§10.1: all committers of a job need the key."""
    point = job(tmp_path)
    assert commit_step(Local(tmp_path), "1.1", WORLD, 10) == point
    manifest = tmp_path / "step-00000010" / "g1.1" / "MANIFEST.json"
    manifest.unlink()
    with pytest.raises(Inconsistent, match=r"atoms\.json is there with other content"):
        commit_step(Local(tmp_path), "1.1", WORLD, 10)


def test_generations_and_doubts_cannot_be_forged(tmp_path: Path) -> None:
    """§10.3"""
    job(tmp_path)
    own = GenerationId(1, 1)
    write_doubt(Local(tmp_path), DoubtFile(own, 10, 5, {}))
    with pytest.raises(FormatError, match=r"g1\.1\.json has no HMAC"):
        doubt_of(Local(tmp_path, key=KEY), own)
    write_generation(Local(tmp_path), GenerationFile(GenerationId(9, 9), own, "evil", None))
    with pytest.raises(DamagedCheckpoint, match=r"g9\.9\.json has no HMAC"):
        newest(Local(tmp_path, key=KEY))


@pytest.mark.parametrize("name", RECORDS)
def test_a_true_record_of_another_step_does_not_pass_for_this_one(tmp_path: Path, name: str) -> None:
    """§10.3"""
    job(tmp_path)
    storage = Local(tmp_path, key=KEY)
    twenty = train(storage, "1.1", 10, 20)
    ten, other = (tmp_path / f"step-000000{step}" / "g1.1" / name for step in (10, 20))
    shutil.copy(ten, other)
    with pytest.raises(DamagedCheckpoint):
        for _ in verify(storage, twenty):
            pass
    if not name.startswith("rank-"):  # which a load has no use for
        with pytest.raises(DamagedCheckpoint):
            loads(storage, twenty)
    if name == "MANIFEST.json":
        with pytest.raises(DamagedCheckpoint, match=r"is that of step 10 of 1\.1"):
            loads(storage, ResumePoint(20, "1.1", sha256(other.read_bytes())))


def test_what_a_key_does_not_do(tmp_path: Path) -> None:
    """§10.4: a newest step that is taken away is not missed."""
    ten, storage = job(tmp_path), Local(tmp_path, key=KEY)
    train(storage, "1.1", 10, 20)
    shutil.rmtree(tmp_path / "step-00000020")
    assert open_generation(storage, "1.2", "uid").resume == ten


def test_the_ledger_is_proved_by_its_manifest(tmp_path: Path) -> None:
    """§6.2, §10.4"""
    job(tmp_path)
    manifest = json.loads((tmp_path / "step-00000010/g1.1/MANIFEST.json").read_bytes())
    (segment,) = tmp_path.glob("ledger/g1.1/*")
    assert manifest["ledger"]["sha256"] == sha256(segment.read_bytes())


# --- where the key comes from -----------------------------------------------------------------------------------------


@pytest.fixture
def key_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    path = tmp_path / "key"
    path.write_bytes(KEY)
    monkeypatch.setenv(KEY_FILE, str(path))
    return path


@pytest.mark.usefixtures("key_file")
def test_engine_and_commands_take_the_key_from_the_environment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = Engine(tmp_path / "job")
    engine.async_save({"w": torch.zeros(3)}, step=1)
    engine.close()
    assert engine.storage.key == KEY
    assert newest(Local(tmp_path / "job", key=KEY)) is not None
    done = CliRunner().invoke(app, ["verify", str(tmp_path / "job")])
    assert (done.exit_code, "is whole" in done.output) == (0, True)
    monkeypatch.delenv(KEY_FILE)
    commit_states(Local(tmp_path / "unsigned"), {"w": torch.zeros(3)})
    monkeypatch.setenv(KEY_FILE, str(tmp_path / "key"))
    done = CliRunner().invoke(app, ["verify", str(tmp_path / "unsigned")])
    assert done.exit_code == 1
    assert "has no HMAC" in done.output


def test_the_agents_child_commits_with_the_key_of_its_environment(tmp_path: Path, key_file: Path) -> None:
    root = tmp_path / "job"
    storage = Local(root, key=KEY)
    open_generation(storage, "1.1", "uid")
    for rank in range(2):
        save_rank(
            storage,
            step=1,
            generation="1.1",
            rank=rank,
            world=2,
            state={"w": torch.zeros(3)},
            train={},
            samples={},
        )
    request = (
        '{"id":1,"do":"commit","generation":"1.1","world":2,"step":1,"keep_last":2}\n{"id":2,"do":"scan"}\n'
    )

    def child(key: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", "stormjib_checkpoint.child", str(root)],
            check=False, input=request, capture_output=True, text=True, timeout=30, env={KEY_FILE: key},
        )  # fmt: skip

    assert "which cannot be read" in child(str(tmp_path / "nowhere")).stderr
    assert newest(storage) is None
    assert child(str(key_file)).returncode == 0
    point = newest(storage)
    assert point is not None
    manifest = json.loads((root / "step-00000001/g1.1/MANIFEST.json").read_bytes())
    assert len(manifest["hmac"]) == 64


def test_a_key_that_is_no_key_is_refused_at_once(tmp_path: Path, key_file: Path) -> None:
    """§10.1"""
    with pytest.raises(BadKey, match=r"key has 3 bytes; at least 16"):
        Local(tmp_path, key=b"abc")
    key_file.write_bytes(b"")
    with pytest.raises(BadKey, match=r"key has 0 bytes"):
        Engine(tmp_path / "job")
    key_file.unlink()
    with pytest.raises(
        BadKey, match=r"STORMJIB_CHECKPOINT_KEY_FILE names .*key, which cannot be read: No such file"
    ):
        from_environment()
    assert not (tmp_path / "job").exists()


@given(st.binary(max_size=80))
def test_a_hostile_signature_is_refused_and_nothing_else_happens(noise: bytes) -> None:
    record = encode(GenerationFile(GenerationId(1, 1), None, "uid", None))
    for data in (record[:-2] + b',"hmac":' + noise + b"}\n", record[:-2] + b"," + noise + b"}\n", noise):
        with pytest.raises(FormatError):
            decode(GenerationFile, data, "file", KEY)
