"""Does what `agent_core` decides for one generation after the other: prepare, start, stop, settle, end."""

from __future__ import annotations

import asyncio
import os
import signal
from dataclasses import replace
from typing import TYPE_CHECKING

from stormjib_runtime import torchrun
from stormjib_runtime.agent_core import NOTHING, Held, Me, Stage
from stormjib_runtime.commits import Commits
from stormjib_runtime.environment import join_address
from stormjib_runtime.errors import CheckpointError, RuntimeFault
from stormjib_runtime.processes import (
    end_descendants,
    leftovers,
    remove_files,
    shared_memory_files,
)
from stormjib_runtime.ranks import Ranks
from stormjib_runtime.settings import Launcher, Settings
from stormjib_runtime.store_client import start_store

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Collection, Coroutine

    from stormjib_runtime.checkpoint_child import CheckpointChild
    from stormjib_runtime.copies import Copies
    from stormjib_runtime.launching import Launching
    from stormjib_runtime.output import Outputs
    from stormjib_runtime.sampling import Sampling
    from stormjib_runtime.wire import Generation, Order, RankState, ResumePoint, Saving

SAMPLE_S = 0.5
ADOPT_S = 60.0
"""How long the next generation waits for what the last one had staged: a storage that hangs must not hold up the job for ever."""
SETTLE_S = 10.0
"""How long a planned stop waits for pending commits."""


