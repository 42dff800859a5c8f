"""The local ranks of one generation: start them, look at them from outside, ask them to stop, clean up after them."""

from __future__ import annotations

import asyncio
import contextlib
import os
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from stormjib_health.records.ring import Recorder, ring_path
from stormjib_health.sampler.look import Target
from stormjib_health.sampler.proc import BLINK_S, UNSEEN, Activity, Watch, read_stat
from stormjib_runtime.agent_core import StepTimes
from stormjib_runtime.environment import rank_environment
from stormjib_runtime.errors import ZygoteError
from stormjib_runtime.output import LastLines
from stormjib_runtime.page import Page
from stormjib_runtime.processes import kill
from stormjib_runtime.saves import together
from stormjib_runtime.wire import RankState, Saving

if TYPE_CHECKING:
    import signal
    from pathlib import Path

    from stormjib_runtime.output import Outputs, Tap
    from stormjib_runtime.wire import Generation, ResumePoint

Launch = Callable[
    [Sequence[str], Mapping[str, str], int, int, Callable[[int], None]],
    Awaitable[int],
]
"""(words, environment on top of the base, stdout, stderr, exited) -> pid: a fork of the zygote, or an exec."""

NOT_FOUND = 127
"""Exit code of a program that could not be started, as a shell gives it."""


@dataclass
class Process:
    """One process that this agent started for a generation."""

    exited: Callable[[], None]
    pid: int = 0
    exit: int | None = None
    lines: LastLines = field(default_factory=LastLines)
    activity: Activity = UNSEEN
    watch: Watch = field(default_factory=Watch)
    taps: list[Tap] = field(default_factory=list)

    async def start(
        self, launch: Launch, words: Sequence[str], env: Mapping[str, str], outputs: Outputs, prefix: str
    ) -> None:
        """Start it, with its lines going through `outputs`. What cannot be started has exited with 127."""
        self.taps = [outputs.pipe(prefix, self.lines, error=error) for error in (False, True)]
        out, err = (tap.writer for tap in self.taps)
        try:
            self.pid = await launch(words, env, out, err, self._exited)
        except (OSError, ZygoteError) as error:
            self.lines.add(f"cannot start: {error}".encode())
            self._exited(NOT_FOUND)
        finally:
            for tap in self.taps:
                tap.started()

    def sample(self, now: float) -> None:
        """Look at it in /proc."""
        stat = read_stat(self.pid) if self.pid and self.exit is None else None
        if stat is not None:
            self.activity = self.watch.sample(now, stat)

    def send(self, number: signal.Signals) -> None:
        if self.pid and self.exit is None:
            kill(self.pid, number)

    def close(self) -> None:
        for tap in self.taps:
            tap.read()
            tap.close()

    def _exited(self, code: int) -> None:
        for tap in self.taps:
            tap.read()  # what it wrote last is in the pipe, and belongs into the message
        self.exit = code
        self.exited()


@dataclass
class Rank:
    """One rank: its page, and the process that it runs in (torchrun: one process for all)."""

    number: int
    process: Process
    page: Page
    times: StepTimes = field(default_factory=StepTimes)

    def state(self, now_ns: int, awake_ns: int = 0) -> RankState:
        """What is seen of it from outside. Before `awake_ns` nobody looked."""
        said = self.page.read()
        process = self.process
        return RankState(
            rank=self.number,
            exit=process.exit,
            step=said.step,
            step_age_s=max(0.0, (now_ns - max(said.written_ns, awake_ns)) / 1e9)
            if said.written_ns > 0
            else 0.0,
            median_step_s=self.times.sample(said.step, said.step_ns),
            phase=said.phase,
            listens=said.listens,
            process=process.activity.state,
            process_age_s=process.activity.state_age_s,
            idle_s=process.activity.idle_s,
            loss=said.loss,
            last_lines="" if process.exit is None else process.lines.text,
        )

    def target(self) -> Target:
        """Where the sampler finds it. A process that has ended has no number any more."""
        pid = self.process.pid if self.process.exit is None else 0
        return Target(self.number, int(self.page.path.name), pid, self.page.step, self.page.read().step_ns)


