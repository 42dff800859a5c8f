"""`launcher.kind: Torchrun`: the same agent runs a stock torchrun, which restarts its own workers."""

from __future__ import annotations

import os
import re
import signal
import time
from typing import TYPE_CHECKING

import pytest

from fakes.agents import SCRIPTS, AgentProcess, alive, until
from fakes.scripted import TOKEN, ScriptedCoordinator, new_order
from stormjib_runtime.wire import AgentPhase, Do

if TYPE_CHECKING:
    from pathlib import Path

WORKER = re.compile(r"worker (\d) of 2, pid (\d+), attempt (\d)")


@pytest.mark.timeout(180)
async def test_torchrun_survives_the_kill_of_a_rank(tmp_path: Path) -> None:
    """torch is imported by the store, by torchrun, and twice by each worker: most of the time goes there."""
    async with ScriptedCoordinator() as coordinator:
        agent = AgentProcess(
            tmp_path, coordinator.url, TOKEN, [str(SCRIPTS / "worker.py")], STORMJIB_LAUNCHER="Torchrun"
        )
        try:
            started = await coordinator.run(1, limit_s=60, restarts_left=2)
            assert [rank.exit for rank in started.ranks] == [None, None]
            await until(lambda: len(WORKER.findall(agent.output())) == 2, 60)
            pids = {int(pid) for _, pid, _ in WORKER.findall(agent.output())}
            killed = time.monotonic()
            os.kill(min(pids), signal.SIGKILL)
            await until(lambda: len(WORKER.findall(agent.output())) == 4, 60)
            print(f"rank killed -> all have done a collective: {time.monotonic() - killed:.2f} s")
            said = WORKER.findall(agent.output())
            assert [attempt for _, _, attempt in said] == ["0", "0", "1", "1"]
            assert not any(alive(pid) for pid in pids)
            now = coordinator.reports[0]
            assert (now.phase, now.generation) == (AgentPhase.RUNNING, started.generation)
            assert [rank.exit for rank in now.ranks] == [None, None]
            tree = agent.below()
            assert len(tree) >= 4
            await coordinator.order(0, new_order(Do.WAIT))
            await coordinator.until(lambda report: report.phase is AgentPhase.IDLE)
            assert [pid for pid in tree if alive(pid)] == []
        finally:
            print(agent.errors()[-3000:])
            agent.close()
