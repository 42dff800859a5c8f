"""The coordinator: one small process per job that decides who trains together. This is the shell around `engine`.

`python -m stormjib_runtime.coordinator` serves the job named by its environment; `Coordinator` does the same inside
another process. It holds no rank, no checkpoint and no Kubernetes credential, and a job trains on while it is away.
"""

from __future__ import annotations

import argparse
import asyncio
import gc
import os
import signal
import sys
import time
from collections import Counter
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from http import HTTPStatus
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from stormjib_health.wire import Sample
from stormjib_runtime import engine, kept
from stormjib_runtime.admit import admit, completed
from stormjib_runtime.codec import DecodeError, decode, encode, pack, unpack
from stormjib_runtime.http import Response
from stormjib_runtime.http_server import Connection, Handler, Request, Server, serve, text
from stormjib_runtime.narrate import checkpoint_metrics, describe, health_metrics, metrics
from stormjib_runtime.orders import job_state, order_for, state_version
from stormjib_runtime.saves import Saves
from stormjib_runtime.state import Complete, Refused, StandDown, is_urgent
from stormjib_runtime.watch import Watch
from stormjib_runtime.wire import HEARTBEAT_S, Bounds, Cause, Env, GenerationId, JobState, Report

if TYPE_CHECKING:
    from collections.abc import Callable

    from stormjib_health.wire import Wish
    from stormjib_runtime.state import State
    from stormjib_runtime.wire import Order

PORT = 7070
TICK_S = 0.2
UNEASY_S, URGENT_S = 0.1, 0.05
"""Between two looks at the clock: in general, while the health engine suspects something, and while a decision is only
waiting for its time."""
LONG_S, SELDOM = 0.005, 10.0
"""A decision that takes longer than the one is taken so many times its length apart."""
ORDER_POLL_S = 30.0
STATE_POLL_S = HEARTBEAT_S
SAMPLE_BYTES = 256 * 1024
"""A healthy one has a few hundred bytes. The stacks of 8 ranks may have 40 KB, and a group of 16,000 ranks in no order 200."""
COLLECT = 20_000, 20, 20
"""When Python looks for cycles. What a message brings lives until the next one and is in none: looking as often as Python does by
itself took a quarter of the time of a coordinator with 1,250 agents."""

T = TypeVar("T")


@dataclass(frozen=True)
class Settings:
    """What a coordinator has to be told."""

    job_uid: str
    incarnation: int
    token: str
    operator_token: str
    run_dir: Path
    host: str = ""
    """"" is every address, IPv4 and IPv6."""
    port: int = PORT


class Stopped(Exception):
    """The coordinator cannot go on; its message says why."""


class _Pulse:
    """Wakes everybody who waits, each time anew."""

    def __init__(self) -> None:
        self._event = asyncio.Event()

    def beat(self) -> None:
        self._event.set()
        self._event = asyncio.Event()

    async def wait(self) -> None:
        await self._event.wait()


