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
from stormjib_checkpoint.writer import leave_record, told_as_saved

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    import torch

    from stormjib_checkpoint.engine.arena import Arena
    from stormjib_checkpoint.engine.gate import Gate
    from stormjib_checkpoint.engine.plan import Plan
    from stormjib_checkpoint.format import ResumePoint
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
    arena: Arena
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
        copying = Job(lambda: self._to_memory(save, taken, handover), save.staging_completion)
        self._gate.shut(copying, save.figures)
        self._flush.put(Job(lambda: self._to_storage(save, taken, older, handover), save.upload_completion))
        self._stage.put(copying)

    def close(self) -> None:
        """Wait for all saves that have begun."""
        self._stage.close()
        self._flush.close()

    def _to_memory(self, save: Save, taken: Taken, handover: Handover) -> None:
        failed: BaseException | None = None
        try:
            taken.ready()
            self._copy(save, taken, handover)
            save.figures.staged_s = save.age_s()
        except BaseException as error:
            failed = error
            raise
        finally:
            handover.end(failed)

    def _copy(self, save: Save, taken: Taken, handover: Handover) -> None:
        found = taken.plan.locals_of(taken.tensors)
        if found is None:
            raise SaveError(
                f"step {save.step} is not saved: the type or the sharding of a tensor is not what it was at the save before. "
                "The next save is planned anew."
            )
        parts = taken.plan.image.parts
        sources = [taken.clones.get(p.name, local) for p, local in zip(parts, found, strict=True)]
        stage(taken.plan.image, sources, taken.arena, handover.put)
        name = torn.changed(self._copied(taken, found), save.step)
        if name is not None:
            raise TornCopy(
                f"step {save.step} is not saved: {name} changed while it was copied. Call the engine's guard() before "
                "whatever changes it, or name it in volatile="
            )

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
                taken.arena.address + start,
                local.untyped_storage().data_ptr() in guarded,
            )
            for part, start, tensor, version, local in rows
            if part.name not in taken.clones
        ]

    def _to_storage(self, save: Save, taken: Taken, older: Save | None, handover: Handover) -> None:
        who, file = taken.who, taken.plan.image
        path = f"{layout.folder(who.step, who.generation)}/{layout.rank_data(who.rank)}"
        scalars, train = marshal.loads(taken.scalars), marshal.loads(taken.train)
        with told_as_saved(who):
            data = flush(self._storage, path, file.size, taken.arena, handover)
            leave_record(self._storage, who, data, file, scalars, train, taken.samples)
        save.figures.durable_s = save.age_s()
        if older is not None:
            wait([older.upload_completion])
        self._commit(save)
