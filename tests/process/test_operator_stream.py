"""Streams against a coordinator that a test plays: news, silence, and answers that cannot be used."""

from __future__ import annotations

import asyncio
import time
from dataclasses import replace
from typing import TYPE_CHECKING

import aiohttp
import pytest
from aiohttp import web

from stormjib_operator.coordinator_client import Streams, gist
from stormjib_operator.errors import CoordinatorError
from stormjib_operator.observed import Target
from stormjib_operator.queue import Key
from stormjib_runtime.codec import decode, encode
from stormjib_runtime.wire import PROTOCOL, AgentPhase, AgentView, Bounds, JobPhase, JobState

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable

KEY = Key("ns", "j")
STATE = JobState(PROTOCOL, "uid", 1, 1, JobPhase.RUNNING, step=3)


class Played:
    """A coordinator whose answers a test sets."""

    def __init__(self) -> None:
        self.state = STATE
        self.answer: Callable[[], Awaitable[web.Response]] | None = None
        self.asked: list[str] = []
        self.tokens: set[str] = set()
        self.bounds: list[Bounds] = []
        self.address = ""

    async def on_state(self, request: web.Request) -> web.Response:
        self.asked.append(request.query_string)
        self.tokens.add(request.headers["Authorization"])
        if self.answer is not None:
            return await self.answer()
        if request.query.get("after") == str(self.state.version):
            await asyncio.sleep(0.3)  # a heartbeat, shortened
        return web.Response(body=encode(self.state))

    async def on_bounds(self, request: web.Request) -> web.Response:
        self.bounds.append(decode(Bounds, await request.read()))
        return web.Response(body=encode(self.state))


class Scene:
    """A played coordinator, streams towards it, and what they told."""

    def __init__(self, played: Played, streams: Streams, told: list[Key]) -> None:
        self.played, self.streams, self.told = played, streams, told
        self.target = Target("pod-1", "uid", played.address, ready=True, above="1.4")

    def aim(self) -> None:
        self.streams.aim(KEY, self.target, "secret")

    async def until(self, true: Callable[[], object], seconds: float = 10.0) -> float:
        """Seconds until it was true."""
        begun = time.monotonic()
        while not true():
            assert time.monotonic() - begun < seconds, "not in time"
            await asyncio.sleep(0.02)
        return time.monotonic() - begun


@pytest.fixture
async def scene() -> AsyncIterator[Scene]:
    played = Played()
    told: list[Key] = []
    app = web.Application()
    app.router.add_get("/v1/state", played.on_state)
    app.router.add_put("/v1/bounds", played.on_bounds)
    runner = web.AppRunner(app, access_log=None, shutdown_timeout=0.1)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    played.address = f"http://127.0.0.1:{runner.addresses[0][1]}"
    async with aiohttp.ClientSession() as session:
        streams = Streams(session, told.append)
        yield Scene(played, streams, told)
        await streams.close()
    await runner.cleanup()


async def silent() -> web.Response:
    """As a cut node answers."""
    await asyncio.sleep(30)
    return web.Response()


async def test_the_first_state_is_news_and_steps_alone_are_not(scene: Scene) -> None:
    scene.aim()
    await scene.until(lambda: scene.told)
    scene.told.clear()
    scene.played.state = replace(STATE, version=2, step=9, loss=1.5)
    await scene.until(lambda: (s := scene.streams.link(KEY).state) and s.step == 9)
    assert scene.told == []
    scene.played.state = replace(STATE, version=3, phase=JobPhase.COMPLETE)
    await scene.until(lambda: scene.told)


async def test_it_asks_with_its_token_for_what_it_does_not_know(scene: Scene) -> None:
    scene.aim()
    await scene.until(lambda: len(scene.played.asked) >= 2)
    assert scene.played.asked[:2] == ["above=1.4", "after=1&above=1.4"]
    assert scene.played.tokens == {"Bearer secret"}