class Coordinator:
    """Serves one job over HTTP. `start`, then `wait` until it stands down; `close` in any case."""

    def __init__(self, settings: Settings, log: Callable[[str], None] | None = None) -> None:
        self._settings = settings
        self._log = log or _to_stderr
        self._state, starts = kept.begin(
            settings.run_dir, settings.job_uid, settings.incarnation, time.monotonic()
        )
        self._starts = starts + 1
        self._kept: kept.Kept | None = None
        self._begun: Counter[Cause] = Counter()
        self._watch = Watch()
        self._saves = Saves()
        self._orders, self._states = _Pulse(), _Pulse()
        self._links: dict[tuple[int, int], set[Connection]] = {}
        """Open connections of each (slot, agent)."""
        self._over: asyncio.Future[str] | None = None
        self._server: Server | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._deciding_again = 0.0

    # --- life -------------------------------------------------------------------------------------------------------

    async def start(self) -> int:
        """Listen; the port is returned. Raises Stopped where the run directory cannot be written."""
        self._over = asyncio.get_running_loop().create_future()
        self._store(self._state)
        routes = {
            ("POST", "/v1/report"): self._guarded(self._settings.token, self._report),
            ("GET", "/v1/order"): self._guarded(self._settings.token, self._order),
            ("POST", "/v1/sample"): self._guarded(self._settings.token, self._sample),
            ("PUT", "/v1/bounds"): self._guarded(self._settings.operator_token, self._bounds),
            ("GET", "/v1/state"): self._guarded(self._settings.operator_token, self._job_state),
            ("GET", "/metrics"): self._metrics,
            ("GET", "/healthz"): self._healthz,
        }
        self._server = await serve(routes, self._settings.host, self._settings.port)
        state = self._state
        self._log(
            f"coordinator of job {state.job_uid}, incarnation {state.incarnation}: port {self._server.port}"
        )
        return self._server.port

    async def wait(self) -> str:
        """Until this coordinator has nothing more to say; returns why. Raises Stopped where it cannot go on."""
        if self._over is None:
            raise Stopped("not started")
        return await asyncio.shield(self._over)

    async def close(self) -> None:
        """Drop every connection, at once."""
        self._links.clear()
        if self._timer is not None:
            self._timer.cancel()
        if self._over is not None:
            self._over.cancel()
        if self._server is not None:
            await self._server.close()

    @property
    def job(self) -> JobState:
        """What the operator would be told now."""
        return job_state(self._state, time.monotonic())

    def put_bounds(self, bounds: Bounds) -> JobState:
        """The operator's will, given inside the process. Raises Refused."""
        self._apply(engine.on_bounds(self._state, bounds, time.monotonic()))
        return self.job

    # --- state ------------------------------------------------------------------------------------------------------

    def _apply(self, new: State) -> None:
        """Make `new` the state: what must last is on the disk before anybody can be told of it."""
        old = self._state
        if new.revision == old.revision:
            self._state = new  # a heartbeat: nothing that anybody would be told of
            self._arm()
            return
        self._store(new)
        self._state = new
        self._watch.follow(new, time.monotonic())
        for line in describe(old, new, time.monotonic()):
            self._log(line)
        if new.version != old.version:
            self._orders.beat()
        if new.revision != old.revision:
            self._states.beat()
        self._arm()

    def _store(self, state: State) -> None:
        record = kept.keep(state, self._starts)
        if record == self._kept:
            return
        try:
            kept.save(self._settings.run_dir, record)
        except OSError as error:
            self._stop(Stopped(f"{self._settings.run_dir}: {error}"))
            raise Stopped(f"{self._settings.run_dir}: {error}") from error
        before = {entry.generation.id for entry in self._kept.history} if self._kept else set()
        if self._kept is not None:
            self._begun.update(e.generation.cause for e in record.history if e.generation.id not in before)
        self._kept = record

    def _stop(self, why: str | Stopped) -> None:
        if self._over is None or self._over.done():
            return
        if isinstance(why, Stopped):
            self._over.set_exception(why)
            self._over.exception()  # seen: whoever does not `wait` is told by the call that failed
        else:
            self._over.set_result(why)

    def _arm(self) -> None:
        """Tick only while something may time out."""
        if self._timer is not None and not self._watch.urgent:
            return
        busy = self._state.agents and not isinstance(self._state.stage, Complete)
        if busy and self._over is not None and not self._over.done():
            delay = UNEASY_S if self._watch.suspicious else TICK_S
            if self._watch.urgent or is_urgent(self._state, time.monotonic()):
                delay = URGENT_S
            self._tick_in(delay)

    def _tick_in(self, delay: float) -> None:
        """A tick that soon, unless one comes sooner."""
        loop = asyncio.get_running_loop()
        if self._timer is not None and self._timer.when() <= loop.time() + delay:
            return
        if self._timer is not None:
            self._timer.cancel()
        self._timer = loop.call_later(delay, self._tick)

    def _tick(self) -> None:
        self._timer = None
        try:
            self._apply(engine.on_tick(self._state, time.monotonic()))
            self._judge()
        except Stopped:
            return  # `wait` tells
        self._arm()

    def _judge(self) -> None:
        """What the health engine has found becomes an act at once."""
        now = time.monotonic()
        for generation, verdict in self._watch.tick(self._state, now):
            self._apply(engine.on_verdict(self._state, generation, verdict, now))

    def _take(self, fact: Callable[..., State]) -> None:
        """Take what an agent tells, and decide at once what follows; in a job so large that this takes a while, and where many tell
        something at the same time, at the next tick."""
        began = time.monotonic()
        new = fact(self._state, now=began)
        if began >= self._deciding_again:
            new = engine.decided(self._state, new, began)
            seconds = time.monotonic() - began
            self._deciding_again = began + SELDOM * seconds if seconds > LONG_S else began
        self._apply(new)

    def _attach(self, connection: Connection, slot: int, agent: int) -> None:
        """A killed container closes all its connections; a link that is only reset is made again at once."""
        self._links.setdefault((slot, agent), set()).add(connection)
        connection.on_close = lambda: self._detach(connection, slot, agent)

    def _detach(self, connection: Connection, slot: int, agent: int) -> None:
        links = self._links.get((slot, agent), set())
        links.discard(connection)
        if links or self._links.pop((slot, agent), None) is None:
            return
        try:
            self._take(partial(engine.lost, slot=slot, agent=agent))
        except Stopped:
            return  # `wait` tells

    # --- calls ------------------------------------------------------------------------------------------------------

    def _guarded(self, token: str, handler: Handler) -> Handler:
        """The handler, for whoever holds the token; what it raises becomes an answer."""

        async def guarded(request: Request) -> Response:
            try:
                return self._refuse(request, token) or await handler(request)
            except (DecodeError, Refused, Stopped) as error:
                return self._explain(error)

        return guarded

    async def _report(self, request: Request) -> Response:
        report = decode(Report, request.body)
        admit(self._state, report)
        report = completed(self._state, report)
        self._watch.exits(self._state, report, time.monotonic())
        self._take(partial(engine.heard, report=report))
        self._saves.heard(report, time.monotonic())
        self._attach(request.connection, report.slot, report.agent)
        return self._answer(report.slot)

    async def _order(self, request: Request) -> Response:
        slot, agent, after = (request.number(name) for name in ("slot", "agent", "after"))
        self._apply(engine.on_poll(self._state, slot, agent, time.monotonic()))
        self._attach(request.connection, slot, agent)
        # Unequal, not above: an agent may still know the number of another coordinator.
        await _until(lambda: self._state.order_version != after, self._orders, ORDER_POLL_S)
        self._apply(
            engine.on_poll(self._state, slot, agent, time.monotonic())
        )  # refused if replaced meanwhile
        return self._answer(slot)

    def _answer(self, slot: int) -> Response:
        order, held = order_for(self._state, slot), self._state.agents[slot].report.generation
        if order.generation is not None:
            order = replace(order, generation=order.generation.brief(held))
        return Response(HTTPStatus.OK, _encoded(order))

    async def _sample(self, request: Request) -> Response:
        sample = unpack(Sample, request.body, limit=SAMPLE_BYTES)
        wish = self._watch.take(self._state, sample, time.monotonic())
        return Response(HTTPStatus.OK, _packed(wish))

    async def _bounds(self, request: Request) -> Response:
        self._hear_operator()
        return Response(HTTPStatus.OK, encode(self.put_bounds(decode(Bounds, request.body))))

    async def _job_state(self, request: Request) -> Response:
        after = request.number("after") if "after" in request.query else -1
        above = _generation(request.query.get("above"))
        self._hear_operator()
        await _until(lambda: state_version(self._state) != after, self._states, STATE_POLL_S)
        return Response(HTTPStatus.OK, encode(job_state(self._state, time.monotonic(), above)))

    def _hear_operator(self) -> None:
        """No news for anybody, so nothing is stored or sent."""
        self._state = replace(self._state, operator_heard=time.monotonic())

    async def _metrics(self, request: Request) -> Response:
        saves = checkpoint_metrics(self._saves, time.monotonic())
        body = (metrics(self.job, self._begun) + health_metrics(self._watch) + saves).encode()
        return Response(HTTPStatus.OK, body, "text/plain; version=0.0.4; charset=utf-8")

    async def _healthz(self, request: Request) -> Response:
        return text(HTTPStatus.OK, "ok")

    def _refuse(self, request: Request, token: str) -> Response | None:
        if request.bearer(token):
            return None
        if request.bearer(self._settings.token) or request.bearer(self._settings.operator_token):
            return text(HTTPStatus.FORBIDDEN, "this token is not for this call")
        return text(HTTPStatus.UNAUTHORIZED, "wrong or missing token")

    def _explain(self, error: DecodeError | Refused | Stopped) -> Response:
        if isinstance(error, DecodeError):
            return text(HTTPStatus.BAD_REQUEST, str(error))
        if isinstance(error, Stopped):
            return text(HTTPStatus.SERVICE_UNAVAILABLE, str(error))
        if isinstance(error, StandDown):
            self._stop(str(error))
        return text(HTTPStatus(error.status), str(error))