class Ranks:
    """All local ranks of one generation."""

    def __init__(self, folder: Path, changed: Callable[[], None]) -> None:
        self.folder = folder
        self._changed = changed
        self._looked_ns = self._awake_ns = 0
        self._ranks: list[Rank] = []
        self.all_ended = asyncio.Event()
        self.first_failure = 0
        """Exit code of the rank that failed first, which is the one that explains the others."""

    async def start(
        self,
        launch: Launch,
        words: Sequence[str],
        outputs: Outputs,
        generation: Generation,
        slot: int,
        store: str,
        resume: ResumePoint | None,
        job: str,
    ) -> None:
        """Start one process per rank."""
        self.folder.mkdir(parents=True, mode=0o700)
        node_rank = generation.node_rank(slot) or 0
        for local in range(generation.members[node_rank].processes):
            number = generation.first_rank(node_rank) + local
            env = rank_environment(generation, slot, local, store, resume, self.folder, job)
            process = self._add(number, Page.create(self.folder / str(local), generation.id))
            Recorder.create(ring_path(self.folder, local)).close()
            await process.start(launch, words, env, outputs, f"[{number}] ")

    def adopt(self, process: Process, generation: Generation, slot: int) -> None:
        """One process that runs all local ranks itself (torchrun)."""
        self.folder.mkdir(parents=True, mode=0o700)
        node_rank = generation.node_rank(slot) or 0
        for local in range(generation.members[node_rank].processes):
            page = Page.create(self.folder / str(local), generation.id)
            self._ranks.append(Rank(generation.first_rank(node_rank) + local, process, page))

    def process(self) -> Process:
        """A process that is not started yet, and tells its exit to this object."""
        process = Process(exited=lambda: self._exited(process))
        return process

    def _add(self, number: int, page: Page) -> Process:
        process = self.process()
        self._ranks.append(Rank(number, process, page))
        return process

    def _exited(self, process: Process) -> None:
        if process.exit and not self.first_failure:
            self.first_failure = process.exit
        if self.ended:
            self.all_ended.set()
        self._changed()

    @property
    def pids(self) -> list[int]:
        return [process.pid for process in self._processes() if process.pid]

    @property
    def ended(self) -> bool:
        return all(rank.process.exit is not None for rank in self._ranks)

    @property
    def listens(self) -> bool:
        return any(rank.page.listens for rank in self._ranks)

    @property
    def news(self) -> tuple[bool, ...]:
        """What is worth a report before the next heartbeat, because rules look at it: whether a rank has finished a
        step, and which processes are stopped or dead."""
        return (
            any(rank.page.step >= 0 for rank in self._ranks),
            *(process.activity.state in "TZ" for process in self._processes()),
        )

    @property
    def saved(self) -> int:
        """Newest step that a local rank has written its file of; -1 for none."""
        return max((rank.page.saved for rank in self._ranks), default=-1)

    @property
    def saving(self) -> Saving | None:
        """What their saves have cost; None where nobody has told of one."""
        told = [one for one in (rank.page.saving for rank in self._ranks) if one != Saving()]
        return together(told) if told else None

    def sample(self) -> None:
        """Look at every process and page once more."""
        now = self._look() / 1e9
        for process in self._processes():
            process.sample(now)
        for rank in self._ranks:
            rank.times.sample(rank.page.step, rank.page.read().step_ns)

    def states(self) -> tuple[RankState, ...]:
        now_ns = self._look()
        return tuple(rank.state(now_ns, self._awake_ns) for rank in self._ranks)

    def _look(self) -> int:
        """Nanoseconds now. After a hole in time (a machine that was frozen or moved) ages count from here on."""
        now_ns = time.monotonic_ns()
        if now_ns - self._looked_ns > BLINK_S * 1e9:
            self._awake_ns = now_ns
        self._looked_ns = now_ns
        return now_ns

    def targets(self) -> tuple[Target, ...]:
        """The ranks as the sampler looks at them."""
        return tuple(rank.target() for rank in self._ranks)

    def announce(self, save_at: int, stop_after: int) -> None:
        """Write both to every page."""
        for rank in self._ranks:
            rank.page.save_at = save_at
            rank.page.stop_after = stop_after

    def send(self, number: signal.Signals) -> None:
        for process in self._processes():
            process.send(number)

    def close(self) -> None:
        """Every process has ended: take the last output, remove the pages and what lies beside them."""
        for process in self._processes():
            process.close()
        for rank in self._ranks:
            rank.page.close()
        remove_tree(self.folder)

    def _processes(self) -> list[Process]:
        return list({id(rank.process): rank.process for rank in self._ranks}.values())


def remove_tree(folder: Path) -> None:
    """Remove a folder of pages, and its parent when that was the last."""
    for path, folders, files in os.walk(folder, topdown=False):
        for name in files:
            os.unlink(os.path.join(path, name))
        for name in folders:
            os.rmdir(os.path.join(path, name))
    with contextlib.suppress(OSError):
        os.rmdir(folder)
        os.rmdir(folder.parent)
