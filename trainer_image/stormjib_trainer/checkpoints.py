"""Saving and resuming, as the loop needs it, over `stormjib_checkpoint`.

Under an agent the generation is given and open, and the agent's checkpoint child commits what the ranks have left.
Under plain torchrun nobody does that, so the engine of rank 0 opens the next generation and commits.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Sequence
from concurrent.futures import wait
from functools import partial
from statistics import fmean
from typing import TYPE_CHECKING, Any

from stormjib_checkpoint import layout
from stormjib_checkpoint.doubts import doubt_above, write_doubt
from stormjib_checkpoint.engine import Engine, Save
from stormjib_checkpoint.engine.group import from_rank_0
from stormjib_checkpoint.errors import DamagedCheckpoint, FormatError, StateMismatch, StorageError, TornCopy
from stormjib_checkpoint.format import DoubtFile, ResumePoint
from stormjib_checkpoint.layout import GenerationId
from stormjib_checkpoint.pace import seconds_between
from stormjib_checkpoint.records import decode, encode
from stormjib_runtime.wire import Saving
from stormjib_trainer.environment import AUTO
from stormjib_trainer.errors import ResumeFailed, ResumeMismatch

if TYPE_CHECKING:
    from collections.abc import Mapping
    from concurrent.futures import Future

    from stormjib_checkpoint.storage import Storage
    from stormjib_checkpoint.tensors import Value
    from stormjib_trainer.control import Control
    from stormjib_trainer.environment import Environment
    from stormjib_trainer.report import Reporter

RECENT = 16
"""Saves whose mean cost is what the next one is expected to cost: of four ranks one always has just had a hiccup."""
Fed = dict[int, Sequence[int]]
"""step -> sample ids that this rank fed to the model."""


class Checkpoints:
    """The checkpoints of this generation; without a root, nothing is saved and nothing is resumed."""

    def __init__(self, env: Environment, report: Reporter, control: Control) -> None:
        self._env, self._report, self._control = env, report, control
        self._engine = _engine(env)
        self._storage = self._engine.storage if self._engine else None
        self._under_way: list[tuple[Save, Fed]] = []
        self._began, self._trained_s, self.lives = time.monotonic(), 0.0, 1
        self._first: Save | None = None
        """What it costs says little of the next one: it makes the plan."""
        self._costs_s: deque[float] = deque(maxlen=RECENT - 1)
        self._untold: Fed = {}
        """What was fed in steps that are not on their way to the storage, or were in vain: the next one that is tells it."""

    @property
    def generation(self) -> str:
        return self._engine.generation if self._engine else str(self._env.generation or "")

    @property
    def trained_s(self) -> float:
        """How long this job has trained, in all its generations that left a step."""
        return self._trained_s + time.monotonic() - self._began

    def keep_pace(self, trained_s: float, lives: int) -> None:
        """Where it has resumed: what the job had lived through at that step. `lives` are its generations that left a step."""
        self._trained_s, self.lives = trained_s, lives + 1

    def ready(self) -> bool:
        """Whether this rank would save now where nobody has said when."""
        if self._env.checkpoint_interval != AUTO:
            return True
        return all(save.upload_completion.done() for save, _ in self._under_way) and self._may_cost()

    def can_stage(self) -> bool:
        """Whether this rank would stage a step now that is not saved."""
        return self._engine is not None and self._engine.can_stage and self._may_cost()

    def _may_cost(self) -> bool:
        """Whether what a save costs is as little as it may be of the time since the last one."""
        if not self._under_way or self._under_way[-1][0] is self._first:
            return True
        last, _ = self._under_way[-1]
        costs_s = [*self._costs_s, _cost_s(last)]
        wanted_s = seconds_between(fmean(costs_s), self._env.world, self.trained_s, self.lives - 1)
        return last.age_s() >= wanted_s

    def due(self, step: int, *, hold: bool) -> bool:
        """Whether the interval asks for a save after `step`; `hold`: some rank is not ready."""
        every = self._env.checkpoint_interval
        return not hold if every == AUTO else every > 0 and step % every == 0

    def resume(self, state: dict[str, Value]) -> dict[str, Any] | None:
        """Fill `state` from where this generation resumes; what was saved beside it, or None for a fresh start.

        Raises ResumeFailed where an agent must choose an older step; without an agent it is chosen here.
        """
        if self._engine is None:
            return None
        try:
            train = self._engine.load(state)
        except StateMismatch as error:
            raise ResumeMismatch(f"the checkpoint is of another model: {error}") from error
        except DamagedCheckpoint as error:
            point = self._engine.resume
            what = f"step {point.step} of generation {point.generation}" if point else "the step to resume"
            raise ResumeFailed(f"rank {self._env.rank}: {what} could not be loaded: {error}") from error
        point = self._engine.resume
        if train is not None and point is not None:
            self._report.event("resumed", step=point.step, of=point.generation, generation=self.generation)
        self._engine.reserve(state)
        return train

    def save(self, step: int, state: dict[str, Value], train: Mapping[str, Any], fed: Fed) -> bool:
        """Begin to save this rank's part of a step. Under an agent its child commits it, else rank 0 does."""
        if self._engine is None:
            return False
        save = self._begin(self._engine, step, state, train, fed)
        save.upload_completion.add_done_callback(partial(self._ended, self._engine, step))
        return True

    def stage(self, step: int, state: dict[str, Value], train: Mapping[str, Any], fed: Fed) -> None:
        """Have this rank's part of a step in the node's memory, and no further. For when all ranks can."""
        if self._engine is not None:
            self._begin(self._engine, step, state, train, fed, to_storage=False)
            self._untold |= fed

    def finish(self) -> None:
        """Until every save has reached the storage, or failed."""
        for save, _ in self._under_way:
            wait([save.upload_completion])
        self._settle()

    def _begin(
        self,
        engine: Engine,
        step: int,
        state: dict[str, Value],
        train: Mapping[str, Any],
        fed: Fed,
        *,
        to_storage: bool = True,
    ) -> Save:
        self._settle()
        samples = dict(self._untold)
        for _, told in self._under_way:
            samples |= told
        samples |= fed
        begin = partial(
            engine.async_save, state, step=step, train=train, samples=samples, to_storage=to_storage
        )
        try:
            save = begin()
        except TornCopy:  # an older step, of which `_settle` tells: this one is saved all the same
            save = begin()
        self._first = self._first or save
        self._count(engine)
        self._under_way.append((save, samples))
        return save

    def _ended(self, engine: Engine, step: int, how: Future[None]) -> None:
        """In a thread of the engine: the agent has it committed at once, however long the step in progress takes."""
        self._count(engine)
        if how.exception() is None:
            self._control.saved(step)

    def _count(self, engine: Engine) -> None:
        """For the job's metrics."""
        sums = engine.totals.now()
        counts = {"saves": sums.saves, "failures": sums.failures, "in_flight": sums.in_flight}
        last = sums.last
        self._control.told(
            Saving(
                **counts,
                bytes=sums.bytes,
                lost_s=sums.lost_s,
                call_s=last.call_s,
                wait_s=last.waited_s,
                staged_s=last.staged_s,
                durable_s=last.durable_s,
            )
        )

    def _settle(self) -> None:
        """Tell how the saves have ended that have. Raises StorageError: whoever cannot save shall not train for nothing."""
        for save, fed in self._under_way:
            if not save.upload_completion.done():
                continue
            error = save.upload_completion.exception()
            if error is None and not save.to_storage:
                self._note_cost(save)
            elif error is None:
                self._untold = {step: ids for step, ids in self._untold.items() if step not in fed}
                self._tell(save)
            else:
                self._untold |= fed
                self._report.event("unsaved", step=save.step, why=str(error))
                if isinstance(error, StorageError):
                    raise error
        self._under_way = [(save, fed) for save, fed in self._under_way if not save.upload_completion.done()]

    def _tell(self, save: Save) -> None:
        figures = save.figures
        self._note_cost(save)
        times = {
            "call_ms": figures.call_s,
            "wait_ms": figures.waited_s,
            "staged_ms": figures.staged_s,
            "durable_ms": figures.durable_s,
        }
        self._report.event("saved", step=save.step, **{key: round(s * 1e3, 2) for key, s in times.items()})

    def _note_cost(self, save: Save) -> None:
        if save is not self._first:
            self._costs_s.append(_cost_s(save))

    def doubt(self, step: int, trusted: int, numbers: dict[str, Any]) -> None:
        """Leave on the storage that nothing after step `trusted` may be resumed from. Rank 0 does it."""
        if self._storage is not None and self._env.rank == 0:
            own = GenerationId.parse(self.generation)
            write_doubt(self._storage, DoubtFile(own, step, trusted, numbers))

    def doubted(self, done: int) -> DoubtFile | None:
        """What an earlier generation has doubted of the steps after `done`: the same on every rank."""
        if self._storage is None:
            return None
        text = ""
        if self._env.rank == 0:
            text = self._read_doubt(self._storage, done)
        text = from_rank_0(text)
        return decode(DoubtFile, text.encode(), layout.DOUBTS) if text else None

    def _read_doubt(self, storage: Storage, done: int) -> str:
        try:
            found = doubt_above(storage, done)
        except FormatError as error:
            self._report.event("unreadable", why=str(error))
            return ""
        return encode(found).decode() if found else ""


def _cost_s(save: Save) -> float:
    """That training stood still for it."""
    return save.figures.call_s + save.figures.waited_s


def _engine(env: Environment) -> Engine | None:
    if not env.checkpoint_root:
        return None
    resume = None
    if env.resume is not None:
        resume = ResumePoint(env.resume.step, str(env.resume.generation), env.resume.digest)
    return Engine(
        env.checkpoint_root,
        generation=str(env.generation or ""),
        resume=resume,
        keep_last=env.checkpoint_keep,
        job_uid=env.job_uid,
        memory=env.checkpoint_memory,
    )
