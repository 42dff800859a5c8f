"""FORMAT.md §7.3, §8 where a listing lies, and where somebody reads what retention deletes."""

from __future__ import annotations

import contextlib
import random
from functools import partial
from typing import TYPE_CHECKING, Any

import pytest
import torch

from fakes.disk import Disk
from fakes.training import loads, plan, state_of, train
from fakes.watched import Call, watched
from stormjib_checkpoint.engine import Engine
from stormjib_checkpoint.errors import (
    CommitError,
    GenerationExists,
    MissingCheckpoint,
    NoUsableCheckpoint,
    Superseded,
)
from stormjib_checkpoint.history import committed, generations, saves
from stormjib_checkpoint.layout import GenerationId
from stormjib_checkpoint.ledger import audit
from stormjib_checkpoint.opening import Opening, open_generation, open_next
from stormjib_checkpoint.retention import Save, delete, retain
from stormjib_checkpoint.storage import Local

if TYPE_CHECKING:
    from collections.abc import Callable


ROOT = "/team/job"


class Lies:
    """A hook: listings leave out names and show deleted ones, by chance. `told` counts those that were not the truth."""

    def __init__(self, seed: int) -> None:
        self.told = 0
        self._chance = random.Random(seed)
        self._ever: dict[str, set[str]] = {}

    def __call__(self, call: Call, do: Callable[..., Any]) -> Any:
        if call.name != "names":
            return do(*call.arguments)
        try:
            truth = set(do(*call.arguments))
        except FileNotFoundError:
            truth = set()
        ever = self._ever.setdefault(call.path, set())
        ever |= truth
        shown = [name for name in sorted(ever) if self._chance.random() < (0.7 if name in truth else 0.3)]
        self.told += set(shown) != truth
        return shown


class Lagging:
    """A hook: listings are those of an earlier moment."""

    def __init__(self, then: Disk) -> None:
        self._then = then

    def __call__(self, call: Call, do: Callable[..., Any]) -> Any:
        return self._then.names(*call.arguments) if call.name == "names" else do(*call.arguments)


def steps_left(storage: Local) -> list[tuple[int, str]]:
    return [(step, str(generation)) for step, generation in saves(storage)]


@pytest.mark.parametrize("seed", range(8))
def test_whatever_listings_say_nothing_is_deleted_that_must_stay(seed: int) -> None:
    disk, lies = Disk(), Lies(seed)
    truth, lied_to = Local(ROOT, disk), Local(ROOT, watched(disk, lies))
    open_generation(truth, "1.1", "uid")
    train(truth, "1.1", 0, 10)
    resume = open_generation(truth, "1.2", "uid").resume
    assert resume is not None
    newest: list[int] = []
    for step in range(20, 80, 10):
        try:
            newest.append(train(lied_to, "1.2", step - 10, step).step)
        except CommitError:
            continue  # it may be held for another's: it is not committed, and told
        retain(lied_to, "1.2", 2)
        assert {*newest[-2:], resume.step} <= {point.step for point in committed(truth)}
    assert lies.told > 10
    for point in committed(truth):
        loads(truth, point)
    retain(truth, "1.2", 2)
    assert [point.step for point in committed(truth)] == [*sorted(newest[-2:], reverse=True), 10]


@pytest.mark.parametrize("number", ["1.2", "2.1"])
def test_a_zombie_that_is_not_shown_its_successor_deletes_nothing(number: str) -> None:
    """The successor resumed from the oldest step, which the zombie's own retention would take next."""
    disk = Disk()
    storage = Local(ROOT, disk)
    open_generation(storage, "1.1", "uid")
    points = [train(storage, "1.1", step - 10, step) for step in (10, 20, 30)]
    before = Disk(disk.tree.copy())
    refused = [point.digest for point in points[1:]]
    assert open_generation(storage, number, "uid", refused).resume == points[0]
    lagging = Local(ROOT, watched(disk, Lagging(before)))
    assert retain(lagging, "1.1", 2) == []
    loads(storage, points[0])
    with pytest.raises(Superseded):
        open_generation(lagging, "1.1", "uid")


