"""One save: what it is made of, how far it is, and what it has cost."""

from __future__ import annotations

import time
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    import torch

    from stormjib_checkpoint.engine.berths import Berth
    from stormjib_checkpoint.engine.device import Marks
    from stormjib_checkpoint.engine.plan import Plan
    from stormjib_checkpoint.format import ResumePoint
    from stormjib_checkpoint.writer import Part


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
    to_storage: bool = True
    """Else it goes no further than the node's memory."""
    staging_completion: Future[None] = field(default_factory=Future)
    """Done: the state may change. Raises TornCopy where it changed before."""
    upload_completion: Future[None] = field(default_factory=Future)
    """Done: this rank's part is durable, and where the engine commits, the step is. Older steps may still be being deleted.
    Where it does not go to the storage: it is safe from the death of this process."""
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
    marks: Marks
    """Where the devices stood that the state lies on; empty where all of it lies on the host."""
