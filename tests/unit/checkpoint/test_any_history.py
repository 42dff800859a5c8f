"""Any order of saves, kills, power cuts, roll-backs, zombies and deletions, on any world sizes: the step that must be found is found.

More of it: `STORMJIB_EXAMPLES=5000 pytest tests/unit/checkpoint/test_any_history.py`.
"""

from __future__ import annotations

import contextlib
import os
from random import Random
from typing import TYPE_CHECKING, Any

import pytest
import torch
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from fakes.disk import Disk, Tree
from fakes.meshes import Mesh, filled, held, raw
from fakes.power import Cutting
from fakes.saving import save_parts
from fakes.training import plan
from fakes.watched import Call, watched
from stormjib_checkpoint.commit import commit_step
from stormjib_checkpoint.errors import CommitError
from stormjib_checkpoint.history import committed, saves
from stormjib_checkpoint.layout import GENERATIONS, GenerationId
from stormjib_checkpoint.ledger import audit
from stormjib_checkpoint.opening import open_next
from stormjib_checkpoint.reader import Checkpoint
from stormjib_checkpoint.retention import KEEP_AT_LEAST, Retention, retain
from stormjib_checkpoint.storage import Local
from stormjib_checkpoint.writer import Part

if TYPE_CHECKING:
    from collections.abc import Callable

    from stormjib_checkpoint.format import ResumePoint

ROOT = "/job"
SHAPE = (7, 3)
WORLDS = st.integers(1, 3)


def no_step_listed(call: Call, do: Callable[..., Any]) -> Any:
    """A hook: no listing shows anything but the generations."""
    hidden = call.name == "names" and not call.path.endswith(GENERATIONS)
    return [] if hidden else do(*call.arguments)


class Killed(BaseException):
    """No code of the library runs after it, in this process."""


def atom_of(mark: int) -> torch.Tensor:
    """The state; `mark` tells all saves apart."""
    return filled(SHAPE, torch.float32, mark)


def leave(storage: Local, part: Part, mark: int, above: int) -> None:
    """A rank's rows of the state, and the samples that it has fed since step `above`."""
    box, _ = list(Mesh((part.world,), (0,)).boxes(SHAPE))[part.rank]
    samples = {step: plan(step)[part.rank :: part.world] for step in range(above + 1, part.step + 1)}
    save_parts(storage, part, [held("w", atom_of(mark), box, True)], {}, {"mark": mark}, samples)


def restored(storage: Local, point: ResumePoint, world: int) -> int:
    """Each rank of a world loads its columns, and they are those of the mark, which is returned."""
    checkpoint = Checkpoint(storage, point)
    mark = int(checkpoint.train["mark"])
    for box, _ in Mesh((world,), (1,)).boxes(SHAPE):
        wanted, found = held("w", atom_of(mark), box, True), held("w", torch.zeros(SHAPE), box, True)
        checkpoint.fill_parts([found])
        assert raw(found.local) == raw(wanted.local)
    return mark


