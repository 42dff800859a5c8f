"""Faults of the file system under a save, a commit, retention and a load: told, and no other step is harmed."""

from __future__ import annotations

import contextlib
import errno
from typing import TYPE_CHECKING, Any

import pytest

from fakes import training
from fakes.disk import Disk
from fakes.lives import SOON_S, begin, load, next_life, save, tidied
from fakes.watched import Call, Failing, watched
from stormjib_checkpoint.engine import Engine
from stormjib_checkpoint.engine import arena as arenas
from stormjib_checkpoint.errors import NoUsableCheckpoint, StorageError, StorageFull
from stormjib_checkpoint.history import committed, saves
from stormjib_checkpoint.ledger import audit
from stormjib_checkpoint.opening import Opening, open_generation, open_next
from stormjib_checkpoint.retention import retain
from stormjib_checkpoint.storage import Local

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from fakes.watched import Hook

ROOT = "/team/job"
DATA, RECORD, MANIFEST = "*rank-00000.safetensors*", "*rank-00000.json*", "*MANIFEST.json*"


@pytest.fixture(autouse=True)
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(arenas, "PIECE_BYTES", 8192)


class Switch:
    """A hook that can be changed on the way; at first it does nothing."""

    hook: Hook = staticmethod(lambda call, do: do(*call.arguments))

    def __call__(self, call: Call, do: Callable[..., Any]) -> Any:
        return self.hook(call, do)


@pytest.fixture
def disk() -> Disk:
    return Disk()


@pytest.fixture
def switch() -> Switch:
    return Switch()


@pytest.fixture
def engine(disk: Disk, switch: Switch) -> Iterator[Engine]:
    """One that has saved steps 1 and 2."""
    one = Engine(Local(ROOT, watched(disk, switch)))
    assert [save(one, step) for step in (1, 2)] == [None, None]
    yield one
    one.close()


SPOILING = [
    ("mkdir", "*step-00000003*", errno.ENOSPC),
    ("mkdir", "*step-00000003*", errno.EDQUOT),
    ("open_new_direct", DATA, errno.EMFILE),
    ("reserve", DATA, errno.ENOSPC),
    *[("write_at", DATA, error) for error in (errno.ENOSPC, errno.EDQUOT, errno.EIO)],
    *[("sync", path, errno.EIO) for path in (DATA, RECORD, MANIFEST)],
    *[("link", path, errno.EIO) for path in (DATA, RECORD, MANIFEST)],
    ("truncate", DATA, errno.EIO),
    ("write_at", RECORD, errno.ENOSPC),
    ("write_at", "*atoms.json*", errno.EDQUOT),
    ("close", DATA, errno.EDQUOT),
    ("open_to_read", DATA, errno.EIO),
    ("size", DATA, errno.ESTALE),
    ("read_into", RECORD, errno.EIO),
]
"""What fails while a step is saved and committed, so that it does not get committed."""


@pytest.mark.parametrize(("call", "path", "error"), SPOILING)
def test_a_fault_spoils_one_step_and_is_told(
    engine: Engine, switch: Switch, disk: Disk, call: str, path: str, error: int
) -> None:
    switch.hook = fault = Failing(call, path, error)
    told = save(engine, 3)
    assert fault.fired == 1
    assert isinstance(told, StorageError)
    assert isinstance(told, StorageFull) == (error in (errno.ENOSPC, errno.EDQUOT))
    assert [point.step for point in committed(engine.storage)] == [2, 1]
    assert save(engine, 4) is None
    assert committed(engine.storage)[0].step == 4
    engine.close()
    assert next_life(Local(ROOT, disk)) == 4


@pytest.mark.parametrize(("call", "path", "error"), SPOILING)
def test_and_a_process_that_then_dies_leaves_a_whole_step(
    engine: Engine, switch: Switch, disk: Disk, call: str, path: str, error: int
) -> None:
    switch.hook = Failing(call, path, error)
    assert save(engine, 3) is not None
    engine.close()
    assert next_life(Local(ROOT, disk)) in (2, 3)


