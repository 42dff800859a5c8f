"""Commits of one generation, one after the other: the agent of its first member sees a step saved and has it committed."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

from stormjib_runtime.errors import CheckpointError

if TYPE_CHECKING:
    from collections.abc import Callable

    from stormjib_runtime.checkpoint_child import CheckpointChild
    from stormjib_runtime.wire import Generation, ResumePoint


class Commits:
    """Hands saved steps to the checkpoint child, and remembers the newest committed one."""

    def __init__(
        self,
        child: CheckpointChild,
        generation: Generation,
        keep_last: int,
        changed: Callable[[], None],
        event: Callable[[str], None],
    ) -> None:
        self.committed: ResumePoint | None = None
        self._child = child
        self._generation = generation
        self._keep_last = keep_last
        self._changed = changed
        self._event = event
        self._seen = -1
        self._busy = False
        self._steps: asyncio.Queue[int] = asyncio.Queue()
        self._task = asyncio.get_running_loop().create_task(self._work())

    def saw(self, saved: int) -> None:
        """A local rank has written its file of this step."""
        if saved > self._seen:
            self._seen = saved
            self._steps.put_nowait(saved)

    @property
    def pending(self) -> bool:
        """A step is saved and not yet committed nor given up."""
        return self._busy or not self._steps.empty()

    async def settle(self, limit_s: float) -> None:
        """Wait until nothing is pending, at most so long: the next generation finishes what is left."""
        try:
            async with asyncio.timeout(limit_s):
                await self._steps.join()
        except TimeoutError:
            self._event(
                f"CommitPending: a step of generation {self._generation.id} was not committed in {limit_s:.0f} s"
            )

    async def close(self) -> None:
        self._task.cancel()
        await asyncio.wait([self._task])

    async def _work(self) -> None:
        while True:
            step = await self._steps.get()
            self._busy = True
            try:
                self.committed = await self._child.commit(
                    self._generation.id, self._generation.world_size, step, self._keep_last
                )
            except CheckpointError as error:
                self._event(f"CommitFailed: step {step}: {error}")
            finally:
                self._steps.task_done()
                self._busy = False
                self._changed()
