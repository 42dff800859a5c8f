"""FORMAT.md §1, §5, §8: wherever the power is cut, the newest committed step loads, and never a torn one."""

from __future__ import annotations

import errno
import random
import sys
from typing import TYPE_CHECKING, NamedTuple

import pytest

from fakes.disk import Disk
from fakes.training import WORLD, loads, plan, save, train
from stormjib_checkpoint.commit import commit_step
from stormjib_checkpoint.errors import (
    CheckpointError,
    CommitError,
    DamagedCheckpoint,
    HistoryError,
    StorageError,
    StorageFull,
)
from stormjib_checkpoint.history import committed, generations
from stormjib_checkpoint.layout import GenerationId
from stormjib_checkpoint.ledger import audit
from stormjib_checkpoint.opening import open_generation
from stormjib_checkpoint.retention import retain
from stormjib_checkpoint.storage import Local

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

ROOT = "/team/job"


class Moment(NamedTuple):
    """What a power cut at one operation finds: the disk, and the newest step that was reported as committed."""

    disk: Disk
    done: int


def moments(disk: Disk) -> list[Moment]:
    """Two generations save, commit, fall back and delete; the moment before each operation that changes something."""
    found: list[Moment] = []
    done = -1
    disk.before = lambda _: found.append(Moment(disk.copy(), done))
    storage = Local(ROOT, disk)
    open_generation(storage, "1.1", "uid")
    for step in (2, 4, 6):
        train(storage, "1.1", step - 2, step)
        done = step
        retain(storage, "1.1", 2)
    save(storage, "1.1", 6, 8)  # complete, but nobody commits it: the next generation does
    open_generation(storage, "1.2", "uid")
    for step in (10, 12):
        train(storage, "1.2", step - 2, step)
        done = step
        retain(storage, "1.2", 2)
    return found


def recover(disk: Disk, done: int) -> None:
    storage = Local(ROOT, disk)
    resume = open_generation(storage, "2.1", "uid").resume
    reached = resume.step if resume is not None else -1
    assert reached >= done, f"step {done} was reported as committed; {reached} is what is left"
    for point in committed(storage):
        loads(storage, point)
    found = audit(storage)
    assert found.problems == ()
    assert found.last == reached
    assert found.differences(plan) == []


def go_on(disk: Disk) -> None:
    """After recovery, training, committing and deleting work as if nothing had been."""
    storage = Local(ROOT, disk)
    points = committed(storage)
    above = points[0].step if points else 0
    loads(storage, train(storage, "2.1", above, above + 2))
    retain(storage, "2.1", 2)
    assert len(committed(storage)) == min(len(points) + 1, 2)


CUTS: dict[str, Callable[[str], bool]] = {
    "nothing that was not synced": lambda _: False,
    "every name": lambda _: True,
    "some names": lambda path: random.Random(path).random() < 0.5,
    "other names": lambda path: random.Random(path).random() >= 0.5,
}
"""What a power cut may leave of names that were not synced; data that was not synced is always lost."""


def survives(found: Iterable[Moment], left: str) -> None:
    """Cut the power at each of these moments."""
    for number, (disk, done) in enumerate(found):
        after = disk.copy()
        after.cut(CUTS[left])
        recover(after, done)
        if number % 5 == 0:
            go_on(after)


def survives_an_opener_that_relies_on_it(found: Iterable[Moment]) -> None:
    """Kill a process anywhere; another finds its names, not yet synced, relies on them, and then the power goes."""
    for disk, _ in found:
        after = disk.copy()
        opening = open_generation(Local(ROOT, after), "1.3", "uid")
        after.cut(CUTS["nothing that was not synced"])
        assert GenerationId(1, 3) in generations(Local(ROOT, after))
        recover(after, opening.resume.step if opening.resume is not None else -1)


