"""FORMAT.md §8: what is deleted, and what never is."""

from __future__ import annotations

import errno
import os
import sys
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fakes.disk import Disk
from fakes.training import WORLD, loads, save, train
from fakes.training import plan as planned
from fakes.watched import Call, Failing, watched
from stormjib_checkpoint.errors import StorageError
from stormjib_checkpoint.format import GenerationFile, ResumePoint
from stormjib_checkpoint.history import committed, saves
from stormjib_checkpoint.layout import GenerationId
from stormjib_checkpoint.ledger import audit
from stormjib_checkpoint.opening import open_generation
from stormjib_checkpoint.retention import (
    KEEP_AT_LEAST,
    Known,
    Retention,
    Save,
    delete,
    plan,
    rest_s,
    retain,
    to_prove,
)
from stormjib_checkpoint.storage import Local

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

ONE, TWO = GenerationId(1, 1), GenerationId(1, 2)


@pytest.fixture
def storage() -> Local:
    storage = Local("/job", Disk())
    open_generation(storage, "1.1", "uid")
    return storage


def left(storage: Local) -> list[tuple[int, str]]:
    return [(step, str(generation)) for step, generation in saves(storage)]


def test_the_newest_stay_and_the_ledger_stays_whole(storage: Local) -> None:
    """§6.3, §8.1"""
    for step in range(10, 60, 10):
        train(storage, "1.1", step - 10, step)
    assert retain(storage, "1.1", 3) == ["step-00000010/g1.1", "step-00000020/g1.1"]
    assert left(storage) == [(30, "1.1"), (40, "1.1"), (50, "1.1")]
    assert storage.names("") == [
        "generations",
        "hints",
        "ledger",
        "step-00000030",
        "step-00000040",
        "step-00000050",
    ]
    assert retain(storage, "1.1", 3) == []
    found = audit(storage)
    assert (found.differences(planned), found.gaps(), found.problems) == ([], [], ())


@pytest.mark.parametrize("keep_last", [0, 1, 2])
def test_two_good_steps_always_stay(storage: Local, keep_last: int) -> None:
    """§8.1"""
    for step in (10, 20, 30):
        train(storage, "1.1", step - 10, step)
    retain(storage, "1.1", keep_last)
    assert left(storage) == [(20, "1.1"), (30, "1.1")]


def test_the_resume_step_stays_as_long_as_its_generation_runs(storage: Local) -> None:
    train(storage, "1.1", 0, 10)
    open_generation(storage, "1.2", "uid")
    for step in (20, 30, 40, 50):
        train(storage, "1.2", step - 10, step)
    retain(storage, "1.2", 2)
    assert left(storage) == [(10, "1.1"), (40, "1.2"), (50, "1.2")]
    open_generation(storage, "1.3", "uid")
    train(storage, "1.3", 50, 60)
    retain(storage, "1.3", 2)
    assert left(storage) == [(50, "1.2"), (60, "1.3")]


def test_a_generation_that_learns_of_a_higher_one_deletes_nothing(storage: Local) -> None:
    """§8.1"""
    for step in (10, 20, 30):
        train(storage, "1.1", step - 10, step)
    open_generation(storage, "1.2", "uid")
    assert retain(storage, "1.1", 2) == []
    assert len(left(storage)) == 3


def test_a_new_generation_judges_nobody_before_its_first_commit(storage: Local) -> None:
    """§8.2"""
    for step in (10, 20, 30):
        train(storage, "1.1", step - 10, step)
    open_generation(storage, "1.2", "uid")
    assert retain(storage, "1.2", 2) == []
    train(storage, "1.1", 30, 40)  # a zombie's
    train(storage, "1.2", 30, 40)
    assert retain(storage, "1.2", 2) == ["step-00000010/g1.1", "step-00000020/g1.1", "step-00000040/g1.1"]
    for point in committed(storage):
        loads(storage, point)


