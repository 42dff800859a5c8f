"""The agent's client of the checkpoint child, with the real child on a real folder. No torch."""

from __future__ import annotations

import asyncio
import contextlib
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
    from collections.abc import AsyncIterator, Mapping
    from pathlib import Path

FIRST, SECOND = GenerationId(1, 1), GenerationId(1, 2)


@contextlib.asynccontextmanager
async def started(root: str, env: Mapping[str, str] = os.environ) -> AsyncIterator[CheckpointChild]:
    loop = asyncio.get_running_loop()
    children = Children(loop, lambda pid, status: None)
    one = CheckpointChild(children, root, env, Outputs(loop))
    yield one
    one.close()
    while children.pids:
        await asyncio.sleep(0.01)
    children.close()


@pytest.fixture
async def child(tmp_path: Path) -> AsyncIterator[CheckpointChild]:
    async with started(str(tmp_path / "root")) as one:
        yield one


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


async def test_a_client_that_the_image_lacks_is_named_with_the_fix(tmp_path: Path) -> None:
    (tmp_path / "obstore.py").write_text("raise ImportError('hidden')")
    env = {**os.environ, "PYTHONPATH": str(tmp_path)}
    async with started("s3://bucket/run", env) as child:
        with pytest.raises(
            CheckpointError, match=r"s3://bucket: this needs obstore, .* pip install 'stormjib"
        ):
            await child.scan()


@pytest.mark.parametrize(
    ("url", "given", "fix"),
    [
        ("s3://bucket/run", {"AWS_ACCESS_KEY_ID": "half"}, "Give AWS_ACCESS_KEY_ID and AWS_SECRET"),
        ("gs://bucket/run", {"GOOGLE_SERVICE_ACCOUNT_KEY": "{}"}, "Give the whole JSON of a key"),
        ("az://container/run", {}, "Give AZURE_STORAGE_ACCOUNT_NAME"),
    ],
)
async def test_an_environment_that_a_client_cannot_be_made_of_is_refused_in_words_of_ours(
    url: str, given: dict[str, str], fix: str
) -> None:
    theirs = ("AWS_", "AZURE_", "GOOGLE_")
    env = {name: value for name, value in os.environ.items() if not name.startswith(theirs)} | given
    async with started(url, env) as child:
        with pytest.raises(CheckpointError, match=f"{url[:-4]}: .*{fix}") as caught:
            await child.scan()
        assert "Traceback" not in str(caught.value)
