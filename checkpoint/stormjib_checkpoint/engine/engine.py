"""The engine: `async_save` takes well under a millisecond, the rest happens beside training.

call     names, versions and scalars are taken down, volatile tensors copied, the gate shut
stage    a thread copies and hashes the rest into the arena, compares, and opens the gate
flush    threads write the pieces as they come; then the rank's record and, where nobody else does it, the commit
"""

from __future__ import annotations

import atexit
import json
import logging
import marshal
import os
from concurrent.futures import wait
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

import torch

from stormjib_checkpoint import reader
from stormjib_checkpoint import state as states
from stormjib_checkpoint.agreeing import agreed
from stormjib_checkpoint.commit import commit_when_complete
from stormjib_checkpoint.engine import device, group, torn
from stormjib_checkpoint.engine.berths import Berths
from stormjib_checkpoint.engine.gate import Gate
from stormjib_checkpoint.engine.pipeline import IN_FLIGHT, Pipeline
from stormjib_checkpoint.engine.plan import Plan, plan
from stormjib_checkpoint.engine.saving import Save, Taken
from stormjib_checkpoint.engine.tidier import Tidier
from stormjib_checkpoint.engine.totals import Totals
from stormjib_checkpoint.errors import (
    CommitError,
    DamagedCheckpoint,
    MissingCheckpoint,
    SaveError,
    SpecError,
    StateMismatch,
    TornCopy,
    UnsupportedState,
)
from stormjib_checkpoint.format import ResumePoint
from stormjib_checkpoint.layout import GenerationId
from stormjib_checkpoint.node_memory import Near
from stormjib_checkpoint.opening import open_next
from stormjib_checkpoint.stores.urls import open_storage
from stormjib_checkpoint.tensors import local_of
from stormjib_checkpoint.writer import Part, checked_ids, refuse_unstorable

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Mapping, MutableMapping, Sequence

    from torch import nn
    from torch.optim import Optimizer

    from stormjib_checkpoint.reader import Rename
    from stormjib_checkpoint.records import Json
    from stormjib_checkpoint.spec.layout import Layout
    from stormjib_checkpoint.storage import Storage
    from stormjib_checkpoint.tensors import Value

NAMED_BYTES = 4096
"""More than the names and small values of one parameter's state take in a file. Of its size there are two, as Adam has them; where
an optimizer has less, some memory is left over, and where it has more, the first save takes longer."""

_log = logging.getLogger(__name__)
T = TypeVar("T")