class Runner:
    """The generation that this agent holds, and the processes that belong to it."""

    def __init__(
        self,
        settings: Settings,
        me: Me,
        launching: Launching,
        child: CheckpointChild | None,
        copies: Copies | None,
        sampling: Sampling,
        outputs: Outputs,
        changed: Callable[[], None],
        event: Callable[[str], None],
    ) -> None:
        self.held = NOTHING
        self.error = ""
        self.store = ""
        self.resume: ResumePoint | None = None
        self.failed_exit = 0
        """Exit code of the first rank that failed in the newest generation where one did; 0 when none did."""
        self._settings = settings
        self._me = me
        self._launching = launching
        self._child = child
        self._copies = copies
        self._sampling = sampling
        self._outputs = outputs
        self._changed = changed
        self._event = event
        self._ranks: Ranks | None = None
        self._as_ended: tuple[RankState, ...] | None = None
        """The ranks as they were when they were ended: what dies of our own signal is no news."""
        self._commits: Commits | None = None
        self._work: asyncio.Task[None] | None = None
        self._sampler: asyncio.Task[None] | None = None
        self._timers: list[asyncio.TimerHandle] = []
        self._shm_before: frozenset[str] = frozenset()

    def states(self) -> tuple[RankState, ...]:
        """The ranks as they are reported: one that succeeded has not ended before what it saved is committed."""
        if self._ranks is None or self._as_ended is not None:
            return self._as_ended or ()
        self._see_saved(self._ranks)
        states = self._ranks.states()
        if self._commits is None or not self._commits.pending:
            return states
        return tuple(replace(state, exit=None) if state.exit == 0 else state for state in states)

    @property
    def saving(self) -> Saving | None:
        return None if self._ranks is None else self._ranks.saving

    @property
    def committed(self) -> ResumePoint | None:
        return None if self._commits is None else self._commits.committed

    def look(self) -> None:
        """Take note of ranks that have exited by themselves."""
        if self._ranks is None:
            return
        self.failed_exit = self._ranks.first_failure or self.failed_exit
        if self.held.stage in (Stage.RUNNING, Stage.STOPPING) and self._ranks.ended and not self.held.ended:
            self.held = Held(self.held.generation, self.held.stage, ended=True)

    def announce(self, order: Order) -> None:
        """Tell the ranks which steps the order names."""
        if self._ranks is not None:
            self._ranks.announce(order.save_at, order.stop_after)

    def prepare(self, order: Order) -> None:
        """Open the generation on the storage and start its store, in the background."""
        if order.generation is not None:
            self._begin(order.generation, Stage.PREPARING, self._prepare(order.generation, order.refused))

    def start(self, order: Order) -> None:
        """Start the ranks, in the background."""
        if order.generation is not None:
            self.store, self.resume = order.store, order.resume
            if self._copies is not None:
                self._copies.begin(order.generation)
            self._begin(order.generation, Stage.STARTING, self._start(order.generation, order.restarts_left))

    def stop(self, order: Order) -> None:
        """Ask the ranks to stop: by their pages where they listen, else by SIGTERM and half of the grace period."""
        if self._ranks is None:
            return
        self._enter(order.generation, Stage.STOPPING)
        if self._ranks.listens:
            self.announce(order)
            return
        self._ranks.send(signal.SIGTERM)
        self._later(self._settings.grace_s / 2, self._kill_ranks)

    def settle(self, order: Order) -> None:
        """The ranks have stopped: have what they saved committed, in the background."""
        if order.generation is not None:
            self._begin(order.generation, Stage.SETTLING, self._settle(order.generation))

    async def interrupt(self, limit_s: float) -> None:
        """Pass Ctrl-C on, and wait until the ranks have ended, at most so long."""
        if self._ranks is None:
            return
        self._ranks.send(signal.SIGINT)
        try:
            async with asyncio.timeout(limit_s):
                await self._ranks.all_ended.wait()
        except TimeoutError:
            self._event(f"RanksKilled: not ended {limit_s:.0f} s after the interrupt")

    def hurry(self) -> None:
        """Wait for no rank any longer."""
        self._kill_ranks()

    async def end(self, keep: Collection[int]) -> None:
        """SIGKILL all that belongs to the generation, and forget it. Nothing of it is left when this returns."""
        for timer in self._timers:
            timer.cancel()
        self._timers.clear()
        self._as_ended = self.states()
        self._kill_ranks()
        if self._sampler is not None:
            self._sampler.cancel()  # until now: what ranks that ended had found is still to be told
        if self._work is not None:
            self._work.cancel()
            await asyncio.wait([self._work])
        await self._launching.quiet()
        ended = await end_descendants(os.getpid(), lambda: {*keep, *self._launching.pids})
        if self._ranks is not None:
            await self.adopt()
        if self._commits is not None:
            await self._commits.close()
        if self._ranks is not None:
            ended += self._ranks.pids
            self._ranks.close()
        names = leftovers(self._shm_before, shared_memory_files(), ended, alone=os.getpid() == 1)
        remove_files(names)
        self._ranks = self._commits = self._work = self._as_ended = self._sampler = None
        self._shm_before = frozenset()
        self.store, self.resume = "", None
        self._enter(None, Stage.NONE)

    async def adopt(self) -> None:
        """Finish what ranks that are dead had staged, here and on nodes that are lost: before anybody opens the next generation."""
        child, settings = self._child, self._settings
        if child is not None and settings.memory.exists():
            await self._adopted(child.adopt(str(settings.memory)), "memory")
        if child is not None and settings.copies.exists():
            await self._adopted(child.adopt_copies(str(settings.copies)), "copies of a lost node's memory")

    async def _adopted(self, asked: Awaitable[tuple[dict[int, list[int]], list[str]]], where: str) -> None:
        try:
            async with asyncio.timeout(ADOPT_S):
                adopted, notes = await asked
        except (CheckpointError, OSError) as error:
            self._event(f"AdoptFailed: {error}")
        except TimeoutError:
            self._event(f"AdoptFailed: what the ranks had staged is not on the storage after {ADOPT_S:.0f} s")
        else:
            for step, ranks in adopted.items():
                self._event(f"Adopted: step {step} of ranks {', '.join(map(str, ranks))}, from {where}")
            for note in notes:
                self._event(f"StagedLost: {note}")

    # --- the long ones ----------------------------------------------------------------------------------------------

    async def _prepare(self, generation: Generation, refused: tuple[str, ...]) -> None:
        self._shm_before = shared_memory_files()
        try:
            port, self.resume = await asyncio.gather(
                start_store(self._launching.launch, self._outputs), self._open(generation, refused)
            )
        except (RuntimeFault, OSError) as error:
            self._enter(generation, Stage.FAILED, str(error)[:1024])
            return
        self.store = join_address(self._settings.address, port)
        self._enter(generation, Stage.PREPARED)

    async def _open(self, generation: Generation, refused: tuple[str, ...]) -> ResumePoint | None:
        if self._child is None:
            return None
        return await self._child.open(generation.id, generation.parent, self._settings.job_uid, refused)

    async def _start(self, generation: Generation, restarts_left: int) -> None:
        self._shm_before = self._shm_before or shared_memory_files()
        self._ranks = Ranks(self._settings.pages / f"g{generation.id}", self._changed)
        try:
            if self._settings.launcher is Launcher.TORCHRUN:
                await self._start_torchrun(self._ranks, generation, restarts_left)
            else:
                await self._start_ranks(self._ranks, generation)
        except OSError as error:  # no room on /dev/shm, no descriptors
            self._enter(generation, Stage.FAILED, f"cannot start ranks: {error}")
            return
        self._enter(generation, Stage.RUNNING)
        self._sampler = self._sample(self._ranks, generation)
        await self._watch(self._ranks, generation)

    async def _start_ranks(self, ranks: Ranks, generation: Generation) -> None:
        settings = self._settings
        await ranks.start(
            self._launching.launch,
            settings.words,
            self._outputs,
            generation,
            self._me.slot,
            self.store,
            self.resume,
            settings.job_uid,
        )

    async def _start_torchrun(self, ranks: Ranks, generation: Generation, restarts_left: int) -> None:
        settings = self._settings
        argv = torchrun.argv(
            generation, self._me.slot, settings.job_uid, self.store, restarts_left, settings.words
        )
        process = ranks.process()
        ranks.adopt(process, generation, self._me.slot)
        await process.start(
            self._launching.execute, argv, torchrun.environment(generation), self._outputs, ""
        )

    async def _watch(self, ranks: Ranks, generation: Generation) -> None:
        """Look at the ranks twice a second: what they say on their pages, and what /proc says about them."""
        if self._child is not None and generation.members[0].slot == self._me.slot:
            self._commits = Commits(
                self._child, generation, self._settings.keep_last, self._changed, self._event
            )
        told = ranks.news
        while not ranks.ended:
            ranks.sample()
            self._see_saved(ranks)
            if ranks.news != told:
                told = ranks.news
                self._changed()
            await asyncio.sleep(SAMPLE_S)

    def _sample(self, ranks: Ranks, generation: Generation) -> asyncio.Task[None]:
        """Sample them, beside watching: a bug there must not end that."""
        task = asyncio.get_running_loop().create_task(self._sampling.run(generation, ranks, self.store))
        task.add_done_callback(self._sampled)
        return task

    def _sampled(self, task: asyncio.Task[None]) -> None:
        error = None if task.cancelled() else task.exception()
        if error is not None:
            self._event(f"SamplingFailed: {error!r}")

    async def _settle(self, generation: Generation) -> None:
        if self._commits is not None and self._ranks is not None:
            self._see_saved(self._ranks)
            await self._commits.settle(SETTLE_S)
        self._enter(generation, Stage.STOPPED)

    def _see_saved(self, ranks: Ranks) -> None:
        if self._commits is not None:
            self._commits.saw(ranks.saved)

    # --- small ones -------------------------------------------------------------------------------------------------

    def _begin(self, generation: Generation, stage: Stage, work: Coroutine[None, None, None]) -> None:
        """Start something that takes long; `end` cancels it."""
        self._enter(generation, stage)
        self._work = asyncio.get_running_loop().create_task(work)

    def _enter(self, generation: Generation | None, stage: Stage, error: str = "") -> None:
        self.held = Held(generation, stage)
        self.error = error
        self._changed()

    def _later(self, seconds: float, call: Callable[[], None]) -> None:
        self._timers.append(asyncio.get_running_loop().call_later(seconds, call))

    def _kill_ranks(self) -> None:
        """The ranks alone, before anything slower: they are what stands between a fault and the next step."""
        if self._ranks is not None:
            self._ranks.send(signal.SIGKILL)