@pytest.mark.parametrize("number", range(1, 7))
def test_a_step_is_not_committed_before_each_folder_is_synced(
    engine: Engine, switch: Switch, disk: Disk, number: int
) -> None:
    """Its own name, then after data, train, record, index and manifest: whoever finds the name later must sync it first."""
    switch.hook = fault = Failing("sync_folder", "*step-00000003*", errno.EIO, first=number)
    spoiled = begin(engine, 3)
    assert isinstance(spoiled.upload_completion.exception(SOON_S), StorageError)
    assert spoiled.point is None
    assert fault.fired == 1
    assert save(engine, 4) is None
    engine.close()
    assert next_life(Local(ROOT, disk)) == 4


@pytest.mark.parametrize("path", [DATA, RECORD, MANIFEST])
def test_a_file_whose_sync_failed_is_never_synced_again(engine: Engine, switch: Switch, path: str) -> None:
    """The kernel may have dropped its bytes and called them clean: a second sync that succeeds says nothing."""
    calls: list[Call] = []
    fault = Failing("sync", path, errno.EIO)

    def note(call: Call, do: Callable[..., Any]) -> Any:
        calls.append(call)
        return fault(call, do)

    switch.hook = note
    assert isinstance(save(engine, 3), StorageError)
    assert save(engine, 4) is None
    (failed,) = (call for call in calls if call.is_a("sync", path) and "step-00000003" in call.path)
    after = [call for call in calls[calls.index(failed) + 1 :] if call.path == failed.path]
    assert [call.name for call in after] == ["unlink", "close"]


ACTIONS: dict[str, Callable[[Local], object]] = {
    "a save and its commit": lambda storage: training.train(storage, "1.1", 8, 10),
    "opening the next generation": open_next,
    "deleting old steps": lambda storage: retain(storage, "1.1", 2),
}


@pytest.fixture(scope="module")
def trained() -> Disk:
    """Steps 2, 4 and 6 are committed; 8 is whole, and its commit is still to come."""
    disk = Disk()
    storage = Local(ROOT, disk)
    open_generation(storage, "1.1", "uid")
    for step in (2, 4, 6):
        training.train(storage, "1.1", step - 2, step)
    training.save(storage, "1.1", 6, 8)
    return disk


def go_on(storage: Local, opening: Opening) -> None:
    assert opening.resume is not None
    training.loads(storage, training.train(storage, opening.generation, opening.resume.step, 12))
    retain(storage, opening.generation, 2)
    assert len(committed(storage)) == 2
    found = audit(storage)
    assert [one.step for one in found.differences(training.plan) if one.step not in found.gaps()] == []


@pytest.mark.parametrize("action", ACTIONS)
def test_whichever_call_fails_the_next_generation_finds_the_newest_step(trained: Disk, action: str) -> None:
    number, fired = 0, True
    while fired:
        number += 1
        fault = Failing("*", "*", (errno.EIO, errno.ENOSPC)[number % 2], first=number)
        disk = Disk(trained.tree.copy())
        with contextlib.suppress(StorageError):
            ACTIONS[action](Local(ROOT, watched(disk, fault)))
        fired = fault.fired > 0
        storage = Local(ROOT, disk)
        opening = open_next(storage)
        assert opening.resume is not None
        assert opening.resume.step >= 6
        training.loads(storage, opening.resume)
        if number % 5 == 0:
            go_on(storage, opening)
    assert number > 40


@pytest.mark.parametrize("call", ["unlink", "sync_folder", "rmdir"])
def test_a_fault_while_old_steps_are_deleted_costs_no_new_one(
    engine: Engine, switch: Switch, disk: Disk, call: str
) -> None:
    switch.hook = fault = Failing(call, "*step-00000001*", errno.EIO)
    for step in (3, 4):
        done = begin(engine, step)
        assert done.upload_completion.exception(SOON_S) is None
        assert done.point is not None
        tidied(engine)
    assert fault.fired == 1
    assert [step for step, _ in saves(engine.storage)] == [3, 4], "what was not deleted then is now"
    engine.close()
    assert next_life(Local(ROOT, disk)) == 4


