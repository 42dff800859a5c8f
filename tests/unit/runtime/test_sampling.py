"""The agent's task: when it tells, what it obeys, and that a coordinator without an answer costs nothing."""

from __future__ import annotations

import asyncio
import os
from contextlib import asynccontextmanager, closing
from typing import TYPE_CHECKING

import pytest

from fakes.agents import until
from fakes.scripted import TOKEN, ScriptedCoordinator
from stormjib_health.records.ring import Recorder, ring_path
from stormjib_health.sampler.look import Target
from stormjib_health.wire import Answer, Check, CheckKind, Doubt, Finding, Wish
from stormjib_runtime.http import split_url
from stormjib_runtime.sampling import Place, Sampling
from stormjib_runtime.wire import Cause, Generation, GenerationId, Member

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterator, Sequence
    from pathlib import Path

GENERATION = Generation(GenerationId(2, 7), None, (Member(4, 1, "pod", "127.0.0.1", 1),), Cause.START)
CHECK = Check(11, CheckKind.TRANSFER, "10.0.0.9:7")


class Alone:
    """This process as the only rank."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def targets(self) -> tuple[Target, ...]:
        return (Target(0, 0, os.getpid()),)


class Scene:
    """A coordinator, and sampling that is on."""

    def __init__(self, coordinator: ScriptedCoordinator, folder: Path) -> None:
        self.coordinator = coordinator
        self.said: list[str] = []
        self.checked: list[int] = []
        self.release = asyncio.Event()
        address = split_url(coordinator.url)
        self.sampling = Sampling(
            address, TOKEN, Place("job", 4, 1), self.said.append, self._check, lambda: "h:1"
        )
        self._alone = Alone(folder)

    async def _check(self, checks: Sequence[Check]) -> Sequence[Answer]:
        self.checked += [check.id for check in checks]
        await self.release.wait()
        return [Answer(check.id, ok=True, seconds=0.5) for check in checks]

    @asynccontextmanager
    async def on(self) -> AsyncIterator[None]:
        task = asyncio.create_task(self.sampling.run(GENERATION, self._alone, ""))
        yield
        task.cancel()
        await asyncio.wait([task])
        assert task.cancelled()


@pytest.fixture
def recorder(tmp_path: Path) -> Iterator[Recorder]:
    Recorder.create(ring_path(tmp_path, 0)).close()
    with closing(Recorder.open(ring_path(tmp_path, 0))) as one:
        yield one


@pytest.fixture
async def scene(recorder: Recorder, tmp_path: Path) -> AsyncIterator[Scene]:
    async with ScriptedCoordinator() as coordinator:
        yield Scene(coordinator, tmp_path)


async def test_samples_say_whose_they_are_and_their_numbers_grow_over_generations(scene: Scene) -> None:
    for _ in range(2):
        async with scene.on():
            sample = await scene.coordinator.sampled(lambda _: True)
    assert (sample.job_uid, sample.slot, sample.agent, sample.generation) == ("job", 4, 1, "2.7")
    assert sample.measures == "h:1"
    assert sample.ranks[0].process == "R"
    numbers = [sample.number for sample in scene.coordinator.samples]
    assert numbers == sorted(set(numbers))


async def test_a_doubt_does_not_wait_for_the_interval(scene: Scene, recorder: Recorder) -> None:
    scene.coordinator.wish = Wish(interval_s=30)
    async with scene.on():
        await scene.coordinator.sampled(lambda _: True)
        await asyncio.sleep(0.7)  # three looks
        told = len(scene.coordinator.samples)
        assert told <= 2, "the first look, and perhaps one before its answer came"
        recorder.finding(Finding(0, Doubt.NORM, 3, accused=0))
        sample = await scene.coordinator.sampled(lambda sample: bool(sample.findings))
    assert sample.findings[0].step == 3


async def test_a_check_is_made_once_however_often_it_is_wanted_and_told_until_it_is_heard(
    scene: Scene,
) -> None:
    async with scene.on():
        for _ in range(3):
            scene.coordinator.wish = Wish(checks=(CHECK,))
            await scene.coordinator.sampled(lambda _: True)
        await until(lambda: scene.checked)
        scene.coordinator.deaf = True
        scene.release.set()
        refused = scene.coordinator.refused
        await until(lambda: scene.coordinator.refused >= refused + 2)
        scene.coordinator.deaf = False
        sample = await scene.coordinator.sampled(lambda sample: bool(sample.answers))
        await scene.coordinator.sampled(lambda sample: not sample.answers)
    assert sample.answers == (Answer(11, ok=True, seconds=0.5),)
    assert scene.checked == [11]
    assert [line for line in scene.said if "503" in line] == [
        "health: the coordinator answers a sample with 503: deaf"
    ]


async def test_a_process_without_a_handler_is_not_signalled(scene: Scene) -> None:
    """The signal would end it: this one."""
    scene.coordinator.wish = Wish(stacks=(0, 5))
    async with scene.on():
        sample = await scene.coordinator.sampled(lambda sample: bool(sample.stacks))
    assert [one.rank for one in sample.stacks] == [0]
    assert sample.stacks[0].text.startswith("process state ")


async def test_a_coordinator_that_is_gone_is_tried_again(scene: Scene, tmp_path: Path) -> None:
    async with scene.on():
        first = await scene.coordinator.sampled(lambda _: True)
        await scene.coordinator.stop()
        await until(lambda: scene.said)
        await scene.coordinator.start()
        again = await scene.coordinator.sampled(lambda _: True)
    assert again.number > first.number
    assert again.over_s >= 0.4