def survives_a_committer_that_relies_on_it(found: Iterable[Moment]) -> int:
    """The same with a commit that is repeated; how often there was something to repeat."""
    repeated = 0
    for disk, _ in found:
        after = disk.copy()
        storage = Local(ROOT, after)
        try:
            point = commit_step(storage, "1.1", WORLD, 2)
        except (CommitError, HistoryError):
            continue
        repeated += 1
        after.cut(CUTS["nothing that was not synced"])
        assert committed(Local(ROOT, after))[-1] == point
    return repeated


@pytest.mark.parametrize("left", CUTS)
def test_every_power_cut_leaves_a_whole_newest_checkpoint(left: str) -> None:
    """§1.1, §8.3"""
    found = moments(Disk())
    assert len(found) > 300
    assert found[-1].done == 10
    survives(found, left)


def test_a_generation_opened_on_a_dead_ones_names_survives_a_power_cut() -> None:
    survives_an_opener_that_relies_on_it(moments(Disk())[:200])


def test_a_commit_repeated_after_its_committer_died_survives_a_power_cut() -> None:
    assert survives_a_committer_that_relies_on_it(moments(Disk())[:200]) > 20


class Skipping(Disk):
    """Leaves out the syncs that one line of the library asks for, here and in its copies. Remembers which lines have asked."""

    def __init__(self, skipped: str, lines: set[str]) -> None:
        super().__init__()
        self._skipped, self._lines = skipped, lines

    def sync(self, descriptor: int) -> None:
        self.syncs_files = self._wanted()
        super().sync(descriptor)

    def sync_folder(self, path: str) -> None:
        self.syncs_folders = self._wanted()
        super().sync_folder(path)

    def fresh(self) -> Disk:
        return Skipping(self._skipped, self._lines)

    def _wanted(self) -> bool:
        caller = sys._getframe(2)
        line = f"{caller.f_code.co_name}, line {caller.f_lineno - caller.f_code.co_firstlineno}"
        self._lines.add(line)
        return line != self._skipped


def harmed(skipped: str, lines: set[str]) -> bool:
    """Whether some power cut then loses or tears something."""
    found = moments(Skipping(skipped, lines))
    try:
        survives_an_opener_that_relies_on_it(found[:200:5])
        survives_a_committer_that_relies_on_it(found[:200:5])
        for left in CUTS:
            survives(found[::5], left)
    except (AssertionError, CheckpointError):
        return True
    return False


def test_each_single_sync_is_needed() -> None:
    """§1.1, §8.3"""
    lines: set[str] = set()
    assert not harmed("", lines)
    assert len(lines) >= 6
    assert [line for line in sorted(lines) if not harmed(line, set())] == []


@pytest.mark.parametrize("error", [errno.ENOSPC, errno.EIO])
def test_a_failed_operation_is_told_and_harms_no_other_step(error: int) -> None:
    base = Disk()
    storage = Local(ROOT, base)
    open_generation(storage, "1.1", "uid")
    before = base.operations
    train(storage, "1.1", 0, 2)
    middle = base.operations
    train(storage, "1.1", 2, 4)
    total = base.operations
    assert before < middle < total
    for number in range(middle + 1, total + 1):
        disk = Disk()
        disk.error = error
        disk.fail_at = number
        storage = Local(ROOT, disk)
        open_generation(storage, "1.1", "uid")
        first = train(storage, "1.1", 0, 2)
        told = None
        try:
            train(storage, "1.1", 2, 4)
        except StorageError as failure:
            told = failure
        # Failing to remove a temporary name is the one failure that needs no telling.
        assert told is None or isinstance(told, StorageFull) == (error == errno.ENOSPC)
        assert committed(storage)[-1] == first
        for point in committed(storage):
            loads(storage, point)
        loads(storage, train(storage, "1.1", 2, 6))
        assert audit(storage).differences(plan) == []


def test_a_name_without_its_bytes_is_damage_and_not_a_checkpoint() -> None:
    disk = Disk()
    disk.syncs_files = False
    storage = Local(ROOT, disk)
    open_generation(storage, "1.1", "uid")
    point = train(storage, "1.1", 0, 2)
    disk.cut(CUTS["every name"])
    with pytest.raises(DamagedCheckpoint, match=r"MANIFEST\.json"):
        loads(storage, point)
