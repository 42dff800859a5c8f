"""How trees end, and what they leave: with real small processes, no torch."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
from typing import TYPE_CHECKING

import pytest

from fakes.agents import alive, until
from stormjib_health.sampler.proc import Stat, descendants
from stormjib_runtime.processes import end_descendants, leftovers, remove_files

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path

PARENT = """
import os, signal, time
from stormjib_runtime.processes import become_subreaper
become_subreaper()
if os.fork() == 0:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    if os.fork() == 0:
        os.setsid()
        if os.fork() != 0:
            os._exit(0)  # what is left is a daemon
    time.sleep(60)
while True:
    os.wait()
"""


@pytest.fixture
async def parent() -> AsyncIterator[int]:
    """A process as the agent is, with a child and a daemon below it that have no tie to each other any more."""
    process = await asyncio.to_thread(subprocess.Popen, [sys.executable, "-c", PARENT])
    await until(lambda: [stat.parent for stat in living(process.pid)] == [process.pid, process.pid])
    yield process.pid
    for pid in (*(stat.pid for stat in descendants(process.pid)), process.pid):
        os.kill(pid, signal.SIGKILL)
    await asyncio.to_thread(process.wait)


def living(root: int) -> list[Stat]:
    return [stat for stat in descendants(root) if stat.state != "Z"]


@pytest.mark.parametrize("stopped", [False, True])
async def test_a_whole_tree_ends_with_its_daemon(parent: int, stopped: bool) -> None:
    tree = {stat.pid for stat in living(parent)}
    for pid in tree if stopped else ():
        os.kill(pid, signal.SIGSTOP)
    kept = max(tree)
    assert await end_descendants(parent, lambda: {kept}) == sorted(tree - {kept})
    assert {stat.pid for stat in living(parent)} == {kept}
    await end_descendants(parent, lambda: ())
    assert living(parent) == []
    assert not any(alive(pid) for pid in tree)


def test_what_killed_ranks_left_on_dev_shm() -> None:
    before = {"other", "torch_77_1_0"}
    now = {"other", "torch_77_1_0", "torch_9_2_0", "torch_99_2_0", "psm_ab12", "stormjib-job-0"}
    assert leftovers(before, now, [9, 77], alone=False) == ["torch_9_2_0"]
    assert leftovers(before, now, [9], alone=True) == ["psm_ab12", "torch_99_2_0", "torch_9_2_0"]


def test_only_plain_files_are_removed(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "folder").mkdir()
    remove_files(["file", "folder", "gone"], tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["folder"]