class Engine:
    """Saves and loads the steps of one rank. Make one per process: after the process group, before the first step."""

    def __init__(
        self,
        root: str | os.PathLike[str] | Storage,
        *,
        generation: str = "",
        resume: ResumePoint | None = None,
        keep_last: int = 2,
        job_uid: str = "",
        volatile: Collection[str] = (),
        memory: str | os.PathLike[str] = "",
        layout: Layout | None = None,
    ) -> None:
        """Without `generation` the next one is opened on `root` (by rank 0, for all), and this engine commits and deletes old steps.
        With one, whoever gave it does, and said where it resumes. `volatile` are patterns of names (`ema.*`) of tensors
        that may change at any moment; they are copied in the call. Buffers of a model given to `prepare` are volatile too.
        `memory` is a folder on a memory-backed volume: staged there, a step outlives this process, and whoever starts the next one
        can finish it (`adopting.adopt`). Without it a step that is not on the storage yet dies with the process.
        `layout` says how plain tensors lie where not every rank has the whole of them; DTensors say it themselves.

        Raises StorageError where `root` cannot be written, BadKey, and HistoryError.
        """
        self.rank, self.world = group.place()
        self.totals = Totals()
        self.storage: Storage = open_storage(root) if isinstance(root, (str, os.PathLike)) else root
        self.generation, self.resume = generation, resume
        self._commits = not generation
        self._job_uid, self._keep_last, self._volatile = job_uid, keep_last, tuple(volatile)
        self._half_loaded = False
        self._layout = layout
        if self._commits:
            self._open(())
        self._gate = Gate()
        self._buffers: set[int] = set()
        self._memory = Path(memory) if memory else None
        self._berths = Berths(self._memory, int(os.environ.get("LOCAL_RANK", "0")))
        self._plan: Plan | None = None
        self._saves: list[Save] = []
        self._pipeline = Pipeline(self.storage, self._gate, self._commit)
        self._tidier = Tidier(self.storage)
        atexit.register(self.close)  # a save that was begun is finished, whoever forgets to wait for it

    # --- before training --------------------------------------------------------------------------------------------

    def prepare(self, model: nn.Module, optimizer: Optimizer) -> None:
        """Take the memory for the first save now, also for optimizer state that does not exist yet. Raises ArenaTooLarge."""
        self._gate.know(optimizer)
        self._plan = None
        self._buffers |= {buffer.untyped_storage().data_ptr() for buffer in model.buffers()} - {0}
        size = self._planned(states.collect(model, optimizer)).image.size
        if not optimizer.state:
            size += sum(2 * _local_bytes(parameter) + NAMED_BYTES for parameter in model.parameters())
        self._have(size)
        self._berths.touch()
        if any(map(device.on_device, model.parameters())):
            self._berths.pin()

    def reserve(self, state: Mapping[str, Value]) -> None:
        """As `prepare`, for a state that is complete already. Raises UnsupportedState, ArenaTooLarge."""
        self._have(self._planned(state).image.size)
        self._berths.touch()

    def load(
        self, state: MutableMapping[str, Value], *, rename: Rename | None = None, cast: Collection[str] = ()
    ) -> dict[str, Json] | None:
        """Fill `state` from the step that this generation resumes from, as `reader.load` does, with all ranks as its group. What was
        saved as `train`; None on a fresh start. Where a rank finds damage, all take the next older step; with a `generation` given, DamagedCheckpoint is raised
        instead. Raises StateMismatch, StorageError, NoUsableCheckpoint."""
        return self._resumed(
            lambda point: reader.load(
                self.storage,
                point,
                state,
                rename=rename,
                cast=cast,
                layout=self._layout,
                near=self._near(),
                group=group.World(),
            )
        )

    def restore(
        self,
        model: nn.Module,
        optimizer: Optimizer,
        *,
        rename: Rename | None = None,
        cast: Collection[str] = (),
    ) -> dict[str, Json] | None:
        """As `load`, into a model and its optimizer, for what `state.collect` has made of them."""
        return self._resumed(
            lambda point: states.restore(
                self.storage,
                point,
                model,
                optimizer,
                rename=rename,
                cast=cast,
                near=self._near(),
                group=group.World(),
            )
        )

    # --- while training ---------------------------------------------------------------------------------------------

    def async_save(
        self,
        state: Mapping[str, Value],
        *,
        step: int,
        train: Mapping[str, Json] | None = None,
        samples: Mapping[int, Sequence[int]] | None = None,
        to_storage: bool = True,
    ) -> Save:
        """Save `state` (names to tensors, DTensors and other values) as it is now. `train` is rank 0's; `samples`
        are the ids that this rank fed to the model, by step, since its last save.

        What torch's optimizers change may be changed by them at once: they wait for the copy. Before any other change call `guard`.
        Without `to_storage` it stays in `memory`, and the next save may take its place: for the steps between those that are worth
        writing. All ranks must have staged the one before. Which step is whole there, and newest, whoever adopts it finds out.

        A tensor that changed while it was copied fails the save with TornCopy, which the next call raises too; other failures are
        logged. Raises UnsupportedState, ArenaTooLarge, TornCopy, SaveError.
        """
        save = Save(step, to_storage)
        if not to_storage and not self._berths.outlasts:
            raise SaveError(
                f"step {step} would be nowhere: without `memory` only steps that go to the storage are saved"
            )
        if self._half_loaded:
            raise SaveError(
                "a load has failed half-way: the state is of no step. Load one whole step before saving."
            )
        self._settle()
        while len(self._saves) >= IN_FLIGHT:
            wait([self._saves[0].upload_completion])
            self._settle()
        save.figures.busy_s = save.age_s()
        taken = self._take(save, state, train or {}, samples or {})
        self._pipeline.begin(save, taken, self._saves[-1] if self._saves else None)
        self._saves.append(save)
        save.figures.bytes, save.figures.call_s = taken.plan.image.size, save.age_s()
        self.totals.begun(save)
        return save

    @property
    def can_stage(self) -> bool:
        """Whether a save that does not go to the storage would be of use, and not wait."""
        staged = all(save.staging_completion.done() for save in self._saves)
        return staged and self._berths.outlasts and self._berths.has_room

    def guard(self) -> None:
        """Call it before anything but an optimizer of torch changes what is saved: waits until the step is staged."""
        self._gate.wait()

    def wait(self) -> None:
        """Until no save is on its way, and what can be deleted by then is. Raises TornCopy as `async_save` does."""
        wait([save.upload_completion for save in self._saves])
        self._tidier.settled()
        self._settle()

    def close(self) -> None:
        """Finish all that is on its way, and let go of the optimizers. What has failed is logged."""
        self._pipeline.close()
        self._tidier.close()
        self._gate.close()
        atexit.unregister(self.close)
        try:
            self._settle()
        except TornCopy as error:
            _log.error("%s", error)

    # --- inside -----------------------------------------------------------------------------------------------------

    def _take(
        self,
        save: Save,
        state: Mapping[str, Value],
        train: Mapping[str, Json],
        samples: Mapping[int, Sequence[int]],
    ) -> Taken:
        planned = self._planned(state)
        tensors = planned.tensors(state)
        clones = planned.clones(state)
        values = _frozen(planned.others(state), "state"), _frozen(dict(train), "train"), checked_ids(samples)
        self._have(planned.image.size)
        return Taken(
            Part(save.step, GenerationId.parse(self.generation), self.rank, self.world),
            # After all that can be refused: the slot of the save before must not come up too soon.
            self._berths.next(save),
            planned,
            tensors,
            torn.versions(tensors),
            clones,
            *values,
            device.marks(tensors),
        )

    def _planned(self, state: Mapping[str, Value]) -> Plan:
        if self._plan is None or not self._plan.seems_to_fit(state):
            self._plan = plan(state, self.rank, self.world, self._volatile, self._buffers, self._layout)
        return self._plan

    def _have(self, size: int) -> None:
        if self._berths.size < size:
            wait([save.upload_completion for save in self._saves])
            self._berths.make(size)

    def _near(self) -> Near | None:
        return Near(self._memory, self.storage.key) if self._memory is not None else None

    def _settle(self) -> None:
        """Forget the saves that have ended. Raises TornCopy, and logs what else went wrong."""
        ended = [save for save in self._saves if save.upload_completion.done()]
        self._saves = [save for save in self._saves if save not in ended]
        failed = {save.step: save.upload_completion.exception() for save in ended}
        for step, error in failed.items():
            if error is not None and not isinstance(error, TornCopy):
                _log.error("step %d is not saved: %s", step, error)
            if isinstance(error, SaveError):
                self._plan = None
        for error in failed.values():
            if isinstance(error, TornCopy):
                raise error

    def _commit(self, save: Save) -> None:
        if not self._commits or self.rank != 0:
            return
        try:
            save.point = commit_when_complete(self.storage, self.generation, self.world, save.step)
        except CommitError as error:
            _log.warning("step %d is not committed: %s", save.step, error)
            return
        save.figures.committed_s = save.age_s()
        self._tidier.ask(self.generation, self._keep_last)

    def _open(self, refused: Sequence[str]) -> None:
        note = ""
        with agreed(group.World()):
            if self.rank == 0:
                opening = open_next(self.storage, self._job_uid, refused)
                for passed_over in opening.notes:
                    _log.warning("%s", passed_over)
                note = json.dumps([opening.generation, opening.resume])
        self.generation, point = json.loads(group.from_rank_0(note))
        self.resume = ResumePoint(*point) if point else None

    def _resumed(self, attempt: Callable[[ResumePoint], T]) -> T | None:
        refused: list[str] = []
        while self.resume is not None:
            self._half_loaded = True
            try:
                found, problem = _tried(attempt, self.resume)
            except (StateMismatch, SpecError, UnsupportedState):
                self._half_loaded = False  # told by the index, before the first byte
                raise
            if group.all_agree(found is not None):
                self._half_loaded = False
                return found
            if not self._commits:
                raise DamagedCheckpoint(problem or f"another rank could not load step {self.resume.step}")
            _log.warning(
                "step %d is passed over: %s", self.resume.step, problem or "another rank could not load it"
            )
            refused.append(self.resume.digest)
            self._open(refused)
        return None


def _tried(attempt: Callable[[ResumePoint], T], point: ResumePoint) -> tuple[T | None, str]:
    try:
        return attempt(point), ""
    except (DamagedCheckpoint, MissingCheckpoint) as error:
        return None, str(error)


def _frozen(values: dict[str, Json], where: str) -> bytes:
    """Plain values as bytes, so that they may change afterwards. In memory only: for files there is JSON."""
    try:
        return marshal.dumps(values)
    except ValueError as error:
        refuse_unstorable(values, where)
        raise UnsupportedState(f"{where}: {error}") from error


def _local_bytes(tensor: torch.Tensor) -> int:
    with torch.no_grad():
        local = local_of(tensor)
    return local.numel() * local.element_size()