def test_unfinished_saves_stay_while_they_may_become_a_commit(storage: Local) -> None:
    """§8.2"""
    save(storage, "1.1", 0, 10)
    train(storage, "1.1", 10, 20)
    save(storage, "1.1", 20, 30)
    retain(storage, "1.1", 2)
    assert left(storage) == [(20, "1.1"), (30, "1.1")]


def test_deleting_stops_between_two_saves_when_a_higher_generation_comes(
    storage: Local, monkeypatch: pytest.MonkeyPatch
) -> None:
    for step in range(10, 60, 10):
        train(storage, "1.1", step - 10, step)
    remove_folder = storage.remove_folder

    def overtaken(folder: str) -> None:
        remove_folder(folder)
        monkeypatch.setattr(storage, "remove_folder", remove_folder)
        open_generation(storage, "1.2", "other")

    monkeypatch.setattr(storage, "remove_folder", overtaken)
    assert retain(storage, "1.1", 2) == ["step-00000010/g1.1"]
    assert left(storage)[0] == (20, "1.1")


SAVES = st.sets(st.builds(Save, st.integers(0, 12), st.sampled_from([ONE, TWO])), max_size=16)


@st.composite
def situations(draw: st.DrawFn) -> tuple[set[Save], set[Save], GenerationFile, int, Known]:
    """What lies there, what is committed in the history, the record of the generation, how many to keep, what is known by reading."""
    every, resume = draw(SAVES), draw(st.none() | st.integers(0, 5))
    above = resume if resume is not None else -1
    may = [
        s
        for s in every
        if (s.generation == TWO and s.step > above) or (s.generation == ONE and s.step <= above)
    ]
    good = draw(st.sets(st.sampled_from(may)) if may else st.just(set()))
    read = {save: draw(st.sampled_from(["whole", "flawed", "unread"])) for save in sorted(good, key=step_of)}
    kinds = {word: {save for save, found in read.items() if found == word} for word in ("whole", "flawed")}
    known = Known(kinds["whole"], kinds["flawed"])
    record = GenerationFile(TWO, ONE, "uid", None if resume is None else ResumePoint(resume, "1.1", "d"))
    return every, good, record, draw(st.integers(0, 4)), replace(known, reading=to_prove(good, known))


def step_of(save: Save) -> int:
    return save.step


@given(situation=situations())
def test_no_plan_ever_takes_what_must_stay(
    situation: tuple[set[Save], set[Save], GenerationFile, int, Known],
) -> None:
    every, good, record, keep_last, known = situation
    gone = set(plan(every, good, record, keep_last, known))
    newest = sorted(good - {*known.flawed}, key=step_of, reverse=True)
    own = [save.step for save in good if save.generation == TWO]
    whole = [save for save in newest if save in known.whole][:2]
    assert gone <= every
    assert not gone & {*newest[: max(keep_last, KEEP_AT_LEAST)], *whole, known.reading}
    assert record.resume is None or Save(record.resume.step, ONE) not in gone
    assert not gone or own
    assert not [save for save in gone if save.generation == TWO and save.step > max(own)]
    left = replace(known, whole={*known.whole} - gone, flawed={*known.flawed} - gone)
    assert plan(every - gone, good - gone, record, keep_last, left) == [], "a second pass finds nothing"


@given(situation=situations())
def test_few_stay_and_none_goes_for_ones_that_nobody_has_proved_unless_there_are_many(
    situation: tuple[set[Save], set[Save], GenerationFile, int, Known],
) -> None:
    every, good, record, keep_last, known = situation
    gone = set(plan(every, good, record, keep_last, known))
    whole = [save for save in sorted(good, key=step_of, reverse=True) if save in known.whole]
    keep = max(keep_last, KEEP_AT_LEAST)
    if any(save.generation == TWO for save in good):
        assert len(good - gone - {*known.flawed}) <= keep + 4
    if len(whole) < KEEP_AT_LEAST and len(good - {*known.flawed}) <= keep + 1:
        assert not gone & good
    assert all(len(whole) >= 2 and save.step < whole[1].step for save in gone & {*known.flawed})


