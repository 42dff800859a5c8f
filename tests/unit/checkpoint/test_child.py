"""The checkpoint child: its protocol, its patience, and that nothing it is told kills it."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from typing import TYPE_CHECKING, Any, cast

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fakes.disk import Disk
from fakes.training import WORLD, loads, save, train
from fakes.watched import Call, watched
from stormjib_checkpoint.child import MAX_REQUEST, Child, Lines
from stormjib_checkpoint.commit import WAIT_S
from stormjib_checkpoint.format import ResumePoint
from stormjib_checkpoint.history import saves
from stormjib_checkpoint.retention import rest_s
from stormjib_checkpoint.storage import Local

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def storage() -> Local:
    return Local("/job", Disk())


@pytest.fixture
def told() -> list[str]:
    return []


def ask(child: Child, **request: Any) -> list[dict[str, Any]]:
    return child.handle(json.dumps(request).encode())


def commit(child: Child, identity: int, step: int, generation: str = "1.1") -> list[dict[str, Any]]:
    return ask(child, id=identity, do="commit", generation=generation, world=WORLD, step=step, keep_last=2)


def settle(child: Child) -> None:
    """Until no old step is to be deleted and no new one to be proved."""
    while child.busy:
        assert child.poll() == []


def test_scan_open_commit(storage: Local) -> None:
    child = Child(storage, print)
    assert ask(child, id=1, do="scan") == [{"id": 1, "storage": None}]
    opened = ask(child, id=2, do="open", generation="1.1", parent=None, job_uid="uid", refused=[])
    assert opened == [{"id": 2, "resume": None, "notes": []}]
    save(storage, "1.1", 0, 10)
    assert commit(child, 3, 10) == []
    (answer,) = child.poll()
    point = ResumePoint(**answer["committed"])
    assert (answer["id"], point.step) == (3, 10)
    loads(storage, point)
    assert ask(child, id=4, do="scan") == [{"id": 4, "storage": {"generation": "1.1", "job_uid": "uid"}}]
    again = ask(child, id=5, do="open", generation="1.2", parent="1.1", job_uid="uid", refused=[])
    assert again[0]["resume"] == answer["committed"]
    with_nothing_left = ask(child, id=6, do="open", generation="1.3", job_uid="u", refused=[point.digest])
    assert with_nothing_left[0]["kind"] == "NoUsableCheckpoint"


def test_a_commit_waits_without_holding_up_anything(storage: Local) -> None:
    child = Child(storage, print)
    ask(child, id=1, do="open", generation="1.1", job_uid="uid")
    commit(child, 2, 10)
    assert child.busy
    assert child.poll() == []
    assert ask(child, id=3, do="scan")[0]["storage"]["generation"] == "1.1"
    save(storage, "1.1", 0, 10)
    assert [answer["id"] for answer in child.poll()] == [2]
    settle(child)
    assert not child.busy


def test_commits_that_come_together_are_done_in_order(storage: Local) -> None:
    child = Child(storage, print)
    ask(child, id=1, do="open", generation="1.1", job_uid="uid")
    commit(child, 2, 20)
    commit(child, 3, 10)
    save(storage, "1.1", 0, 10)
    save(storage, "1.1", 10, 20)
    assert [(a["id"], a["committed"]["step"]) for a in child.poll()] == [(3, 10), (2, 20)]


def test_a_rank_that_never_saves_is_named_and_the_next_step_is_committed_meanwhile(storage: Local) -> None:
    clock = Clock()
    child = Child(storage, print, clock)
    ask(child, id=1, do="open", generation="1.1", job_uid="uid")
    commit(child, 2, 10)
    commit(child, 3, 20)
    save(storage, "1.1", 10, 20)
    assert [answer["id"] for answer in child.poll()] == [3]
    clock.now = WAIT_S - 0.1
    assert child.poll() == []
    clock.now = WAIT_S
    (late,) = child.poll()
    assert (late["id"], late["kind"]) == (2, "Incomplete")
    assert "rank-00000.json" in late["error"]


def test_old_steps_are_deleted_after_a_commit_and_after_its_answer(storage: Local) -> None:
    child = Child(storage, print)
    ask(child, id=1, do="open", generation="1.1", job_uid="uid")
    for step in (10, 20, 30):
        save(storage, "1.1", step - 10, step)
        commit(child, step, step)
        assert child.poll()[0]["committed"]["step"] == step
        if step == 30:
            assert len(list(saves(storage))) == 3
        settle(child)
    assert [step for step, _ in saves(storage)] == [20, 30]


def test_a_step_is_proved_in_slices_that_hold_up_nothing_and_leave_the_disk_alone(storage: Local) -> None:
    """Between two slices nineteen times as long passes as the one took, and a commit that comes meanwhile is answered at once."""
    clock = Clock()
    reads: list[float] = []

    def slow(call: Call, do: Callable[..., Any]) -> Any:
        if call.is_a("read_into", "*.safetensors"):
            reads.append(clock.now)
            clock.now += 1.0
        return do(*call.arguments)

    child = Child(Local("/job", watched(storage._files, slow)), print, clock)
    ask(child, id=1, do="open", generation="1.1", job_uid="uid")
    save(storage, "1.1", 0, 10)
    commit(child, 2, 10)
    while not reads:
        child.poll()
    save(storage, "1.1", 10, 20)
    commit(child, 3, 20)
    assert child.poll()[0]["committed"]["step"] == 20
    for _ in range(100):
        assert child.poll() == []
    assert len(reads) == 1, "it rests"
    clock.now = 1.0 + rest_s(1.0)
    while len(reads) < 2:
        assert child.poll() == []
    assert reads[1] == pytest.approx(20.0)


def test_a_damaged_step_is_told_and_older_ones_stay(storage: Local, told: list[str]) -> None:
    child = Child(storage, told.append)
    ask(child, id=1, do="open", generation="1.1", job_uid="uid")
    for step in (10, 20, 30, 40):
        save(storage, "1.1", step - 10, step)
        if step == 40:
            path = "/job/step-00000040/g1.1/rank-00001.safetensors"
            disk = cast("Disk", storage._files)
            disk.damage(path, disk.content(path)[:-1] + b"?")
        commit(child, step, step)
        child.poll()
        settle(child)
    assert [step for step, _ in saves(storage)] == [20, 30, 40]
    assert len(told) == 1
    assert "step 40 of 1.1 is damaged" in told[0]
    assert "rank-00001.safetensors" in told[0]


def test_a_damaged_step_that_is_passed_over_is_told(storage: Local) -> None:
    told: list[str] = []
    child = Child(storage, told.append)
    ask(child, id=1, do="open", generation="1.1", job_uid="uid")
    ten, _ = train(storage, "1.1", 0, 10), train(storage, "1.1", 10, 20)
    storage.remove("step-00000020/g1.1", ["train.json"])
    (answer,) = ask(child, id=2, do="open", generation="1.2", job_uid="uid")
    assert answer["resume"]["digest"] == ten.digest
    assert answer["notes"] == told
    assert "step 20 of 1.1 passed over" in told[0]


def test_a_commit_counts_also_when_deleting_fails(storage: Local, monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[str] = []
    child = Child(storage, told.append)
    ask(child, id=1, do="open", generation="1.1", job_uid="uid")
    for step in (10, 20):
        train(storage, "1.1", step - 10, step)
    save(storage, "1.1", 20, 30)

    def refuse(folder: str, names: object) -> None:
        raise PermissionError(13, "denied")

    monkeypatch.setattr(storage, "remove", refuse)
    commit(child, 2, 30)
    assert child.poll()[0]["committed"]["step"] == 30
    settle(child)
    assert "old steps are not deleted" in told[0]
    assert "denied" in told[0]


BAD: list[tuple[bytes, str]] = [
    (b"", "no JSON"),
    (b"null", "wanted an object"),
    (b"{}", "id is None"),
    (b'{"id":"x","do":"scan"}', "wanted int"),
    (b'{"id":1}', "wanted scan, open, commit, adopt or adopt_copies"),
    (b'{"id":1,"do":"format c:"}', "wanted scan, open, commit, adopt or adopt_copies"),
    (b'{"id":1,"do":["scan"]}', "wanted scan, open, commit, adopt or adopt_copies"),
    (b'{"id":1,"do":"open"}', "open lacks generation"),
    (b'{"id":1,"do":"open","generation":"1.1","job_uid":7}', "wanted str"),
    (b'{"id":1,"do":"open","generation":"../x","job_uid":""}', "INCARNATION.NUMBER"),
    (b'{"id":1,"do":"open","generation":"1.1","job_uid":"\\ud800"}', "Unicode|surrogates"),
    (b'{"id":1,"do":"commit","generation":"1.1","world":0,"step":1,"keep_last":1}', "world of 0"),
    (b'{"id":1,"do":"commit","generation":"1.1","world":10000000000,"step":1,"keep_last":1}', "world of"),
    (b'{"id":1,"do":"commit","generation":"1.1","world":1,"step":-1,"keep_last":1}', "step is -1"),
    (b"[" * 50_000, "no JSON"),
    (b"\xff" * 10, "no JSON"),
]


@pytest.mark.parametrize(("line", "message"), BAD)
def test_a_bad_request_is_answered(storage: Local, line: bytes, message: str) -> None:
    (answer,) = Child(storage, print).handle(line)
    assert re.search(message, answer["error"]), answer
    assert answer["kind"] == "FormatError"
    json.dumps(answer).encode()


@given(st.binary(max_size=120))
def test_noise_is_answered(line: bytes) -> None:
    (answer,) = Child(Local("/job", Disk()), print).handle(line)
    assert "error" in answer


def test_commit_of_a_generation_that_nobody_opened(storage: Local) -> None:
    child = Child(storage, print)
    save(storage, "1.1", 0, 10)
    commit(child, 1, 10)
    assert child.poll()[0]["kind"] == "UnknownGeneration"


def test_lines_are_cut_whole_and_a_flood_is_skipped() -> None:
    lines = Lines()
    assert list(lines.feed(b'{"a"')) == []
    assert list(lines.feed(b":1}\n\n{}\n{")) == [b'{"a":1}', b"{}"]
    assert list(lines.feed(b"x" * (MAX_REQUEST + 1))) == [b"{" + b"x" * 63]
    assert list(lines.feed(b"x" * (MAX_REQUEST + 1))) == []
    assert list(lines.feed(b"tail\n{}\n")) == [b"{}"]


def test_as_a_process_it_answers_until_its_input_ends(tmp_path: Path) -> None:
    storage = Local(tmp_path / "team" / "job")
    requests = [line for line, _ in BAD if line] + [
        b'{"id":1,"do":"open","generation":"1.1","parent":null,"job_uid":"uid","refused":[]}',
        b'{"id":2,"do":"open","generation":"1.1","parent":null,"job_uid":"uid","refused":[]}',
        b'{"id":3,"do":"commit","generation":"1.1","world":2,"step":10,"keep_last":2}',
        b'{"id":4,"do":"scan"}',
    ]
    with subprocess.Popen(
        [sys.executable, "-m", "stormjib_checkpoint.child", str(storage.root)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    ) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdin.write(b"\n".join(requests) + b"\n")
        process.stdin.flush()
        answers = [json.loads(process.stdout.readline()) for _ in range(len(requests) - 1)]
        assert answers[-1] == {"id": 4, "storage": {"generation": "1.1", "job_uid": "uid"}}
        assert answers[-2]["kind"] == "GenerationExists"
        save(storage, "1.1", 0, 10)
        committed = json.loads(process.stdout.readline())
        assert (committed["id"], committed["committed"]["step"]) == (3, 10)
        process.stdin.close()
        assert process.wait(timeout=20) == 0
        assert process.stderr.read() == b""
    loads(storage, ResumePoint(**committed["committed"]))
