"""Streams from the coordinators: one task per job asks for the state again and again, and tells when something changed.

The stream is also the heartbeat of the coordinator. A missed one is a request that was not answered in time, counted,
not a point in time that has passed: an operator that was itself asleep for a minute has missed nothing.
"""

from __future__ import annotations

import asyncio
import logging
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import aiohttp

from stormjib_operator.errors import CoordinatorError
from stormjib_operator.observed import Link
from stormjib_operator.slots import SILENT_S
from stormjib_operator.verdicts import sure
from stormjib_runtime.codec import MAX_BYTES, DecodeError, decode, encode
from stormjib_runtime.wire import HEARTBEAT_S, HEARTBEATS_MISSED, PROTOCOL, Bounds, JobState

if TYPE_CHECKING:
    from collections.abc import Callable

    from stormjib_operator.observed import Target
    from stormjib_operator.queue import Key

LONG_POLL_S = HEARTBEAT_S + 0.3
"""A coordinator answers at least each heartbeat; a little more is the way there and back."""
ASK_S = 0.8
"""After a miss nothing is waited for: the answer is due at once. Three misses take 3.3 s at most."""
REST_S = 0.4
"""Between two answers: a job that steps a hundred times a second is not asked a hundred times a second."""
MISSES_UNHEARD = 30
"""Misses of a Ready coordinator that this operator has never heard: perhaps only we cannot reach it, and a new one
would be no better."""

_log = logging.getLogger(__name__)


@dataclass
class _Stream:
    """One job's stream: where it goes, what it said last, and the task that asks."""

    target: Target
    token: str
    task: asyncio.Task[None] | None = None
    state: JobState | None = None
    misses: int = 0
    heard_at: float = 0.0

    @property
    def lost(self) -> bool:
        limit = HEARTBEATS_MISSED if self.state is not None else MISSES_UNHEARD
        return self.misses >= limit and self.target.ready


class Streams:
    """All streams. `changed` is called with a job's key whenever a look at it is worth while."""

    def __init__(self, session: aiohttp.ClientSession, changed: Callable[[Key], None]) -> None:
        self._session = session
        self._changed = changed
        self._streams: dict[Key, _Stream] = {}

    def __len__(self) -> int:
        return len(self._streams)

    def aim(self, key: Key, target: Target | None, token: str = "") -> None:
        """Listen to that coordinator from now on, or to none."""
        stream = self._streams.get(key)
        if stream is not None and target is not None and stream.target.pod_uid == target.pod_uid:
            stream.target = target
            return
        if stream is not None:
            self._stop(key)
        if target is not None:
            fresh = _Stream(target, token, heard_at=_now())
            self._streams[key] = fresh
            fresh.task = asyncio.create_task(self._follow(key, fresh), name=f"stream {key}")

    def link(self, key: Key) -> Link:
        """What is known of the job's coordinator."""
        stream = self._streams.get(key)
        if stream is None:
            return Link()
        return Link(stream.target.pod_uid, stream.state, stream.lost, _now() - stream.heard_at)

    async def push(self, key: Key, bounds: Bounds) -> None:
        """Give the coordinator these bounds. Raises CoordinatorError."""
        stream = self._streams.get(key)
        if stream is not None:
            self._hear(key, stream, await self._ask(stream, "PUT", "/v1/bounds", ASK_S, body=encode(bounds)))

    async def close(self) -> None:
        """End all streams."""
        tasks = [stream.task for stream in self._streams.values() if stream.task]
        for key in list(self._streams):
            self._stop(key)
        await asyncio.gather(*tasks, return_exceptions=True)

    def _stop(self, key: Key) -> None:
        task = self._streams.pop(key).task
        if task is not None:
            task.cancel()

    async def _follow(self, key: Key, stream: _Stream) -> None:
        while True:
            begun = _now()
            try:
                state = await self._state(stream)
            except CoordinatorError as error:
                self._miss(key, stream, error)
            else:
                self._hear(key, stream, state)
            # A coordinator that refuses at once (its container is starting) must not use up its misses in no time.
            pause = ASK_S if stream.misses and stream.state is not None else REST_S
            await asyncio.sleep(max(0.0, pause - (_now() - begun)))

    async def _state(self, stream: _Stream) -> JobState:
        above = f"above={stream.target.above}" if stream.target.above else ""
        if stream.state is None or stream.misses:
            return await self._ask(stream, "GET", f"/v1/state?{above}", ASK_S)
        path = f"/v1/state?after={stream.state.version}" + (f"&{above}" if above else "")
        return await self._ask(stream, "GET", path, LONG_POLL_S)

    async def _ask(
        self, stream: _Stream, method: str, path: str, seconds: float, body: bytes | None = None
    ) -> JobState:
        headers = {"Authorization": f"Bearer {stream.token}", "Content-Type": "application/json"}
        timeout = aiohttp.ClientTimeout(total=seconds)
        try:
            async with self._session.request(
                method, stream.target.address + path, data=body, headers=headers, timeout=timeout
            ) as answer:
                data = await answer.content.read(MAX_BYTES + 1)
                while chunk := await answer.content.read(MAX_BYTES + 1 - len(data)):
                    data += chunk
        except (aiohttp.ClientError, TimeoutError, OSError) as error:
            raise CoordinatorError(f"{method} {path}: {error!r}") from error
        if answer.status != 200:
            raise CoordinatorError(f"{method} {path}: {answer.status} {data[:300]!r}")
        return _checked(stream, data)

    def _hear(self, key: Key, stream: _Stream, state: JobState) -> None:
        news = stream.state is None or gist(state) != gist(stream.state)
        was_lost, stream.misses, stream.heard_at = stream.lost, 0, _now()
        stream.state = state
        if news or was_lost:
            self._changed(key)

    def _miss(self, key: Key, stream: _Stream, error: CoordinatorError) -> None:
        was_lost = stream.lost
        stream.misses += 1
        _log.debug("coordinator of %s, miss %d: %s", key, stream.misses, error)
        if stream.lost and not was_lost:
            _log.warning("coordinator of %s is lost: %s", key, error)
            self._changed(key)


def gist(state: JobState) -> JobState:
    """The state without what changes all the time: two states with the same gist need no look at the job."""
    agents = tuple(replace(view, silent_s=float(view.silent_s >= SILENT_S)) for view in state.agents)
    found = sure(state)
    return replace(state, version=0, step=-1, loss=None, committed=None, agents=agents, verdicts=found)


def _checked(stream: _Stream, data: bytes) -> JobState:
    try:
        state = decode(JobState, data)
    except DecodeError as error:
        raise CoordinatorError(f"not a JobState: {error}") from error
    if state.protocol != PROTOCOL or state.job_uid != stream.target.job_uid:
        raise CoordinatorError(f"state of protocol {state.protocol} and job {state.job_uid[:64]} is not ours")
    return state


def _now() -> float:
    return asyncio.get_running_loop().time()