@given(situation=situations())
def test_what_is_proved_next_is_one_of_the_last_two_sound_ones(
    situation: tuple[set[Save], set[Save], GenerationFile, int, Known],
) -> None:
    _, good, _, _, known = situation
    last = sorted(good - {*known.flawed}, key=step_of, reverse=True)[:KEEP_AT_LEAST]
    unread = [save for save in last if save not in known.whole]
    assert to_prove(good, known) == (unread[0] if unread else None)


class Reads:
    """A hook: how many bytes of data files were read, and what a cache would have hidden: a file that is damaged on the medium is read as
    it was, until the cache is told to forget it."""

    def __init__(self) -> None:
        self.bytes = 0
        self.cached: dict[str, bytes] = {}

    def __call__(self, call: Call, do: Callable[..., Any]) -> Any:
        if call.name == "forget":
            self.cached.pop(call.path, None)
        if not call.is_a("read_into", "*.safetensors"):
            return do(*call.arguments)
        done = do(*call.arguments)
        self.bytes += done
        if call.path in self.cached:
            _, buffer, offset = call.arguments
            buffer[:done] = self.cached[call.path][offset : offset + done]
        return done


def settle(retention: Retention) -> None:
    while retention.busy:
        retention.work()


def damage(disk: Disk, step: int) -> bytes:
    """A flipped byte of a data file; what it held before."""
    path = f"/job/step-{step:08d}/g1.1/rank-00001.safetensors"
    before = disk.content(path)
    disk.damage(path, before[:-1] + bytes([before[-1] ^ 1]))
    return before


def test_the_last_two_are_read_once_from_the_medium_before_an_older_one_goes() -> None:
    """§8.4"""
    disk, reads = Disk(), Reads()
    storage = Local("/job", watched(disk, reads))
    open_generation(storage, "1.1", "uid")
    retention = Retention(storage, print)
    sizes = []
    for step in (10, 20, 30):
        train(storage, "1.1", step - 10, step)
        sizes.append(sum(len(disk.content(f"/job/{path}")) for path in data_files(step)))
        retention.ask("1.1", 2)
        if step == 30:
            retention.work()
            assert len(left(storage)) == 3, "20 is proved, 30 is not"
        settle(retention)
        assert reads.bytes == sum(sizes)
    assert [step for step, _ in left(storage)] == [20, 30]
    retention.ask("1.1", 2)
    settle(retention)
    assert reads.bytes == sum(sizes), "what is proved is not read again"


def data_files(step: int) -> list[str]:
    return [f"step-{step:08d}/g1.1/rank-{rank:05d}.safetensors" for rank in range(WORLD)]


def test_damage_that_the_page_cache_hides_is_found_and_the_older_good_ones_stay() -> None:
    """§8.4: the damaged step counts for nothing, and is deleted when two newer ones are proved."""
    disk, reads, told = Disk(), Reads(), list[str]()
    storage = Local("/job", watched(disk, reads))
    open_generation(storage, "1.1", "uid")
    retention = Retention(storage, told.append)
    for step in (10, 20, 30):
        train(storage, "1.1", step - 10, step)
        if step == 30:
            reads.cached["/job/" + data_files(30)[1]] = damage(disk, 30)
        retention.ask("1.1", 2)
        settle(retention)
    assert [step for step, _ in left(storage)] == [10, 20, 30]
    assert len(told) == 1
    assert "step 30 of 1.1 is damaged" in told[0]
    train(storage, "1.1", 30, 40)
    retention.ask("1.1", 2)
    settle(retention)
    assert [step for step, _ in left(storage)] == [20, 30, 40]
    train(storage, "1.1", 40, 50)
    retention.ask("1.1", 2)
    settle(retention)
    assert [step for step, _ in left(storage)] == [40, 50]
    assert len(told) == 1


