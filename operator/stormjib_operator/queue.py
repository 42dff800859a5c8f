"""The work queue: which jobs want a look, and when.

What kopf, the coordinators and the clock have to say is only "look at this job": the pass reads everything itself. So
a key that is added ten times while it waits is looked at once; one that is added while it is being looked at is looked
at once more; two workers never look at the same job. A pass that fails comes again after a growing, jittered pause.
"""

from __future__ import annotations

import asyncio
import random
from collections import deque
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable


@dataclass(frozen=True)
class Key:
    """A job."""

    namespace: str
    name: str

    def __str__(self) -> str:
        return f"{self.namespace}/{self.name}"


@dataclass(frozen=True)
class Pauses:
    """How long a failing key waits: `first`, doubled each time up to `longest`, give or take `jitter` of it."""

    first: float = 0.05
    longest: float = 30.0
    jitter: float = 0.2

    def after(self, failures: int, chance: float) -> float:
        """The pause after so many failures in a row; `chance` is in [0, 1)."""
        pause = min(self.longest, self.first * 2.0 ** min(failures - 1, 30))
        return pause * (1.0 + self.jitter * (2.0 * chance - 1.0))


class WorkQueue:
    """Keys to be looked at, each by one worker at a time."""

    def __init__(self, pauses: Pauses | None = None, chance: Callable[[], float] = random.random) -> None:
        self._pauses = pauses or Pauses()
        self._chance = chance
        self._waiting: deque[Key] = deque()
        self._queued: set[Key] = set()
        self._busy: set[Key] = set()
        self._again: set[Key] = set()
        self._failures: dict[Key, int] = {}
        self._timers: dict[Key, asyncio.TimerHandle] = {}
        self._arrived = asyncio.Event()

    def __len__(self) -> int:
        return len(self._waiting)

    def add(self, key: Key) -> None:
        """Have the key looked at as soon as a worker is free."""
        timer = self._timers.pop(key, None)
        if timer is not None:
            timer.cancel()
        if key in self._busy:
            self._again.add(key)
        elif key not in self._queued:
            self._queued.add(key)
            self._waiting.append(key)
            self._arrived.set()

    def add_after(self, key: Key, seconds: float) -> None:
        """Have the key looked at later; an earlier appointment stays."""
        loop = asyncio.get_running_loop()
        due = loop.time() + seconds
        timer = self._timers.get(key)
        if timer is not None and timer.when() <= due:
            return
        if timer is not None:
            timer.cancel()
        self._timers[key] = loop.call_at(due, self.add, key)

    async def work(self, look: Callable[[Key], Awaitable[float | None]]) -> None:
        """One worker: looks at keys for ever. `look` returns when to look again, or raises to be asked again soon."""
        while True:
            key = await self._next()
            try:
                again = await look(key)
            except Retry:
                self._fail(key)
            else:
                self._done(key, again)

    async def _next(self) -> Key:
        while not self._waiting:
            self._arrived.clear()
            await self._arrived.wait()
        key = self._waiting.popleft()
        self._queued.discard(key)
        self._busy.add(key)
        return key

    def _done(self, key: Key, again: float | None) -> None:
        self._failures.pop(key, None)
        self._release(key)
        if again is not None:
            self.add_after(key, again)

    def _fail(self, key: Key) -> None:
        failures = self._failures[key] = self._failures.get(key, 0) + 1
        self._again.discard(key)  # news do not shorten the pause: what fails would only fail again
        self._release(key)
        self.add_after(key, self._pauses.after(failures, self._chance()))

    def _release(self, key: Key) -> None:
        self._busy.discard(key)
        if key in self._again:
            self._again.discard(key)
            self.add(key)


class Retry(Exception):
    """A pass failed in a way that may pass; it has been logged."""
