"""Commits: one after the other, none forgotten, a failure is told and holds up nothing."""

from __future__ import annotations

import asyncio

from stormjib_runtime.commits import Commits
from stormjib_runtime.errors import CheckpointError
from stormjib_runtime.wire import Cause, Generation, GenerationId, ResumePoint

GENERATION = Generation(GenerationId(1, 2), None, (), Cause.START)


class Child:
    """Commits when the test lets it."""

    def __init__(self) -> None:
        self.asked: list[int] = []
        self.gate = asyncio.Event()
        self.fails = False

    async def commit(self, generation: GenerationId, world: int, step: int, keep_last: int) -> ResumePoint:
        self.asked.append(step)
        await self.gate.wait()
        if self.fails:
            raise CheckpointError("no room")
        return ResumePoint(step, generation, "digest")


def make(child: Child, events: list[str]) -> Commits:
    return Commits(child, GENERATION, 3, lambda: None, events.append)  # type: ignore[arg-type]


async def test_steps_are_committed_in_order_and_once() -> None:
    child, events = Child(), list[str]()
    commits = make(child, events)
    for saved in (-1, -1, 10, 10, 20, 15):
        commits.saw(saved)
    before = commits.pending
    child.gate.set()
    await commits.settle(5)
    assert child.asked == [10, 20]
    assert commits.committed == ResumePoint(20, GENERATION.id, "digest")
    assert (before, commits.pending, events) == (True, False, [])
    await commits.close()


async def test_a_failure_is_told_and_the_next_step_goes_on() -> None:
    child, events = Child(), list[str]()
    child.gate.set()
    child.fails = True
    commits = make(child, events)
    commits.saw(10)
    await commits.settle(5)
    child.fails = False
    commits.saw(20)
    await commits.settle(5)
    assert events == ["CommitFailed: step 10: no room"]
    assert commits.committed is not None
    assert commits.committed.step == 20
    await commits.close()


async def test_settling_does_not_wait_for_ever() -> None:
    child, events = Child(), list[str]()
    commits = make(child, events)
    commits.saw(10)
    await commits.settle(0.01)
    assert events == ["CommitPending: a step of generation 1.2 was not committed in 0 s"]
    await commits.close()