@pytest.mark.parametrize("slices", [0, 1, 2])
def test_steps_that_come_faster_than_they_can_be_read_do_not_pile_up(storage: Local, slices: int) -> None:
    """§8.4: those in between go, and two proved ones stay."""
    retention = Retention(storage, print)
    for step in range(10, 400, 10):
        train(storage, "1.1", step - 10, step)
        retention.ask("1.1", 2)
        for _ in range(1 + slices):
            retention.work()
        assert len(left(storage)) <= 2 + 4
    settle(retention)
    assert [step for step, _ in left(storage)] == [380, 390]


def test_a_step_that_cannot_be_read_for_now_is_neither_good_nor_bad(storage: Local) -> None:
    """The medium says nothing of it (the network is away): nothing is told, nothing deleted, and the next commit has it read again."""
    for step in (10, 20, 30):
        train(storage, "1.1", step - 10, step)
    failing = Failing("read_into", "*.safetensors", errno.ETIMEDOUT)
    told: list[str] = []
    retention = Retention(Local("/job", watched(storage._files, failing)), told.append)
    retention.ask("1.1", 2)
    with pytest.raises(StorageError):
        settle(retention)
    assert failing.fired == 1
    assert not retention.busy
    assert len(left(storage)) == 3
    retention.ask("1.1", 2)
    settle(retention)
    assert [step for step, _ in left(storage)] == [20, 30]
    assert told == []


def test_one_that_is_deleted_while_it_is_read_is_no_damage(storage: Local) -> None:
    train(storage, "1.1", 0, 10)
    train(storage, "1.1", 10, 20)
    told: list[str] = []
    retention = Retention(storage, told.append)
    retention.ask("1.1", 2)
    retention.work()
    delete(storage, Save(20, ONE))
    settle(retention)
    assert told == []


def test_a_disk_is_left_alone_for_nineteen_times_as_long_as_it_was_read() -> None:
    assert rest_s(0.01) == pytest.approx(0.19)
    assert rest_s(0.0) == 0.0


def test_deleting_by_hand_proves_the_newest_two_first() -> None:
    """§8.4: `stormjib ckpt gc`, of many, and the newest is damaged."""
    disk, told = Disk(), list[str]()
    storage = Local("/job", disk)
    open_generation(storage, "1.1", "uid")
    for step in range(10, 90, 10):
        train(storage, "1.1", step - 10, step)
    damage(disk, 80)
    retain(storage, "1.1", 2, tell=told.append)
    assert [step for step, _ in left(storage)] == [60, 70, 80]
    assert len(told) == 1


def test_what_clocks_say_of_files_does_not_count(tmp_path: Path) -> None:
    """§8.5: the newest step looks as old as can be, and the oldest as if it were of tomorrow."""
    storage = Local(tmp_path)
    open_generation(storage, "1.1", "uid")
    for step in (10, 20, 30):
        train(storage, "1.1", step - 10, step)
    for path in tmp_path.rglob("*"):
        os.utime(path, (0, 0) if "step-00000030" in str(path) else (4e9, 4e9))
    retain(storage, "1.1", 2)
    assert [step for step, _ in left(storage)] == [20, 30]


def test_where_hashes_cannot_be_compared_it_is_told_once_and_the_oldest_two_stay(
    storage: Local, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The agent's Python is another than that of the ranks, and lacks what they hash with."""
    monkeypatch.setitem(sys.modules, "stormjib_checkpoint.verify", None)
    told: list[str] = []
    retention = Retention(storage, told.append)
    for step in range(10, 80, 10):
        train(storage, "1.1", step - 10, step)
        retention.ask("1.1", 2)
        settle(retention)
    assert [step for step, _ in left(storage)] == [10, 20, 60, 70]
    assert len(told) == 1
    assert "no step can be proved here" in told[0]