async def test_silence_is_a_loss_after_three_missed_heartbeats(scene: Scene) -> None:
    scene.aim()
    await scene.until(lambda: scene.streams.link(KEY).state)
    scene.told.clear()
    scene.played.answer = silent
    took = await scene.until(lambda: scene.streams.link(KEY).lost)
    assert 2.4 <= took <= 4.5
    assert scene.told == [KEY]
    assert scene.streams.link(KEY).silent_s >= 2.4


async def test_a_coordinator_that_is_not_ready_is_not_lost(scene: Scene) -> None:
    scene.target = replace(scene.target, ready=False)
    scene.aim()
    await scene.until(lambda: scene.streams.link(KEY).state)
    scene.played.answer = silent
    await asyncio.sleep(4.0)
    assert not scene.streams.link(KEY).lost
    scene.target = replace(scene.target, ready=True)
    scene.aim()
    assert scene.streams.link(KEY).lost


async def test_an_operator_that_slept_itself_has_missed_nothing(scene: Scene) -> None:
    scene.aim()
    await scene.until(lambda: scene.streams.link(KEY).state)
    time.sleep(4.0)  # the whole process stands still, as under SIGSTOP  # noqa: ASYNC251
    await asyncio.sleep(0.1)
    assert not scene.streams.link(KEY).lost


async def test_an_answer_heals(scene: Scene) -> None:
    scene.aim()
    await scene.until(lambda: scene.streams.link(KEY).state)
    scene.played.answer = silent
    await scene.until(lambda: scene.streams.link(KEY).lost)
    scene.told.clear()
    scene.played.answer = None
    await scene.until(lambda: not scene.streams.link(KEY).lost)
    assert scene.told == [KEY]


@pytest.mark.parametrize(
    "body",
    [
        b"{}",
        b"not json",
        encode(replace(STATE, job_uid="another")),
        encode(replace(STATE, protocol=99)),
        b"[" * 2_000_000,
    ],
)
async def test_an_answer_that_cannot_be_used_is_a_miss(scene: Scene, body: bytes) -> None:
    async def answer() -> web.Response:
        return web.Response(body=body)

    scene.played.answer = answer
    scene.aim()
    await scene.until(lambda: len(scene.played.asked) >= 2)
    assert scene.streams.link(KEY).state is None


async def test_bounds_reach_the_coordinator_and_its_answer_is_heard(scene: Scene) -> None:
    scene.aim()
    await scene.until(lambda: scene.streams.link(KEY).state)
    scene.played.state = replace(STATE, version=5, bounds_version=7)
    await scene.streams.push(KEY, Bounds(7, 1, 1, 2, 1, 2))
    assert [bounds.version for bounds in scene.played.bounds] == [7]
    state = scene.streams.link(KEY).state
    assert state is not None
    assert state.bounds_version == 7


async def test_bounds_that_are_refused_are_an_error(scene: Scene) -> None:
    scene.aim()
    await scene.until(lambda: scene.streams.link(KEY).state)
    scene.streams.aim(KEY, replace(scene.target, pod_uid="pod-2", address=scene.played.address + "/nowhere"))
    with pytest.raises(CoordinatorError, match="404"):
        await scene.streams.push(KEY, Bounds(7, 1, 1, 2, 1, 2))


async def test_another_pod_is_another_stream(scene: Scene) -> None:
    scene.aim()
    await scene.until(lambda: scene.streams.link(KEY).state)
    scene.streams.aim(KEY, replace(scene.target, pod_uid="pod-2", address="http://127.0.0.1:9"))
    assert scene.streams.link(KEY).state is None
    scene.streams.aim(KEY, None)
    assert len(scene.streams) == 0


def test_an_agent_that_becomes_silent_is_news_once() -> None:
    view = AgentView(1, 1, "p", AgentPhase.IDLE, member=False)
    states = [replace(STATE, agents=(replace(view, silent_s=s),)) for s in (0.1, 8.0, 10.5, 40.0)]
    assert gist(states[0]) == gist(states[1])
    assert gist(states[1]) != gist(states[2])
    assert gist(states[2]) == gist(states[3])