@lru_cache(maxsize=64)
def _encoded(order: Order) -> bytes:
    """Most agents get the same order at the same time."""
    return encode(order)


@lru_cache(maxsize=64)
def _packed(wish: Wish) -> bytes:
    """While all is well every agent is answered the same, several times a second."""
    return pack(wish)


async def _until(condition: Callable[[], bool], pulse: _Pulse, limit_s: float) -> None:
    """Return as soon as the condition holds, or after `limit_s`."""
    try:
        async with asyncio.timeout(limit_s):
            while not condition():
                await pulse.wait()
    except TimeoutError:
        return


def _generation(value: str | None) -> GenerationId | None:
    if value is None:
        return None
    try:
        return GenerationId.parse(value)
    except ValueError as error:
        raise DecodeError(f"query above: {error}") from error


def _to_stderr(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


# --- the process ----------------------------------------------------------------------------------------------------


def settings_from_env(port: int) -> Settings:
    """Settings as the operator writes them into the pod. Raises Stopped naming what is missing."""
    names = (Env.JOB_UID, Env.INCARNATION, Env.TOKEN, Env.OPERATOR_TOKEN, Env.RUN_DIR)
    missing = [name for name in names if not os.environ.get(name)]
    if missing:
        raise Stopped(f"the environment lacks {', '.join(missing)}")
    uid, incarnation, token, operator_token, run_dir = (os.environ[name] for name in names)
    if not incarnation.isdecimal():
        raise Stopped(f"{Env.INCARNATION} is {incarnation!r}; wanted a number")
    return Settings(uid, int(incarnation), token, operator_token, Path(run_dir), port=port)


async def _serve(settings: Settings) -> None:
    coordinator = Coordinator(settings)
    waiting = asyncio.current_task()
    if waiting is not None:
        asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, waiting.cancel)
    try:
        await coordinator.start()
        _to_stderr(await coordinator.wait())
    except asyncio.CancelledError:
        _to_stderr("SIGTERM")
    finally:
        await coordinator.close()


def main() -> int:
    """Run until SIGTERM, or until a coordinator of a higher incarnation is heard of."""
    parser = argparse.ArgumentParser(prog="python -m stormjib_runtime.coordinator", description=__doc__)
    parser.add_argument("--port", type=int, default=PORT, help="port to listen on (default %(default)s)")
    gc.set_threshold(*COLLECT)
    try:
        asyncio.run(_serve(settings_from_env(parser.parse_args().port)))
    except (Stopped, Refused) as error:
        _to_stderr(f"coordinator: {error}")
        return 1
    except OSError as error:
        _to_stderr(f"coordinator: cannot listen: {error}")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