class History(RuleBasedStateMachine):
    """What a run has promised, beside what is on its disk.

    `sure`: marks by step of what was reported as committed in the living history and may not be lost. `maybe`: what was left without
    such a report, so that it may be found or not.
    """

    def __init__(self) -> None:
        super().__init__()
        self.before = Tree()
        self.disk = Disk()
        self.sure: dict[int, int] = {}
        self.maybe: dict[int, int] = {}
        self.marks = 0
        self.told: list[str] = []
        self.lied = False
        """A listing did not show all: steps that were left without a commit are known by it alone, and may have no line in the ledger."""
        self.generations: list[tuple[str, int]] = []
        """All, and the newest step that each has left."""
        self.retention = Retention(self.storage, self.told.append)

    @property
    def storage(self) -> Local:
        return Local(ROOT, self.disk)

    @property
    def generation(self) -> str:
        return self.generations[-1][0]

    @initialize(world=WORLDS)
    def fresh(self, world: int) -> None:
        self.world = world
        assert open_next(self.storage).resume is None
        self.generations.append(("0.1", 0))
        self.at = self.left = 0

    def _part(self, rank: int) -> Part:
        return Part(self.at, GenerationId.parse(self.generation), rank, self.world)

    def _save(self, storage: Local, commit: bool = True) -> None:
        for rank in range(self.world):
            leave(storage, self._part(rank), self.marks, self.left)
        if commit:
            commit_step(storage, self.generation, self.world, self.at)

    def _train(self, steps: int) -> None:
        self.marks += 1
        self.at += steps
        self.generations[-1] = (self.generation, self.at)

    @rule(steps=st.integers(1, 3))
    def save(self, steps: int) -> None:
        self._train(steps)
        self._save(self.storage)
        self.left = self.at
        self.sure[self.at] = self.marks

    @rule(steps=st.integers(1, 3))
    def save_without_a_commit(self, steps: int) -> None:
        self._train(steps)
        self._save(self.storage, commit=False)
        self.left = self.at
        self.maybe[self.at] = self.marks

    @rule(steps=st.integers(1, 3), calls=st.integers(0, 150), world=WORLDS)
    def killed_while_it_saves(self, steps: int, calls: int, world: int) -> None:
        left = calls

        def kill(call: Call, do: Callable[..., Any]) -> Any:
            nonlocal left
            left -= 1
            if left < 0:
                raise Killed
            return do(*call.arguments)

        self._train(steps)
        with contextlib.suppress(Killed):
            self._save(Local(ROOT, watched(self.disk, kill)))
            self.sure[self.at] = self.marks
        self.maybe.setdefault(self.at, self.marks)
        self._open(world)

    @rule(state=st.integers(0, 1_000_000), world=WORLDS)
    def the_power_is_cut(self, state: int, world: int) -> None:
        cutting = Cutting(self.before)
        for entry in self.disk.log:
            cutting.go(entry)
        left = list(cutting.states())
        self.before = left[state % len(left)]
        self.disk = Disk(self.before.copy())
        self._open(world)

    @rule(world=WORLDS)
    def the_next_process_is_shown_no_step(self, world: int) -> None:
        """Its listings are empty but for the generations: what is sure is found by its name."""
        self.lied = True
        self._open(world, storage=Local(ROOT, watched(self.disk, no_step_listed)))

    @rule(world=WORLDS, seed=st.integers(0, 1000))
    def the_next_process_is_shown_some_of_what_is_there(self, world: int, seed: int) -> None:
        chance = Random(seed)

        def some(call: Call, do: Callable[..., Any]) -> Any:
            shown = do(*call.arguments)
            if call.name != "names" or call.path.endswith(GENERATIONS):
                return shown
            return [name for name in shown if chance.random() < 0.5]

        self.lied = True
        self._open(world, storage=Local(ROOT, watched(self.disk, some)))

    @precondition(lambda self: len(self.sure) >= 2)
    @rule(world=WORLDS)
    def the_newest_is_refused(self, world: int) -> None:
        newest = committed(self.storage)[0]
        if newest.step in self.sure:
            self.maybe[newest.step] = self.sure.pop(newest.step)
        self._open(world, [newest.digest])
        assert self.at != newest.step

    def _open(self, world: int, refused: list[str] | None = None, storage: Local | None = None) -> None:
        """The next process goes on; it must find the newest that is sure, or something newer that may be there."""
        opening = open_next(storage or self.storage, "", refused or [])
        found = opening.resume
        at = found.step if found is not None else 0
        assert at >= max(self.sure, default=0)
        if found is not None:
            mark = restored(self.storage, found, world)
            assert mark == {**self.maybe, **self.sure}[at]
            self.sure[at] = mark
        self.sure = {step: mark for step, mark in self.sure.items() if step <= at}
        self.maybe = {step: mark for step, mark in self.maybe.items() if step < at and step not in self.sure}
        self.world, self.at, self.left = world, at, at
        self.generations.append((opening.generation, at))
        self.retention = Retention(self.storage, self.told.append)

    @rule(keep=st.integers(0, 4))
    def delete_old_steps(self, keep: int) -> None:
        before = [point.step for point in committed(self.storage)]
        own = [point for point in committed(self.storage) if point.generation == self.generation]
        retain(self.storage, self.generation, keep)
        after = [point.step for point in committed(self.storage)]
        stay = before[: max(keep, KEEP_AT_LEAST)] if own else before
        assert after[: len(stay)] == stay
        assert len(after) <= len(stay) + 1, "only the step that the generation resumed from stays besides"
        self.sure = {step: mark for step, mark in self.sure.items() if step in after}

    @rule(keep=st.integers(0, 4), slices=st.integers(1, 12))
    def delete_old_steps_in_slices(self, keep: int, slices: int) -> None:
        """As a process does beside all else: what is half proved by then is gone on with in the next such slices."""
        before = [point.step for point in committed(self.storage)]
        own = any(point.generation == self.generation for point in committed(self.storage))
        self.retention.ask(self.generation, keep)
        for _ in range(slices):
            self.retention.work()
        after = [point.step for point in committed(self.storage)]
        newest = before[: max(keep, KEEP_AT_LEAST)] if own else before
        assert after[: len(newest)] == newest
        assert not own or len(after) <= max(keep, KEEP_AT_LEAST) + 4
        assert self.told == [], "nothing is damaged"
        self.sure = {step: mark for step, mark in self.sure.items() if step in after}

    @precondition(lambda self: len(self.generations) > 1)
    @rule(which=st.integers(0, 1_000_000), world=WORLDS)
    def a_zombie_goes_on(self, which: int, world: int) -> None:
        """A process of an older generation saves, commits and wants to delete."""
        index = which % (len(self.generations) - 1)
        generation, at = self.generations[index]
        self.generations[index] = generation, at + 1
        for rank in range(world):
            leave(self.storage, Part(at + 1, GenerationId.parse(generation), rank, world), -1, at)
        with contextlib.suppress(CommitError):
            commit_step(self.storage, generation, world, at + 1)
        there = list(saves(self.storage))
        assert retain(self.storage, generation, 2) == []
        assert list(saves(self.storage)) == there

    @invariant()
    def all_that_is_sure_is_there(self) -> None:
        if self.generations:
            found = {point.step: point for point in committed(self.storage)}
            assert self.sure.keys() <= found.keys() <= self.sure.keys() | self.maybe.keys()
            for step, point in found.items():
                assert restored(self.storage, point, 1) == {**self.maybe, **self.sure}[step]
            samples = audit(self.storage)
            assert samples.problems == ()
            wrong = [one.step for one in samples.differences(plan)]
            assert [step for step in wrong if step in samples.steps or not self.lied] == []


# The usual limit of time would be taken for a failing example where the machine is busy.
TestAnyHistory = pytest.mark.timeout(3600)(History.TestCase)
TestAnyHistory.settings = settings(
    max_examples=int(os.environ.get("STORMJIB_EXAMPLES", "30")),
    stateful_step_count=25,
    suppress_health_check=[HealthCheck.too_slow],
)
