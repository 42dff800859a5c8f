"""FORMAT.md §8: what is deleted, and what never is."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fakes.disk import Disk
from fakes.training import loads, save, train
from fakes.training import plan as planned
from stormjib_checkpoint.format import GenerationFile, ResumePoint
from stormjib_checkpoint.history import committed, saves
from stormjib_checkpoint.layout import GenerationId
from stormjib_checkpoint.ledger import audit
from stormjib_checkpoint.opening import open_generation
from stormjib_checkpoint.retention import KEEP_AT_LEAST, Save, plan, retain
from stormjib_checkpoint.storage import Local

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
    assert storage.names("") == ["generations", "ledger", "step-00000030", "step-00000040", "step-00000050"]
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


@given(every=SAVES, resume=st.none() | st.integers(0, 5), keep_last=st.integers(0, 4), data=st.data())
def test_no_plan_ever_takes_what_must_stay(
    every: set[Save], resume: int | None, keep_last: int, data: st.DataObject
) -> None:
    above = resume if resume is not None else -1
    may = [
        s
        for s in every
        if (s.generation == TWO and s.step > above) or (s.generation == ONE and s.step <= above)
    ]
    good = data.draw(st.sets(st.sampled_from(may)) if may else st.just(set()))
    record = GenerationFile(TWO, ONE, "uid", None if resume is None else ResumePoint(resume, "1.1", "d"))
    gone = set(plan(every, good, record, keep_last))
    newest = sorted(good, key=lambda save: save.step, reverse=True)
    own = [save.step for save in newest if save.generation == TWO]
    assert gone <= every
    assert not gone & set(newest[: max(keep_last, KEEP_AT_LEAST)])
    assert Save(above, ONE) not in gone or resume is None
    assert not gone or own
    assert not [save for save in gone if save.generation == TWO and save.step > own[0]]
    assert plan(every - gone, good - gone, record, keep_last) == [], "a second pass finds nothing"
