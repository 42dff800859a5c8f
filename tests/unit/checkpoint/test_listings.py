"""FORMAT.md §7.3, §8 where a listing lies, and where somebody reads what retention deletes."""

from __future__ import annotations

import contextlib
import errno
import json
import random
from functools import partial
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch.distributed.checkpoint.planner import LoadPlan
from typer.testing import CliRunner

from fakes.disk import Disk
from fakes.training import WORLD, loads, plan, state_of, train
from fakes.watched import Call, Failing, watched
from stormjib_checkpoint import commands
from stormjib_checkpoint.commit import commit_step
from stormjib_checkpoint.dcp import StormjibReader
from stormjib_checkpoint.engine import Engine
from stormjib_checkpoint.errors import (
    CommitError,
    DamagedCheckpoint,
    GenerationExists,
    MissingCheckpoint,
    NoUsableCheckpoint,
    Superseded,
)
from stormjib_checkpoint.hints import hinted
from stormjib_checkpoint.history import at_newest, committed, generations, saves
from stormjib_checkpoint.layout import GenerationId
from stormjib_checkpoint.ledger import audit
from stormjib_checkpoint.opening import Opening, open_generation, open_next
from stormjib_checkpoint.retention import Save, delete, retain
from stormjib_checkpoint.storage import Local
from stormjib_checkpoint.verify import verify

if TYPE_CHECKING:
    from collections.abc import Callable

    from stormjib_checkpoint.format import ResumePoint


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


def newest_loaded(storage: Local) -> int:
    """An evaluation job: the step that it has loaded, every value of which is right."""

    def use(point: ResumePoint) -> int:
        loads(storage, point)
        return point.step

    return at_newest(storage, use)


def read_by_dcp(storage: Local) -> int:
    """The step that DCP's reader takes, all whose small files are proved."""
    reader = StormjibReader(storage)
    reader.read_metadata()
    plan = reader.prepare_local_plan(LoadPlan([]))
    return int(plan.storage_data.step)


