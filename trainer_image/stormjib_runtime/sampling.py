"""The agent's eyes: looks at its ranks every 200 ms, tells the coordinator's health engine, and does what that asks for.

A coordinator that is gone costs nothing: looking goes on, and what it did not hear is told to the next.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import TYPE_CHECKING, Protocol

from stormjib_health.sampler.core import Core
from stormjib_health.sampler.look import Looker
from stormjib_health.wire import Answer, Check, Sample, Wish
from stormjib_runtime import codec
from stormjib_runtime.http import Client, RequestFailed
from stormjib_runtime.stacks import Stacks
from stormjib_runtime.wire import PROTOCOL

if TYPE_CHECKING:
    from pathlib import Path

    from stormjib_health.sampler.look import Target
    from stormjib_runtime.http import Response
    from stormjib_runtime.wire import Generation

LOOK_S = 0.2
POST_S = 3.0
"""Time limit of a post, as of a report."""
RETRY_S = 1.0
MAX_INTERVAL_S = 60.0
MAX_CHECKS = 256
"""Checks of one generation; a coordinator that wants more is not ours."""

DoChecks = Callable[[Sequence[Check]], Awaitable[Sequence[Answer]]]
"""Measures what is asked for; an answer for each, also where it cannot be done."""


class Watched(Protocol):
    """Ranks of one generation, as far as sampling knows them: `ranks.Ranks` is that."""

    @property
    def folder(self) -> Path:
        """Of their pages, and what lies beside them."""

    def targets(self) -> Sequence[Target]:
        """Where to look."""


@dataclass(frozen=True)
class Place:
    """Whose samples these are."""

    job_uid: str
    slot: int
    agent: int


class Sampling:
    """Samples one generation after the other."""

    def __init__(
        self,
        coordinator: tuple[str, int],
        token: str,
        place: Place,
        say: Callable[[str], None],
        checks: DoChecks,
        measures: Callable[[], str],
    ) -> None:
        """`say` gets a line for people, each problem once. `measures` gives `host:port` of this agent's measuring server,
        or nothing while it has none."""
        self._coordinator = coordinator
        self._token = token
        self._place = place
        self._say = say
        self._checks = checks
        self._measures = measures
        self._number = 0

    async def run(self, generation: Generation, ranks: Watched, store: str) -> None:
        """Sample the ranks of one generation until cancelled."""
        blank = Sample(
            protocol=PROTOCOL,
            job_uid=self._place.job_uid,
            slot=self._place.slot,
            agent=self._place.agent,
            generation=str(generation.id),
            number=self._number,
            over_s=0.0,
        )
        looker = Looker(ranks.folder, {one.rank: one.local_rank for one in ranks.targets()}, store)
        core = Core(blank, generation.world_size)
        round_ = _Round(
            core,
            Client(*self._coordinator, token=self._token),
            ranks,
            self._say,
            self._checks,
            self._measures,
        )
        try:
            await round_.run(looker)
        finally:
            self._number = core.number
            round_.close()
            looker.close()


class _Round:
    """The sampling of one generation."""

    def __init__(
        self,
        core: Core,
        client: Client,
        ranks: Watched,
        say: Callable[[str], None],
        checks: DoChecks,
        measures: Callable[[], str],
    ) -> None:
        self._core = core
        self._client = client
        self._say = say
        self._do_checks = checks
        self._measures = measures
        self._stacks = Stacks(ranks.folder)
        self._answers: list[Answer] = []
        self._asked: set[int] = set()
        """Checks that were begun."""
        self._interval_s = LOOK_S
        self._due = 0.0
        self._at_once = False
        self._posting: asyncio.Task[None] | None = None
        self._tasks: set[asyncio.Task[None]] = set()
        self._ranks = ranks
        self._problems: dict[str, str] = {}

    async def run(self, looker: Looker) -> None:
        """Look, and tell when it is time to."""
        loop = asyncio.get_running_loop()
        while True:
            began = loop.time()
            suspects = {rank for rank, _ in self._core.suspicions}
            if self._core.take(looker.look(self._ranks.targets(), suspects)):
                self._at_once = True
            self._note("sockets", looker.problem)
            if self._posting is None and (self._at_once or began >= self._due):
                self._post(began)
            await asyncio.sleep(max(0.0, began + LOOK_S - loop.time()))

    def close(self) -> None:
        """End whatever is under way."""
        for task in self._tasks:
            task.cancel()
        self._client.close()

    def _post(self, now: float) -> None:
        self._at_once = False
        self._due = now + self._interval_s
        stacks, answers = self._stacks.ready(), tuple(self._answers)
        sample = replace(self._core.sample(), stacks=stacks, answers=answers, measures=self._measures())
        self._posting = self._spawn(self._send(sample))

    async def _send(self, sample: Sample) -> None:
        try:
            wish = await self._exchange(sample)
        finally:
            self._posting = None
        if wish is None:
            self._due = asyncio.get_running_loop().time() + max(RETRY_S, self._interval_s)
            return
        self._core.accepted()
        self._stacks.told(sample.stacks)
        self._answers = [answer for answer in self._answers if answer not in sample.answers]
        self._obey(wish)

    async def _exchange(self, sample: Sample) -> Wish | None:
        """The coordinator's answer; None where it has not taken the sample."""
        try:
            response = await self._client.request(
                "POST", "/v1/sample", body=codec.pack(sample), timeout_s=POST_S
            )
            wish = _read(response)
        except (RequestFailed, codec.DecodeError) as error:
            self._note("coordinator", str(error))
            return None
        self._note("coordinator", "")
        return wish

    def _obey(self, wish: Wish) -> None:
        self._interval_s = min(max(LOOK_S, wish.interval_s), MAX_INTERVAL_S)
        if wish.groups:
            self._core.forget()
        for target in self._ranks.targets():
            if target.rank in wish.stacks and self._stacks.due(target.rank):
                self._spawn(self._stack(target.rank))
        checks = [check for check in wish.checks if check.id not in self._asked]
        if checks and len(self._asked) + len(checks) <= MAX_CHECKS:
            self._asked.update(check.id for check in checks)
            self._spawn(self._check(checks))

    async def _stack(self, rank: int) -> None:
        target = next(target for target in self._ranks.targets() if target.rank == rank)
        await self._stacks.take(target, self._core.describe(rank))
        self._at_once = True

    async def _check(self, checks: Sequence[Check]) -> None:
        self._answers += await self._do_checks(checks)
        self._at_once = True

    def _spawn(self, work: Coroutine[None, None, None]) -> asyncio.Task[None]:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    def _note(self, about: str, problem: str) -> None:
        """Say each problem once."""
        if problem and problem != self._problems.get(about):
            self._say(f"health: {problem}")
        self._problems[about] = problem


def _read(response: Response) -> Wish:
    """Raises DecodeError where it is no wish."""
    if response.status != 200:
        text = response.body[:256].decode(errors="replace")
        raise codec.DecodeError(f"the coordinator answers a sample with {response.status}: {text}")
    return _unpacked(response.body)


@lru_cache(maxsize=4)
def _unpacked(body: bytes) -> Wish:
    """While all is well it is the same several times a second."""
    return codec.unpack(Wish, body)
