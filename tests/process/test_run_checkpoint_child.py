"""The agent's client of the checkpoint child, with the real child on a real folder. No torch."""

from __future__ import annotations

import asyncio
import os
import signal
from typing import TYPE_CHECKING

import pytest

from stormjib_runtime.checkpoint_child import CheckpointChild
from stormjib_runtime.children import Children
from stormjib_runtime.errors import CheckpointError
from stormjib_runtime.output import Outputs
from stormjib_runtime.wire import GenerationId, StorageFinding

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path

FIRST, SECOND = GenerationId(1, 1), GenerationId(1, 2)


@pytest.fixture
async def child(tmp_path: Path) -> AsyncIterator[CheckpointChild]:
    loop = asyncio.get_running_loop()
    children = Children(loop, lambda pid, status: None)
    one = CheckpointChild(children, str(tmp_path / "root"), os.environ, Outputs(loop))
    yield one
    one.close()
    while children.pids:
        await asyncio.sleep(0.01)
    children.close()


async def test_a_generation_is_opened_and_found(child: CheckpointChild) -> None:
    assert await child.scan() is None
    assert await child.open(FIRST, None, "job", ()) is None
    assert await child.scan() == StorageFinding(FIRST, "job")
    with pytest.raises(CheckpointError, match=r"^open: .*1\.1"):
        await child.open(FIRST, None, "another job", ())


async def test_a_commit_that_waits_for_ranks_holds_nothing_up(child: CheckpointChild) -> None:
    await child.open(FIRST, None, "job", ())
    commit = asyncio.create_task(child.commit(FIRST, 2, 10, 3))
    await child.open(SECOND, FIRST, "job", ())
    assert not commit.done()
    commit.cancel()


async def test_a_child_that_dies_fails_its_requests_and_is_started_again(child: CheckpointChild) -> None:
    await child.open(FIRST, None, "job", ())
    commit = asyncio.create_task(child.commit(FIRST, 2, 10, 3))
    await child.scan()
    pid = child.pid
    os.kill(pid, signal.SIGKILL)
    with pytest.raises(CheckpointError, match="the checkpoint child exited with -9"):
        await commit
    assert await child.scan() == StorageFinding(FIRST, "job")
    assert child.pid != pid
