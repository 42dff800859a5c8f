"""What ranks have staged outlives them and their container: the next generation resumes from it, with real agents and ranks."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from fakes.agents import SCRIPTS, AgentProcess, comm, until
from fakes.runs import TINY, Run
from fakes.scripted import TOKEN, ScriptedCoordinator, new_order
from stormjib_checkpoint import layout
from stormjib_checkpoint.ledger import audit
from stormjib_checkpoint.node_memory import staged
from stormjib_checkpoint.storage import Local
from stormjib_health.sampler.proc import descendants
from stormjib_runtime.wire import Cause, Do

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterator

pytestmark = pytest.mark.timeout(150)


@pytest.fixture
async def coordinator() -> AsyncIterator[ScriptedCoordinator]:
    async with ScriptedCoordinator() as one:
        yield one


async def test_a_staged_step_outlives_its_rank_and_its_container(
    coordinator: ScriptedCoordinator, tmp_path: Path
) -> None:
    agent = AgentProcess(
        tmp_path,
        coordinator.url,
        TOKEN,
        [str(SCRIPTS / "staged.py")],
        STORMJIB_PROCESSES="1",
        STORMJIB_CHECKPOINT_ROOT=str(tmp_path / "root"),
    )
    memory = agent.memory
    try:
        await coordinator.run(1)
        await until(lambda: "resumed from 0, staged 2" in agent.output(), 60)
        os.kill(next(pid for pid in agent.below() if comm(pid) == "rank0"), signal.SIGKILL)
        await coordinator.until(lambda report: any(rank.exit == -signal.SIGKILL for rank in report.ranks))
        report = await coordinator.run(2, Cause.RANK_EXIT)
        assert report.resume is not None
        assert report.resume.step == 2
        assert any("Adopted: step 2 of ranks 0" in event for event in report.events)

        await until(lambda: "resumed from 2, staged 4" in agent.output(), 60)
        agent.kill_container()
        assert memory.exists()
        agent.restart()
        report = await coordinator.until(lambda report: report.agent == 2, limit_s=60)
        assert any("Adopted: step 4 of ranks 0" in event for event in report.events)
        report = await coordinator.run(3, Cause.CONTAINER_EXIT)
        assert report.resume is not None
        assert report.resume.step == 4
        await until(lambda: "resumed from 4, staged 6" in agent.output(), 60)
        await coordinator.order(0, new_order(Do.FINISH))
        assert await agent.exit() == 0
        assert not memory.exists()
    finally:
        print(agent.errors()[-2000:])
        agent.close()


@pytest.fixture
def runs() -> Iterator[list[Run]]:
    made: list[Run] = []
    yield made
    for run in made:
        run.close()


async def test_a_trainer_goes_on_from_what_all_its_ranks_had_staged(runs: list[Run], tmp_path: Path) -> None:
    """Saving every step. Its ranks are stopped at a moment when they have staged more than the storage has, and one is killed."""
    root, config = tmp_path / "root", tmp_path / "tiny.toml"
    config.write_text(TINY.format(steps=10_000))
    env = {"STORMJIB_CHECKPOINT_ROOT": str(root), "STORMJIB_CHECKPOINT_INTERVAL": "1"}
    run = Run(tmp_path, "--nproc-per-node=2", "-m", "stormjib_trainer", "--config", str(config), **env)
    runs.append(run)
    await until(lambda: (root / "step-00000003").exists(), 60)
    pids = [stat.pid for stat in descendants(run.process.pid) if comm(stat.pid) in ("rank0", "rank1")]
    memory = memory_of(pids[0])
    step = caught(pids, memory, root)
    os.kill(pids[1], signal.SIGKILL)
    await until(lambda: "Run 1.2 (RankExit)" in run.err, 30)
    assert f"Run 1.2 (RankExit): 2 ranks, resumes from step {step}\n" in run.err
    assert f"Adopted: step {step} of ranks" in run.err
    run.process.send_signal(signal.SIGTERM)
    assert await run.exit() == 128 + signal.SIGTERM
    assert not memory.exists()


async def test_a_trainer_loses_only_a_few_steps_where_it_hardly_ever_saves(
    runs: list[Run], tmp_path: Path
) -> None:
    """Between saves it stages: as often as it costs next to nothing, and no further than the node's memory."""
    root, config = tmp_path / "root", tmp_path / "tiny.toml"
    config.write_text(TINY.format(steps=10_000))
    env = {"STORMJIB_CHECKPOINT_ROOT": str(root), "STORMJIB_CHECKPOINT_INTERVAL": "9000"}
    run = Run(tmp_path, "--nproc-per-node=2", "-m", "stormjib_trainer", "--config", str(config), **env)
    runs.append(run)
    await until(lambda: '"step":2,' in run.out, 60)
    pids = [stat.pid for stat in descendants(run.process.pid) if comm(stat.pid) in ("rank0", "rank1")]
    memory = memory_of(pids[0])
    await until(lambda: max((one.record.step for one in staged(memory)), default=0) > 20, 60)
    step = caught(pids, memory, root)
    assert step > 2
    assert not list(root.glob("step-*"))
    os.kill(pids[1], signal.SIGKILL)
    await until(lambda: "Run 1.2 (RankExit)" in run.err, 30)
    assert f"Run 1.2 (RankExit): 2 ranks, resumes from step {step}\n" in run.err
    run.process.send_signal(signal.SIGTERM)
    assert await run.exit() == 128 + signal.SIGTERM
    found = audit(Local(root))
    assert found.last >= step
    assert set(found.steps) == set(range(1, found.last + 1)), (
        "what was fed in steps that were only staged is told too"
    )
    assert not found.problems
    assert not found.twice()


def caught(pids: list[int], memory: Path, root: Path, limit_s: float = 30.0) -> int:
    """Stop the ranks at a moment when the newest step that both have staged is not written by both. That step."""
    deadline = time.monotonic() + limit_s
    while time.monotonic() < deadline:
        for pid in pids:
            os.kill(pid, signal.SIGSTOP)
        both = [one.record for one in staged(memory)]
        steps = [{one.step for one in both if one.rank == rank} for rank in (0, 1)]
        newest = max(steps[0] & steps[1], default=-1)
        written = {path.name for path in root.glob(f"{layout.step_folder(newest)}/g1.1/rank-*.json")}
        if newest > 0 and len(written) < 2:
            return newest
        for pid in pids:
            os.kill(pid, signal.SIGCONT)
        time.sleep(0.003)  # let them go on: the moment that is wanted comes and goes in each step
    raise TimeoutError("both ranks had always written what they had staged")


def memory_of(rank: int) -> Path:
    """The folder that a rank stages in, by what it has mapped."""
    lines = Path(f"/proc/{rank}/maps").read_text().splitlines()
    return next(Path(line.split()[-1]).parents[2] for line in lines if line.endswith("/0/data"))