def verified(storage: Local) -> int:
    """The step that `stormjib ckpt verify` has found whole."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(commands, "_storage", lambda *_: storage)
        done = CliRunner().invoke(commands.app, ["verify", "job", "--json"])
    found = json.loads(done.output)
    assert (done.exit_code, found["damage"]) == (0, {})
    return int(found["step"])


@pytest.mark.parametrize("use", [newest_loaded, read_by_dcp, verified])
def test_a_reader_outside_the_job_starts_over_at_the_newest_step_there_is(
    use: Callable[[Local], int],
) -> None:
    """§7.3: whatever it was reading when the step was deleted, it ends with a whole one."""
    first, number, fired, reached = three_steps(), 0, True, set()
    while fired:
        number += 1
        disk = Disk(first.tree.copy())
        hook = AtCall(number, partial(delete, Local(ROOT, disk), Save(30, GenerationId(1, 1))))
        reached.add(use(Local(ROOT, watched(disk, hook))))
        fired = hook.fired
    assert reached == {20, 30}


def test_a_step_that_was_named_is_not_changed_for_another() -> None:
    disk = three_steps()
    fired = AtCall(12, partial(delete, Local(ROOT, disk), Save(30, GenerationId(1, 1))))
    with pytest.raises(MissingCheckpoint, match="step 30"):
        StormjibReader(Local(ROOT, watched(disk, fired)), step=30).read_metadata()
    assert fired.fired


def test_a_proof_of_a_step_that_is_deleted_meanwhile_finds_no_damage() -> None:
    """§7.3: with the manifest gone it is missing; where only a data file is, it is damaged."""
    first, number, fired, missing = three_steps(), 0, True, 0
    while fired:
        number += 1
        disk = Disk(first.tree.copy())
        point = committed(Local(ROOT, disk))[0]
        hook = AtCall(number, partial(delete, Local(ROOT, disk), Save(30, GenerationId(1, 1))))
        try:
            assert {flaw for _, flaw in verify(Local(ROOT, watched(disk, hook)), point)} == {None}
        except MissingCheckpoint:
            missing += 1
        fired = hook.fired
    assert missing > 10
    storage = Local(ROOT, first)
    storage.remove("step-00000030/g1.1", ["rank-00001.safetensors"])
    with pytest.raises(DamagedCheckpoint, match=r"rank-00001\.safetensors is missing although"):
        list(verify(storage, point))
    with pytest.raises(DamagedCheckpoint, match=r"rank-00001\.safetensors"):
        at_newest(storage, lambda point: loads(storage, point))


def test_a_reader_that_misses_the_newest_twice_is_told_so() -> None:
    """No endless loop where a step is there and what it is used for is not."""

    def never(point: ResumePoint) -> None:
        raise MissingCheckpoint(f"{point.step} again")

    with pytest.raises(MissingCheckpoint, match="30 again"):
        at_newest(Local(ROOT, three_steps()), never)
    with pytest.raises(MissingCheckpoint, match="no step is committed"):
        at_newest(Local("/empty", Disk()), never)


def no_step_listed(call: Call, do: Callable[..., Any]) -> Any:
    """A hook: no listing shows anything but the generations."""
    hidden = call.name == "names" and not call.path.endswith("/generations")
    return [] if hidden else do(*call.arguments)


def test_the_newest_steps_are_found_where_no_step_is_listed() -> None:
    """§3.8"""
    disk = three_steps()
    blind = Local(ROOT, watched(disk, no_step_listed))
    assert list(saves(blind)) == []
    assert committed(blind) == committed(Local(ROOT, disk))
    point = open_generation(blind, "1.2", "uid").resume
    assert point is not None
    assert point.step == 30
    assert committed(blind)[0] == point, "what a generation resumed from is known by name, too"
    train(blind, "1.2", 30, 40)
    assert [point.step for point in committed(blind)] == [40, 30, 20, 10]
    assert audit(Local(ROOT, disk)).differences(plan) == [], "each segment begins after the step before"


@pytest.mark.parametrize(
    "lie",
    [
        b"",
        b"\0" * 300,
        b'{"format":"1.0","generation":"1.1","requires":[],"steps":[-1]}\n',
        b'{"format":"1.0","generation":"1.2","requires":[],"steps":[30]}\n',
        b'{"format":"1.0","generation":"1.1","requires":[],"steps":[20,99,5000000000000]}\n',
    ],
)
def test_a_hint_is_never_believed(lie: bytes) -> None:
    """§3.8: torn, of another generation, of steps that nobody has committed; the next commit writes it anew."""
    disk = three_steps()
    storage = Local(ROOT, disk)
    before = committed(storage)
    storage.replace("hints/g1.1.json", lie)
    assert committed(storage) == before
    train(storage, "1.1", 30, 40)
    assert hinted(storage, GenerationId(1, 1)) == (10, 20, 30, 40)
    assert open_generation(storage, "1.2", "uid").resume == committed(storage)[0]


def test_a_commit_counts_where_its_hint_cannot_be_written() -> None:
    disk = three_steps()
    fault = Failing("rename", "*hints*", errno.ENOSPC)
    point = train(Local(ROOT, watched(disk, fault)), "1.1", 30, 40)
    assert fault.fired == 1
    storage = Local(ROOT, disk)
    assert committed(storage)[0] == point
    assert storage.names("hints") == ["g1.1.json"]
    assert hinted(storage, GenerationId(1, 1)) == (10, 20, 30)
    assert commit_step(storage, "1.1", WORLD, 40) == point
    assert hinted(storage, GenerationId(1, 1)) == (10, 20, 30, 40), "whoever repeats it mends it"


def test_a_hint_names_no_more_than_the_newest_few() -> None:
    storage = Local(ROOT, Disk())
    open_generation(storage, "1.1", "uid")
    for step in range(1, 20):
        train(storage, "1.1", step - 1, step)
    assert hinted(storage, GenerationId(1, 1)) == tuple(range(4, 20))