def test_short_writes_are_gone_on_with(engine: Engine, switch: Switch, disk: Disk) -> None:
    written: list[int] = []

    def a_few(call: Call, do: Callable[..., Any]) -> Any:
        if call.name != "write_at":
            return do(*call.arguments)
        descriptor, data, offset = call.arguments
        written.append(min(len(data), 1 + len(written) * 37 % 500))
        return do(descriptor, data[: written[-1]], offset)

    switch.hook = a_few
    assert save(engine, 3) is None
    assert len(written) > 100
    engine.close()
    assert next_life(Local(ROOT, disk)) == 3


UNREADABLE = [
    (call, file)
    for call in ("open_to_read", "read_into", "size")
    for file in (
        "MANIFEST.json",
        "atoms.json",
        "train.json",
        "rank-00000.json",
        "rank-00000.safetensors",
    )
]


@pytest.mark.parametrize(("call", "file"), UNREADABLE)
def test_what_the_disk_cannot_give_back_is_damage_and_the_step_before_is_taken(
    engine: Engine, disk: Disk, call: str, file: str
) -> None:
    engine.close()
    fault = Failing(call, f"*step-00000002/*/{file}", errno.EIO, times=1000)
    again = Engine(Local(ROOT, watched(disk, fault)))
    assert load(again) == 1
    assert fault.fired
    assert save(again, 5) is None
    again.close()
    assert next_life(Local(ROOT, disk)) == 5


@pytest.mark.parametrize(("call", "file"), UNREADABLE)
def test_what_was_left_without_a_commit_and_cannot_be_read_holds_nothing_up(
    engine: Engine, switch: Switch, disk: Disk, call: str, file: str
) -> None:
    switch.hook = Failing("link", MANIFEST, errno.EIO)
    assert isinstance(save(engine, 3), StorageError)
    switch.hook = fault = Failing(call, f"*step-00000003/*/{file}", errno.EIO, times=1000)
    assert save(engine, 4) is None
    engine.close()
    again = Engine(Local(ROOT, watched(disk, fault)))
    assert load(again) == 4
    again.close()


@pytest.mark.parametrize("folder", ["*step-00000002", "*step-00000002/g0.1"])
def test_a_step_whose_folder_cannot_be_listed_holds_nothing_up(
    engine: Engine, switch: Switch, disk: Disk, folder: str
) -> None:
    switch.hook = fault = Failing("names", folder, errno.EIO, times=1000)
    assert [save(engine, step) for step in (3, 4, 5)] == [None] * 3
    assert fault.fired
    engine.close()
    again = Engine(Local(ROOT, watched(disk, fault)))
    assert load(again) == 5
    again.close()


def test_where_no_step_can_be_listed_the_newest_is_found_by_its_name(engine: Engine, disk: Disk) -> None:
    engine.close()
    fault = Failing("names", "*step-*", errno.EIO, times=1000)
    again = Engine(Local(ROOT, watched(disk, fault)))
    assert fault.fired
    assert load(again) == 2
    again.close()


def test_where_neither_steps_nor_their_hint_can_be_read_nobody_starts_anew(
    engine: Engine, disk: Disk
) -> None:
    engine.close()
    listing = Failing("names", "*step-*", errno.EIO, times=1000)
    hint = Failing("read_into", "*hints*", errno.EIO, times=1000)
    with pytest.raises(StorageError):
        Engine(Local(ROOT, watched(watched(disk, listing), hint)))
    assert listing.fired
    assert hint.fired
    assert next_life(Local(ROOT, disk)) == 2


def test_where_nothing_can_be_read_nobody_starts_anew(engine: Engine, disk: Disk) -> None:
    engine.close()
    for path, error in (("*step-*", NoUsableCheckpoint), ("*", StorageError)):
        fault = Failing("read_into", path, errno.EIO, times=1000)
        with pytest.raises(error):
            Engine(Local(ROOT, watched(disk, fault)))
        assert fault.fired
    assert next_life(Local(ROOT, disk)) == 2
