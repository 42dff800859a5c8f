"""A job of two agents and a spare under the real coordinator: each fault from outside once, in one life of the job."""

from __future__ import annotations

import asyncio
import os
import signal
import time
from dataclasses import replace
from typing import TYPE_CHECKING

import pytest

from fakes.agents import SCRIPTS, AgentProcess, alive, until
from fakes.coordinator import TOKEN, Process
from fakes.runtime import JOB
from stormjib_runtime.wire import Bounds, Cause, GenerationId, JobPhase, JobState

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable
    from pathlib import Path

pytestmark = pytest.mark.timeout(240)
START_S = 90.0
"""Three times torch on a machine that others use too."""
BOUNDS = Bounds(
    version=1,
    incarnation=1,
    spec_generation=1,
    replicas=2,
    min_replicas=1,
    processes=1,
    slots={str(slot): f"pod-{slot}" for slot in range(3)},
    restarts_left=10,
    replicate={"2": 2},
)


class Job:
    """The coordinator and three agents."""

    def __init__(self, folder: Path, coordinator: Process) -> None:
        self.folder, self.coordinator = folder, coordinator
        url, command = f"http://127.0.0.1:{coordinator.port}", [str(SCRIPTS / "ring.py")]
        self.agents = [
            AgentProcess(folder, url, TOKEN, command, slot, STORMJIB_JOB_UID=JOB, STORMJIB_PROCESSES="1")
            for slot in range(3)
        ]

    async def until(self, holds: Callable[[JobState], bool], limit_s: float = 20.0) -> JobState:
        async with asyncio.timeout(limit_s):
            while not holds(state := await self.coordinator.state()):
                await asyncio.sleep(0.01)
        return state

    async def stepping(self, number: int, limit_s: float = 20.0) -> JobState:
        """The job steps in this generation."""
        return await self.until(
            lambda state: (
                state.generation is not None
                and state.generation.id == GenerationId(1, number)
                and state.phase is JobPhase.RUNNING
            ),
            limit_s,
        )

    def rank_pids(self) -> set[int]:
        return {pid for agent in self.agents for pid in agent.below() if name(pid).startswith("rank")}

    async def restart_coordinator(self) -> None:
        """Its container dies and comes back in the same pod."""
        port = self.coordinator.port
        await self.coordinator.kill()
        self.coordinator = await Process.start(self.folder, port=port)


def name(pid: int) -> str:
    try:
        with open(f"/proc/{pid}/comm") as file:
            return file.read().strip()
    except (FileNotFoundError, ProcessLookupError):
        return ""


def slots(state: JobState) -> list[int]:
    return [] if state.generation is None else [member.slot for member in state.generation.members]


@pytest.fixture
async def job(tmp_path: Path) -> AsyncIterator[Job]:
    coordinator = await Process.start(tmp_path)
    await coordinator.put(BOUNDS)
    one = Job(tmp_path, coordinator)
    yield one
    for agent in one.agents:
        print(agent.errors()[-1500:])
        agent.close()
    await one.coordinator.kill()


async def test_a_job_lives_through_losses_of_every_kind(job: Job) -> None:
    first = await job.stepping(1, START_S)
    assert slots(first) == [0, 1]
    await job.until(lambda state: len(state.agents) == 3 and state.agents[2].phase == "Idle", START_S)

    # A container dies whole: the spare takes its node rank, and its next life is the spare.
    began = time.monotonic()
    pids = job.agents[1].kill_container()
    lost = await job.stepping(2)
    print(f"container killed -> stepping on the spare: {time.monotonic() - began:.2f} s")
    assert (slots(lost), lost.history[-1].generation.cause) == ([0, 2], Cause.CONTAINER_EXIT)
    assert not any(alive(pid) for pid in pids)
    job.agents[1].restart()
    await job.until(lambda state: (state.agents[1].agent, state.agents[1].phase) == (2, "Idle"), START_S)

    # The coordinator dies and comes back: no rank notices.
    before, step = job.rank_pids(), lost.step
    assert len(before) == 2
    await job.restart_coordinator()
    after = await job.until(lambda state: state.step > step + 10 and state.phase is JobPhase.RUNNING)
    assert after.generation is not None
    assert (after.generation.id, after.generation.replicate) == (GenerationId(1, 2), 2)
    assert job.rank_pids() == before

    # A planned leave: nothing is counted, the leaver exits by itself.
    job.agents[2].process.send_signal(signal.SIGTERM)
    left = await job.stepping(3)
    assert slots(left) == [0, 1]
    assert (left.history[-1].generation.cause, left.history[-1].counted) == (Cause.LEAVE, False)
    assert await job.agents[2].exit() == 0

    # A rank dies while nobody decides: its coordinator's next life makes it good.
    await job.coordinator.kill()
    victim = min(job.rank_pids())
    os.kill(victim, signal.SIGKILL)
    await until(lambda: not alive(victim))
    job.coordinator = await Process.start(job.folder, port=job.coordinator.port)
    recovered = await job.stepping(4)
    assert (slots(recovered), recovered.history[-1].generation.cause) == ([0, 1], Cause.RANK_EXIT)

    await job.coordinator.put(replace(BOUNDS, version=2, suspend=True))
    await job.until(lambda state: state.phase is JobPhase.SUSPENDED)
    await until(lambda: job.rank_pids() == set())
