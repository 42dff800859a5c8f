"""A process that saves is killed at any moment, or ends without waiting: the newest committed step loads, whole."""

from __future__ import annotations

import asyncio
import os
import random
import signal
from typing import TYPE_CHECKING

import pytest
import pytest_asyncio
import torch

from fakes.agents import SCRIPTS
from fakes.gateway import environment, gateway
from fakes.lives import next_life
from fakes.warm import Warm
from stormjib_checkpoint.adopting import adopt
from stormjib_checkpoint.history import committed, highest
from stormjib_checkpoint.node_memory import staged
from stormjib_checkpoint.opening import open_next
from stormjib_checkpoint.reader import load
from stormjib_checkpoint.storage import Local
from stormjib_checkpoint.stores.urls import open_storage
from stormjib_checkpoint.verify import verify

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path

    from stormjib_checkpoint.storage import Storage

pytestmark = pytest.mark.timeout(120)
SCRIPT = str(SCRIPTS / "saving.py")
DYING = str(SCRIPTS / "dying.py")
KILLS = 12


@pytest_asyncio.fixture(loop_scope="module", scope="module")
async def warm(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Warm]:
    one = Warm(tmp_path_factory.mktemp("warm"))
    one.env["PYTHONPATH"] += f"{os.pathsep}{SCRIPTS.parents[1]}"
    async with one:
        yield one


def newest_is_whole(storage: Storage) -> int:
    point = committed(storage)[0]
    assert [flaw for _, flaw in verify(storage, point)] == [None]
    state = {"table": torch.zeros(3_000_000)}
    assert load(storage, point, state) == {"step": point.step}
    assert bool((state["table"] == point.step).all())
    return point.step


@pytest.mark.asyncio(loop_scope="module")
async def test_a_save_that_was_begun_is_finished_when_the_script_ends(warm: Warm, tmp_path: Path) -> None:
    done = await warm.fork(SCRIPT, str(tmp_path), "3")
    assert (done.exit, done.err) == (0, "")
    assert newest_is_whole(Local(tmp_path)) == 3
    done = await warm.python(SCRIPT, str(tmp_path), "2")
    assert (done.exit, done.err) == (0, "")
    assert newest_is_whole(Local(tmp_path)) == 5


@pytest.mark.asyncio(loop_scope="module")
async def test_killed_at_any_moment_it_goes_on_from_a_whole_step(warm: Warm, tmp_path: Path) -> None:
    await killed_and_again(warm, str(tmp_path), Local(tmp_path), (0.05, 0.6))


@pytest.mark.timeout(900)  # with nothing cached the server is built first
@pytest.mark.asyncio(loop_scope="module")
async def test_killed_at_any_moment_of_an_upload_too(
    warm: Warm, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with gateway(tmp_path) as server:
        url, env = f"s3://{server.bucket()}/job", environment(server.address)
        for name, value in env.items():
            monkeypatch.setenv(name, value)
        await killed_and_again(warm, url, open_storage(url), (0.3, 1.2), **env)


async def killed_and_again(
    warm: Warm, root: str, storage: Storage, within_s: tuple[float, float], **env: str
) -> None:
    chance = random.Random(7)
    reached = 0
    for _ in range(KILLS):
        done = await warm.fork(SCRIPT, root, "1000000", str(chance.uniform(*within_s)), **env)
        assert done.exit == -signal.SIGALRM, done.err
        if committed(storage):
            found = newest_is_whole(storage)
            assert found >= reached
            reached = found
    assert reached > 5


@pytest.mark.asyncio(loop_scope="module")
async def test_killed_at_any_moment_it_goes_on_from_the_newest_step_that_was_staged(
    warm: Warm, tmp_path: Path
) -> None:
    """What the rank has staged and not yet written is finished from the node's memory by who survives it."""
    root, memory = tmp_path / "job", tmp_path / "memory"
    chance, ahead = random.Random(11), 0
    for _ in range(KILLS):
        seconds = str(chance.uniform(0.05, 0.6))
        done = await warm.fork(SCRIPT, str(root), "1000000", seconds, str(memory))
        assert done.exit == -signal.SIGALRM, done.err
        in_memory = max((one.record.step for one in staged(memory)), default=0)
        written = max((point.step for point in committed(Local(root))), default=0) if root.exists() else 0
        ahead += in_memory > written
        adopted = adopt(Local(root), memory)
        assert adopted.notes == ()
        if highest(Local(root)) is not None:
            open_next(Local(root))  # as the next run does: it commits what is complete
        if in_memory:
            assert newest_is_whole(Local(root)) == max(in_memory, written)
    assert ahead > 3, "most kills shall come between staging and the disk, or this shows nothing"


SPOILED, FINISHED = 2, 3
"""The step that is found: the one before, or the one in which a rank was killed, which the next generation commits if nobody has."""
PLACES = [
    *[
        (place, victims, SPOILED)
        for place in ("copying", "staged", "writing", "written")
        for victims in ("0", "1")
    ],
    ("writing", "01", SPOILED),
    *[("left", victims, FINISHED) for victims in ("0", "1", "01")],
    ("committing", "0", FINISHED),
    ("committed", "0", FINISHED),
]


async def two_ranks(warm: Warm, root: Path, place: str, how: str, victims: str, wait_s: float) -> list[int]:
    """How both ended."""
    words = (DYING, str(root), place, how, victims, str(wait_s))
    ranks = [warm.fork(*words, RANK=str(rank), WORLD_SIZE="2") for rank in (0, 1)]
    return [done.exit for done in await asyncio.gather(*ranks)]


@pytest.mark.parametrize(("place", "victims", "found"), PLACES)
@pytest.mark.asyncio(loop_scope="module")
async def test_ranks_killed_in_each_state_of_a_save_leave_a_whole_step(
    warm: Warm, tmp_path: Path, place: str, victims: str, found: int
) -> None:
    wait_s = 0.1 if found == SPOILED else 60.0  # for a part that never comes, or that comes
    exits = await two_ranks(warm, tmp_path / "job", place, "SIGKILL", victims, wait_s)
    assert exits == [-signal.SIGKILL if str(rank) in victims else 0 for rank in (0, 1)]
    assert next_life(Local(tmp_path / "job")) == found


@pytest.mark.parametrize(("how", "code", "found"), [("SIGTERM", -15, SPOILED), ("handled", 143, FINISHED)])
@pytest.mark.asyncio(loop_scope="module")
async def test_a_rank_that_is_told_to_end_finishes_its_save_where_the_script_ends(
    warm: Warm, tmp_path: Path, how: str, code: int, found: int
) -> None:
    wait_s = 0.1 if found == SPOILED else 60.0
    assert await two_ranks(warm, tmp_path / "job", "writing", how, "1", wait_s) == [0, code]
    assert next_life(Local(tmp_path / "job")) == found
