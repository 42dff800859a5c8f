"""FORMAT.md §1, §5, §8: wherever the power is cut, whatever of the calls without a sync is lost, the newest committed step loads."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

import pytest

from fakes.disk import Disk, Entry, Synced, Tree
from fakes.power import Cutting, live
from fakes.training import WORLD, loads, plan, save, train
from fakes.watched import Call, watched
from stormjib_checkpoint import layout
from stormjib_checkpoint.commit import commit_step
from stormjib_checkpoint.errors import CheckpointError, CommitError, DamagedCheckpoint, HistoryError
from stormjib_checkpoint.history import committed, generations, newest
from stormjib_checkpoint.ledger import audit
from stormjib_checkpoint.opening import open_generation
from stormjib_checkpoint.retention import retain
from stormjib_checkpoint.storage import Local

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from stormjib_checkpoint.format import ResumePoint

pytestmark = pytest.mark.timeout(300)
ROOT = "/team/job"
NOTHING = -1


class Promise(NamedTuple):
    """From entry `since` of a log on: a generation that is opened resumes from `step` or a later one, and knows of `generation`."""

    since: int
    step: int
    generation: str


@dataclass
class Run:
    """Calls, and what the library has promised on the way. What was before entry `begin` is looked at in other runs."""

    log: list[Entry]
    promises: list[Promise] = field(default_factory=lambda: [Promise(0, NOTHING, "")])
    begin: int = 0
    start: Tree = field(default_factory=Tree)
    """What lay on the disk before."""

    def promise(self, step: int, generation: str) -> None:
        self.promises.append(Promise(len(self.log), step, generation))


class Recovered(NamedTuple):
    """What the next generation found: the step that it resumes from, the newest that is found where no step is listed, and the generations
    before it."""

    step: int
    by_name: int
    generations: frozenset[str]


def long_run() -> Run:
    """Two generations save, commit, fall back and delete."""
    disk = Disk()
    run, storage = Run(disk.log), Local(ROOT, disk)
    open_generation(storage, "1.1", "uid")
    run.promise(NOTHING, "1.1")
    for step in (2, 4, 6):
        train(storage, "1.1", step - 2, step)
        run.promise(step, "1.1")
        retain(storage, "1.1", 2)
    save(storage, "1.1", 6, 8)  # complete, but nobody commits it: the next generation does
    open_generation(storage, "1.2", "uid")
    run.promise(8, "1.2")
    for step in (10, 12):
        train(storage, "1.2", step - 2, step)
        run.promise(step, "1.2")
        retain(storage, "1.2", 2)
    return run


def relied_on_by_an_opener(log: Sequence[Entry]) -> Run:
    """The process is killed; the next one finds its names, not all of them synced, and opens a generation upon them."""
    disk = live(log)
    opening = open_generation(Local(ROOT, disk), "1.3", "uid")
    run = Run(disk.log, begin=len(disk.log))
    run.promise(step_of(opening.resume), "1.3")
    return run


def relied_on_by_a_committer(log: Sequence[Entry]) -> Run | None:
    """The same with a commit that is repeated, where there is something to repeat."""
    disk = live(log)
    try:
        point = commit_step(Local(ROOT, disk), "1.1", WORLD, 2)
    except (CommitError, HistoryError):
        return None
    run = Run(disk.log, begin=len(disk.log))
    run.promise(point.step, "1.1")
    return run


def cut_again(tree: Tree, promised: Promise) -> Run:
    """The power comes back, and goes once more while the next generation opens."""
    disk = Disk(tree.copy())
    run = Run(disk.log, [promised._replace(since=0)], start=tree)
    open_generation(Local(ROOT, disk), "1.3", "uid")
    run.promise(promised.step, "1.3")
    return run


KILLS = range(1, 250)
"""Entries of the long run after which a process is killed and another goes on."""


@pytest.fixture(scope="module")
def runs() -> list[Run]:
    whole = long_run()
    openers = [relied_on_by_an_opener(whole.log[:end]) for end in KILLS]
    committers = [relied_on_by_a_committer(whole.log[:end]) for end in KILLS]
    assert sum(run is not None for run in committers) > 20
    return [whole, *openers, *(run for run in committers if run is not None)]


_known: dict[object, Recovered] = {}


def recovered(tree: Tree) -> Recovered:
    """Open the next generation on what is left: every committed step loads bit for bit, the ledger is whole, and training goes on."""
    key = tree.key()
    if key not in _known:
        storage = Local(ROOT, Disk(tree.copy()))
        before = frozenset(map(str, generations(storage)))
        by_name = newest(Local(ROOT, watched(storage._files, no_step_listed)))
        resume = open_generation(storage, "2.1", "uid").resume
        _known[key] = Recovered(step_of(resume), step_of(by_name), before)
        points = committed(storage)
        for point in points:
            loads(storage, point)
        found = audit(storage)
        assert (found.last, found.problems, found.differences(plan)) == (_known[key].step, (), [])
        go_on(storage, len(points))
    return _known[key]


def no_step_listed(call: Call, do: Callable[..., Any]) -> Any:
    hidden = call.name == "names" and not call.path.endswith(layout.GENERATIONS)
    return [] if hidden else do(*call.arguments)


def step_of(point: ResumePoint | None) -> int:
    return point.step if point is not None else NOTHING


def go_on(storage: Local, before: int) -> None:
    """Training, committing and deleting work as if nothing had been."""
    points = committed(storage)
    above = points[0].step if points else 0
    loads(storage, train(storage, "2.1", above, above + 2))
    retain(storage, "2.1", 2)
    assert len(committed(storage)) == min(before + 1, 2)


def cuts(run: Run, skipped: str) -> Iterator[tuple[int, Tree]]:
    """What each power cut may leave, and after how many entries it came; as if one line of the library had not asked for its syncs."""
    cutting = Cutting(run.start)
    for number, entry in enumerate(run.log, 1):
        if not (isinstance(entry, Synced) and entry.line == skipped):
            cutting.go(entry)
        if number >= run.begin:
            for tree in cutting.states():
                yield number, tree


def keeps_its_promises(run: Run, skipped: str = "") -> list[tuple[Tree, Promise]]:
    """Look at each different disk that a cut may leave, and give back all with what was promised then."""
    checked: dict[object, tuple[Tree, Promise]] = {}
    for number, tree in cuts(run, skipped):
        promised = [promise for promise in run.promises if promise.since <= number][-1]
        key = (tree.key(), promised)
        if key not in checked:
            checked[key] = tree, promised
            found = recovered(tree)
            assert found.step >= promised.step, f"after {number} calls {found} is left of {promised}"
            assert found.by_name >= promised.step, "it is there, and only a listing tells"
            assert not promised.generation or promised.generation in found.generations
    return list(checked.values())


def test_every_power_cut_leaves_a_whole_newest_checkpoint(runs: list[Run]) -> None:
    assert len(runs[0].log) > 400
    left = keeps_its_promises(runs[0])
    assert len(left) > 300
    for tree, promised in left[::40]:
        assert keeps_its_promises(cut_again(tree, promised))


def test_whoever_relies_on_what_a_killed_process_left_survives_a_power_cut(runs: list[Run]) -> None:
    for run in runs[1:]:
        assert keeps_its_promises(run)


def harmed(runs: Sequence[Run], skipped: str) -> bool:
    """Whether some power cut then loses or tears something."""
    try:
        for run in runs:
            keeps_its_promises(run, skipped)
    except (AssertionError, CheckpointError):
        return True
    return False


def test_each_single_sync_is_needed(runs: list[Run]) -> None:
    """§1.1, §8.3"""
    lines = {entry.line for run in runs for entry in run.log if isinstance(entry, Synced)}
    assert len(lines) >= 6
    assert [line for line in sorted(lines) if not harmed(runs, line)] == []


def test_a_name_without_its_bytes_is_damage_and_not_a_checkpoint() -> None:
    disk = Disk()
    storage = Local(ROOT, disk)
    open_generation(storage, "1.1", "uid")
    point = train(storage, "1.1", 0, 2)
    disk.tree.files = dict.fromkeys(disk.tree.files, b"")
    with pytest.raises(DamagedCheckpoint, match=r"MANIFEST\.json"):
        loads(storage, point)
