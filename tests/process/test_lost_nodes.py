"""What was staged on a node that is lost, with all that was in its memory: real agents, a real coordinator, real ranks."""

from __future__ import annotations

import asyncio
import os
import signal
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from fakes.agents import SCRIPTS, AgentProcess, until
from fakes.coordinator import TOKEN, Process
from fakes.runtime import JOB, bounds
from fakes.staging import flip
from stormjib_checkpoint import layout
from stormjib_checkpoint.node_memory import staged
from stormjib_checkpoint.peers.lock import giver_lives
from stormjib_runtime.wire import GenerationId

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterator

pytestmark = pytest.mark.timeout(240)
START_S = 90.0
"""Three times torch on a machine that others use too."""
BOUNDS = bounds(2, 2, spares=1, processes=1, restarts_left=10)


class Job:
    """A coordinator, two agents that train and one that is spare; ranks whose second step never gets to the storage."""

    def __init__(self, folder: Path, coordinator: Process, peers: int) -> None:
        self.root, self.coordinator = folder / "root", coordinator
        url, command = f"http://127.0.0.1:{coordinator.port}", [str(SCRIPTS / "staged.py")]
        self.agents = [
            AgentProcess(
                folder,
                url,
                TOKEN,
                command,
                slot,
                STORMJIB_JOB_UID=JOB,
                STORMJIB_PROCESSES="1",
                STORMJIB_CHECKPOINT_ROOT=str(self.root),
                STORMJIB_CHECKPOINT_PEERS=str(peers),
            )
            for slot in range(3)
        ]

    def said(self, text: str, *slots: int) -> bool:
        return all(text in self.agents[slot].output() for slot in slots)

    def written(self, step: int) -> int:
        """Ranks whose part of a step is on the storage."""
        return len(list(self.root.glob(f"{layout.step_folder(step)}/*/rank-*.json")))

    def copied(self, giver: int, keeper: int | None = None) -> list[int]:
        """Steps of a slot that another one keeps; at first that is the other one of two."""
        copies = self.agents[1 - giver if keeper is None else keeper].copies
        return sorted(one.record.step for one in staged(copies / str(giver)))

    def is_given(self, giver: int) -> bool:
        """Whether a slot's copies are being given to the other one."""
        return giver_lives(self.agents[1 - giver].copies / str(giver))

    async def metrics(self) -> str:
        return (await self.coordinator.call("GET", "/metrics")).body.decode()

    def close(self) -> None:
        for agent in self.agents:
            print(agent.errors()[-2500:])
            agent.close()


@pytest.fixture
async def coordinator(tmp_path: Path) -> AsyncIterator[Process]:
    one = await Process.start(tmp_path)
    await one.put(BOUNDS)
    yield one
    await one.kill()


@pytest.fixture
def jobs() -> Iterator[list[Job]]:
    made: list[Job] = []
    yield made
    for one in made:
        one.close()


async def staged_everywhere(folder: Path, coordinator: Process, jobs: list[Job], peers: int) -> Job:
    """A job that has step 1 on its storage, and step 2 in the memory of both nodes alone."""
    job = Job(folder, coordinator, peers)
    jobs.append(job)
    await until(lambda: job.said("resumed from 0, staged 2", 0, 1), START_S)
    assert (job.written(1), job.written(2)) == (2, 0)
    return job


@pytest.mark.parametrize("lost", [0, 1])
async def test_a_staged_step_outlives_its_node(
    tmp_path: Path, coordinator: Process, jobs: list[Job], lost: int
) -> None:
    """Of the first member, whose successor opens the next generation, or of the second. The ranks compare every bit.

    Before that the process that gives and keeps copies has died on both, and has been started again.
    """
    job = await staged_everywhere(tmp_path, coordinator, jobs, peers=1)
    await until(lambda: job.copied(0) == job.copied(1) == [1, 2])
    for agent in job.agents[:2]:
        os.kill(copying(agent), signal.SIGKILL)
    await until(lambda: not (job.is_given(0) or job.is_given(1)))
    await until(lambda: job.is_given(0) and job.is_given(1))
    job.agents[lost].lose_node()
    assert not job.agents[lost].memory.exists()
    await until(lambda: job.said("resumed from 2, staged 4", 1 - lost, 2), START_S)
    state = await coordinator.state()
    assert state.history[-1].generation.id == GenerationId(1, 2)
    text = f"Adopted: step 2 of ranks {lost}, from copies of a lost node's memory"
    assert any(text in event for event in state.events)
    await until(lambda: job.copied(1 - lost, 2) == job.copied(2, 1 - lost) == [3, 4])
    async with asyncio.timeout(START_S):  # told with a heartbeat
        while "stormjib_checkpoint_copied_step 4" not in await job.metrics():
            await asyncio.sleep(0.1)
    assert not (job.agents[1 - lost].copies / str(lost)).exists(), "of no use any more"


async def test_without_copies_the_same_loss_costs_the_staged_step(
    tmp_path: Path, coordinator: Process, jobs: list[Job]
) -> None:
    job = await staged_everywhere(tmp_path, coordinator, jobs, peers=0)
    job.agents[1].lose_node()
    await until(lambda: job.said("resumed from 1, staged 3", 0, 2), START_S)
    assert not job.agents[0].copies.exists()


async def test_a_damaged_copy_is_refused_and_the_older_step_taken(
    tmp_path: Path, coordinator: Process, jobs: list[Job]
) -> None:
    job = await staged_everywhere(tmp_path, coordinator, jobs, peers=1)
    await until(lambda: job.copied(1) == [1, 2])
    copy = next(one for one in staged(job.agents[0].copies / "1") if one.record.step == 2)
    flip(copy.slot.data, copy.record.data.bytes - 5)
    job.agents[1].lose_node()
    await until(lambda: job.said("resumed from 1, staged 3", 0, 2), START_S)
    state = await coordinator.state()
    assert any("StagedLost: rank 1 of step 2 is lost with its rank" in event for event in state.events)


def copying(agent: AgentProcess) -> int:
    """Its process that gives and keeps copies."""
    words = {pid: Path(f"/proc/{pid}/cmdline").read_bytes() for pid in agent.below()}
    return next(pid for pid, line in words.items() if b"stormjib_checkpoint.peers" in line)
