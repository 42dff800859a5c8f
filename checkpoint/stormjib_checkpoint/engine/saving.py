"""One save on its way through its two threads: to memory, and to the storage."""

from __future__ import annotations

import marshal
import time
from concurrent.futures import Future, wait
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple

from stormjib_checkpoint import layout
from stormjib_checkpoint.engine import torn
from stormjib_checkpoint.engine.flush import Handover, flush
from stormjib_checkpoint.engine.staging import stage
from stormjib_checkpoint.engine.workers import Job, Workers
from stormjib_checkpoint.errors import SaveError, TornCopy
from stormjib_checkpoint.left import leave
from stormjib_checkpoint.writer import records_of, told_as_saved

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    import torch

    from stormjib_checkpoint.engine.berths import Berth
    from stormjib_checkpoint.engine.gate import Gate
    from stormjib_checkpoint.engine.plan import Plan
    from stormjib_checkpoint.format import DataFile, ResumePoint
    from stormjib_checkpoint.left import Records
    from stormjib_checkpoint.storage import Storage
    from stormjib_checkpoint.writer import Part


IN_FLIGHT = 2
"""Saves that are not on the storage yet; a call for one more waits, and says for how long."""


@dataclass
class Figures:
    """What one save cost and when it was where, in seconds from its call; filled as it goes."""

    bytes: int = 0
    call_s: float = 0.0
    """That the call took, `busy_s` included."""
    busy_s: float = 0.0
    """That the call waited because older saves were not on the storage yet."""
    waited_s: float = 0.0
    """That optimizers, or `guard`, waited for its copy. With `call_s` it is what training has lost in the hot path."""
    staged_s: float = 0.0
    durable_s: float = 0.0
    """This rank's part, its record included."""
    committed_s: float = 0.0
    """Where this engine commits."""


@dataclass
class Save:
    """One step on its way. The two futures have the names that DCP's `AsyncSaveResponse` gives them."""

    step: int
    staging_completion: Future[None] = field(default_factory=Future)
    """Done: the state may change. Raises TornCopy where it changed before."""
    upload_completion: Future[None] = field(default_factory=Future)
    """Done: this rank's part is durable, and where the engine commits, the step is."""
    figures: Figures = field(default_factory=Figures)
    point: ResumePoint | None = None
    """The committed step, where this engine commits."""
    began: float = field(default_factory=time.perf_counter)

    def age_s(self) -> float:
        """Since its call."""
        return time.perf_counter() - self.began


class Taken(NamedTuple):
    """What the call has taken down of the state, so that it does not matter what becomes of the mapping afterwards."""

    who: Part
    berth: Berth
    plan: Plan
    tensors: Sequence[torch.Tensor]
    versions: Sequence[int]
    clones: Mapping[str, torch.Tensor]
    """Volatile tensors as they were."""
    scalars: bytes
    train: bytes
    samples: dict[int, tuple[int, ...]]
    ready: Callable[[], None]
    """Waits until a device has done what was asked of it before the call."""


class Pipeline:
    """The threads that saves go through. `commit` is asked for each step that is durable here; None: somebody else does it."""

    def __init__(self, storage: Storage, gate: Gate, commit: Callable[[Save], None]) -> None:
        self._storage, self._gate, self._commit = storage, gate, commit
        self._stage = Workers("stormjib-stage")
        self._flush = Workers("stormjib-flush", IN_FLIGHT)

    def begin(self, save: Save, taken: Taken, older: Save | None) -> None:
        """Shut the gate and let it go. `older` is the save before: steps are staged, and committed, in order."""
        handover = Handover()
        staged: Future[DataFile] = Future()
        copying = Job(lambda: self._to_memory(save, taken, handover, staged), save.staging_completion)
        telling = Job(
            lambda: _told(taken, staged)
        )  # when the gate is open again: writing it down takes a while
        self._gate.shut(copying, save.figures)
        self._flush.put(
            Job(
                lambda: self._to_storage(save, taken, older, handover, telling.future), save.upload_completion
            )
        )
        self._stage.put(copying)
        self._stage.put(telling)

    def close(self) -> None:
        """Wait for all saves that have begun."""
        self._stage.close()
        self._flush.close()

    def _to_memory(self, save: Save, taken: Taken, handover: Handover, staged: Future[DataFile]) -> None:
        try:
            taken.ready()
            data = self._copy(save, taken, handover)
            save.figures.staged_s = save.age_s()
        except BaseException as error:
            handover.end(error)
            staged.set_exception(error)
            raise
        handover.end()
        staged.set_result(data)

    def _copy(self, save: Save, taken: Taken, handover: Handover) -> DataFile:
        found = taken.plan.locals_of(taken.tensors)
        if found is None:
            raise SaveError(
                f"step {save.step} is not saved: the type or the sharding of a tensor is not what it was at the save before. "
                "The next save is planned anew."
            )
        parts = taken.plan.image.parts
        sources = [taken.clones.get(p.name, local) for p, local in zip(parts, found, strict=True)]
        if taken.berth.slot is not None:
            taken.berth.slot.clear()
        data = stage(taken.plan.image, sources, taken.berth.arena, handover.put)
        name = torn.changed(self._copied(taken, found), save.step)
        if name is not None:
            raise TornCopy(
                f"step {save.step} is not saved: {name} changed while it was copied. Call the engine's guard() before "
                "whatever changes it, or name it in volatile="
            )
        return data

    def _copied(self, taken: Taken, found: Sequence[torch.Tensor]) -> list[torn.Copied]:
        guarded = self._gate.guarded()
        file = taken.plan.image
        rows = zip(file.parts, file.starts, taken.tensors, taken.versions, found, strict=True)
        return [
            torn.Copied(
                part.name,
                tensor,
                version,
                local,
                taken.berth.arena.address + start,
                local.untyped_storage().data_ptr() in guarded,
            )
            for part, start, tensor, version, local in rows
            if part.name not in taken.clones
        ]

    def _to_storage(
        self, save: Save, taken: Taken, older: Save | None, handover: Handover, records: Future[Records]
    ) -> None:
        who = taken.who
        path = f"{layout.folder(who.step, who.generation)}/{layout.rank_data(who.rank)}"
        with told_as_saved(who):
            flush(self._storage, path, taken.plan.image.size, taken.berth.arena, handover)
            leave(self._storage, who.step, who.generation, who.rank, records.result())
        save.figures.durable_s = save.age_s()
        if older is not None:
            wait([older.upload_completion])
        self._commit(save)


def _told(taken: Taken, staged: Future[DataFile]) -> Records:
    """What is said of the data, once it is staged. A slot that holds it says so from then on: it is safe from the death of this process."""
    data = staged.result()
    scalars, train = marshal.loads(taken.scalars), marshal.loads(taken.train)
    records = records_of(taken.who, data, taken.plan.image.atoms, scalars, train, taken.samples)
    if taken.berth.slot is not None:
        taken.berth.slot.tell(records)
    return records