def test_an_opener_that_is_not_shown_the_newest_generation_takes_the_next_number() -> None:
    disk = Disk()
    storage = Local(ROOT, disk)
    assert open_next(storage).generation == "0.1"
    before = Disk(disk.tree.copy())
    point = train(storage, "0.1", 0, 10)
    assert open_next(storage).generation == "0.2"
    lagging = Local(ROOT, watched(disk, Lagging(before)))
    assert generations(lagging) == [GenerationId(0, 1), GenerationId(0, 2)]
    with pytest.raises(GenerationExists):
        open_generation(lagging, "0.2", "uid")
    assert open_next(lagging).generation == "0.3"
    assert open_next(storage).resume == point, (
        "the newest generation's history, whatever the one before was shown"
    )


def test_deleted_steps_that_are_still_shown_do_no_harm() -> None:
    disk = Disk()
    storage = Local(ROOT, disk)
    open_generation(storage, "1.1", "uid")
    for step in (10, 20, 30):
        train(storage, "1.1", step - 10, step)
    before = Disk(disk.tree.copy())
    assert retain(storage, "1.1", 2) == ["step-00000010/g1.1"]
    lagging = Local(ROOT, watched(disk, Lagging(before)))
    assert [point.step for point in committed(lagging)] == [30, 20]
    retain(lagging, "1.1", 2)
    assert steps_left(storage) == [(20, "1.1"), (30, "1.1")]
    opening = open_generation(lagging, "1.2", "uid")
    assert opening.resume == committed(storage)[0]
    assert audit(storage).differences(plan) == []


class AtCall:
    """A hook that does something before one call of a reader, once."""

    def __init__(self, number: int, what: Callable[[], object]) -> None:
        self.fired = False
        self._number, self._what, self._seen = number, what, 0

    def __call__(self, call: Call, do: Callable[..., Any]) -> Any:
        self._seen += 1
        if self._seen == self._number:
            self.fired = True
            self._what()
        return do(*call.arguments)


def three_steps() -> Disk:
    disk = Disk()
    open_generation(Local(ROOT, disk), "1.1", "uid")
    for step in (10, 20, 30):
        train(Local(ROOT, disk), "1.1", step - 10, step)
    return disk


def test_a_step_deleted_at_any_moment_of_a_load_is_missing_and_never_damaged() -> None:
    first, number, missing, fired = three_steps(), 0, 0, True
    while fired:
        number += 1
        disk = Disk(first.tree.copy())
        storage = Local(ROOT, disk)
        point = committed(storage)[0]
        hook = AtCall(number, partial(delete, storage, Save(30, GenerationId(1, 1))))
        try:
            loads(Local(ROOT, watched(disk, hook)), point)
        except MissingCheckpoint:
            missing += 1
        fired = hook.fired
    assert missing > 10
    assert missing < number, "not deleted, or after the last read, it loads"


def test_a_load_whose_step_is_deleted_at_any_moment_goes_on_with_the_newest_there_is() -> None:
    first, number, fired, reached = three_steps(), 0, True, set()
    while fired:
        number += 3
        disk = Disk(first.tree.copy())
        hook = AtCall(number, partial(delete, Local(ROOT, disk), Save(30, GenerationId(1, 1))))
        engine = Engine(Local(ROOT, watched(disk, hook)))
        found: dict[str, Any] = {name: value.zero_() for name, value in state_of(0).items()}
        train_record = engine.load(found)
        engine.close()
        assert train_record is not None
        reached.add(train_record["step"])
        assert all(torch.equal(found[name], value) for name, value in state_of(train_record["step"]).items())
        fired = hook.fired
    assert reached == {20, 30}


def test_a_generation_opened_at_any_moment_of_an_older_ones_retention_keeps_what_it_resumed_from() -> None:
    """It has refused the newest two, and resumes from the one that is about to be deleted. Between the last look for a higher
    generation and the deletion itself, which is one call, nobody can tell."""
    first, number, fired, lost = three_steps(), 0, True, 0
    while fired:
        number += 1
        disk = Disk(first.tree.copy())
        storage = Local(ROOT, disk)
        refused = [point.digest for point in committed(storage)[:2]]
        opened: list[Opening] = []

        def open_it(
            storage: Local = storage, refused: list[str] = refused, opened: list[Opening] = opened
        ) -> None:
            with contextlib.suppress(NoUsableCheckpoint):  # it was deleted before
                opened.append(open_next(storage, "", refused))

        hook = AtCall(number, open_it)
        retain(Local(ROOT, watched(disk, hook)), "1.1", 2)
        for opening in opened:
            assert opening.resume is not None
            lost += opening.resume not in committed(storage)
        fired = hook.fired
    assert number > 20
    assert lost == 1
