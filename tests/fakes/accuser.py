"""A coordinator of the test's own, over real HTTP: it says what a test makes it say, true or forged.

`OutsideOperator` is the operator's own code (stream, reconciler, reporter) in a thread of the test, as the operator's
ServiceAccount, with its streams turned to such a coordinator: so a test decides what a tenant's coordinator says, and
everything behind it is real.
"""

from __future__ import annotations

import asyncio
import threading
from contextlib import suppress
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Self

import aiohttp
from aiohttp import web

from stormjib_health.verdict import Accusation, Scope, Syndrome, Verdict
from stormjib_operator.cluster import ApiServer
from stormjib_operator.coordinator_client import Streams
from stormjib_operator.events import Recorder
from stormjib_operator.isolation.reporter import Reporter
from stormjib_operator.queue import Key, WorkQueue
from stormjib_operator.reconcile import Reconciler
from stormjib_runtime.codec import decode, encode
from stormjib_runtime.wire import (
    PROTOCOL,
    Bounds,
    Cause,
    Generation,
    GenerationId,
    JobPhase,
    JobState,
    Member,
)

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from stormjib_operator.observed import Render, Target

HEARTBEAT_S = 1.0


def accusation(number: int, slot: int, pod_uid: str, **change: Any) -> Accusation:
    """A verdict that a rank of the slot hangs, as heavy as a job's word can be."""
    told: dict[str, Any] = {
        "syndrome": Syndrome.NON_COMMUNICATION_HANG,
        "scope": Scope.RANK,
        "culprits": (slot,),
        "slots": (slot,),
        "confidence": 0.99,
        "confirmed": True,
        "sentence": f"rank {slot} issued 1,204 collectives, the others 1,205; its process is stopped",
    }
    of_verdict = Verdict.__dataclass_fields__.keys() - {"generation"}
    known = {name: change.pop(name) for name in list(change) if name in of_verdict}
    verdict = Verdict(id=number, **told | known)
    fields: dict[str, Any] = {"generation": "1.1", "weight": 0.9}
    return Accusation(id=number, slot=slot, pod_uid=pod_uid, verdict=verdict, **fields | change)


class Accuser:
    """One job's coordinator."""

    def __init__(self, job_uid: str) -> None:
        self.state = JobState(PROTOCOL, job_uid, 1, 1, JobPhase.RUNNING, step=5)
        self.raw: bytes | None = None
        """Said instead of the state, whatever it is."""
        self.bounds: Bounds | None = None
        self.asked = 0
        self.port = 0
        self._changed = asyncio.Event()
        app = web.Application()
        app.router.add_get("/v1/state", self._state)
        app.router.add_put("/v1/bounds", self._bounds)
        self._runner = web.AppRunner(app, access_log=None)

    async def start(self) -> None:
        """Listen on a port of the kernel's choice."""
        await self._runner.setup()
        site = web.TCPSite(self._runner, "127.0.0.1", 0)
        await site.start()
        self.port = self._runner.addresses[0][1]

    async def stop(self) -> None:
        """Stop listening."""
        await self._runner.cleanup()

    def trains(self, members: dict[int, str]) -> None:
        """Generation 1.1 trains in these slots, under the pods of these uids."""
        picked = tuple(Member(slot, 1, uid, "10.0.0.1", 1) for slot, uid in sorted(members.items()))
        self.say(generation=Generation(GenerationId(1, 1), None, picked, Cause.START))

    def say(self, **change: Any) -> None:
        """Say something new."""
        self.state = replace(self.state, version=self.state.version + 1, **change)
        self._changed.set()

    async def _state(self, request: web.Request) -> web.Response:
        self.asked += 1
        if self.state.version <= int(request.query.get("after", "0")):
            self._changed.clear()
            with suppress(TimeoutError):
                async with asyncio.timeout(HEARTBEAT_S):
                    await self._changed.wait()
        return web.Response(body=self.raw or encode(self.state), content_type="application/json")

    async def _bounds(self, request: web.Request) -> web.Response:
        self.bounds = decode(Bounds, await request.read())
        self.say(bounds_version=self.bounds.version)
        return web.Response(body=encode(self.state), content_type="application/json")


class _Turned(Streams):
    """Streams that go to the test's coordinators instead of the jobs' own."""

    def __init__(self, accusers: dict[Key, Accuser], *arguments: Any) -> None:
        super().__init__(*arguments)
        self._accusers = accusers

    def aim(self, key: Key, target: Target | None, token: str = "") -> None:
        accuser = self._accusers.get(key)
        if target is not None and accuser is not None:
            target = replace(target, address=f"http://127.0.0.1:{accuser.port}", ready=True)
        super().aim(key, target if accuser is not None else None, token)


class OutsideOperator:
    """The operator's code in a thread; jobs are looked at twice a second, and whenever a coordinator says something."""

    def __init__(self, kubeconfig: Path, render: Render) -> None:
        self._kubeconfig = kubeconfig
        self._render = render
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self._accusers: dict[Key, Accuser] = {}
        self._running: asyncio.Task[None] | None = None
        self._keys: set[Key] = set()

    def __enter__(self) -> Self:
        self._thread.start()
        self._do(self._begin())
        return self

    def __exit__(self, *_: object) -> None:
        self._do(self._end())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(10)
        self._loop.close()

    def follow(self, key: Key, job_uid: str) -> Accuser:
        """Look after a job from now on; its coordinator is the one that is returned."""
        accuser: Accuser = self._do(self._follow(key, job_uid))
        return accuser

    def say(self, accuser: Accuser, **change: Any) -> None:
        """Have a coordinator say something."""
        self.do(lambda: accuser.say(**change))

    def do(self, act: Callable[[], None]) -> None:
        """Have something done where the coordinators live."""
        self._loop.call_soon_threadsafe(act)

    def _do(self, coroutine: Any) -> Any:
        return asyncio.run_coroutine_threadsafe(coroutine, self._loop).result(30)

    async def _follow(self, key: Key, job_uid: str) -> Accuser:
        accuser = Accuser(job_uid)
        await accuser.start()
        self._accusers[key] = accuser
        self._keys.add(key)
        return accuser

    async def _begin(self) -> None:
        self._cluster = await ApiServer.connect(str(self._kubeconfig))
        self._session = aiohttp.ClientSession()
        queue = WorkQueue()
        self._streams = _Turned(self._accusers, self._session, queue.add)
        reporter = Reporter(self._cluster)
        recorder = Recorder(self._cluster)
        reconciler = Reconciler(
            self._cluster, self._streams, recorder, self._render, b"key", lambda: 1, reporter=reporter
        )
        work = [queue.work(reconciler.look) for _ in range(4)]
        self._tasks = [asyncio.ensure_future(each) for each in (*work, reporter.run(), self._tick(queue))]

    async def _tick(self, queue: WorkQueue) -> None:
        while True:
            for key in tuple(self._keys):
                queue.add(key)
            await asyncio.sleep(0.5)

    async def _end(self) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await self._streams.close()
        for accuser in self._accusers.values():
            await accuser.stop()
        await self._session.close()
        await self._cluster.close()
