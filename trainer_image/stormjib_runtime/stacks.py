"""Stacks of ranks, as a coordinator asks for them: faulthandler's on a signal, else what /proc says."""

from __future__ import annotations

import asyncio
import time
from typing import TYPE_CHECKING

from stormjib_health.records import stack
from stormjib_health.sampler.proc import HALTED, read_stat
from stormjib_health.wire import Stack

if TYPE_CHECKING:
    from pathlib import Path

    from stormjib_health.sampler.look import Target

PAUSE_S = 2.0
"""Between two stacks of one rank: writing them stops the rank for a moment."""
WAIT_S = 0.5
"""How long a rank may take to write them."""
POLL_S = 0.02


class Stacks:
    """Of the ranks of one generation."""

    def __init__(self, folder: Path) -> None:
        """`folder`: that of the ranks' pages."""
        self._folder = folder
        self._began: dict[int, float] = {}
        self._ready: dict[int, Stack] = {}

    def due(self, rank: int) -> bool:
        """Whether this rank's may be taken again."""
        return time.monotonic() - self._began.get(rank, -PAUSE_S) >= PAUSE_S

    def ready(self) -> tuple[Stack, ...]:
        """What is to be told."""
        return tuple(self._ready.values())

    def told(self, stacks: tuple[Stack, ...]) -> None:
        """The coordinator has these."""
        self._ready = {rank: one for rank, one in self._ready.items() if one not in stacks}

    async def take(self, target: Target, otherwise: str) -> None:
        """Have the rank write its stacks. Where it cannot, as a stopped process, `otherwise` stands instead."""
        self._began[target.rank] = time.monotonic()
        text = "" if halted(target.pid) else await self._ask(target)
        self._ready[target.rank] = Stack(target.rank, text or otherwise)

    async def _ask(self, target: Target) -> str:
        """What the rank has written, once that does not grow any more; empty where it writes nothing."""
        path = stack.stack_path(self._folder, target.local_rank)
        if not stack.ask(target.pid, path):
            return ""
        before, end = "", time.monotonic() + WAIT_S
        while time.monotonic() < end:
            await asyncio.sleep(POLL_S)
            text = stack.read(path)
            if text and text == before:
                break
            before = text
        return before


def halted(pid: int) -> bool:
    """Whether the process runs no signal handler now."""
    stat = read_stat(pid) if pid else None
    return stat is None or stat.state in HALTED
