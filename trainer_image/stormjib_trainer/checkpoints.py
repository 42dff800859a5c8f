"""Saving and resuming, as the loop needs it, over `stormjib_checkpoint`.

Under an agent the generation is given and open, and the agent's checkpoint child commits what the ranks have left.
Under plain torchrun nobody does that, so rank 0 opens the next generation and commits.
"""

from __future__ import annotations

import json
import sys
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist

from stormjib_checkpoint import layout
from stormjib_checkpoint.commit import commit_when_complete
from stormjib_checkpoint.doubts import doubt_above, write_doubt
from stormjib_checkpoint.errors import (
    CommitError,
    DamagedCheckpoint,
    FormatError,
    MissingCheckpoint,
    StateMismatch,
)
from stormjib_checkpoint.format import DoubtFile
from stormjib_checkpoint.layout import GenerationId
from stormjib_checkpoint.opening import open_next
from stormjib_checkpoint.reader import load
from stormjib_checkpoint.records import decode, encode
from stormjib_checkpoint.retention import retain
from stormjib_checkpoint.storage import Local
from stormjib_checkpoint.writer import save_rank
from stormjib_trainer.errors import ResumeFailed, ResumeMismatch

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from stormjib_checkpoint.storage import Storage
    from stormjib_checkpoint.tensors import Value
    from stormjib_trainer.environment import Environment
    from stormjib_trainer.report import Reporter

Point = tuple[int, str, str]
"""Step, generation, digest of the manifest."""


class Checkpoints:
    """The checkpoints of this generation; without a root, nothing is saved and nothing is resumed."""

    def __init__(self, env: Environment, report: Reporter, device: torch.device) -> None:
        self._env, self._report, self._device = env, report, device
        self._storage = Local(env.checkpoint_root) if env.checkpoint_root else None
        self._own = env.generation is None
        self.generation = str(env.generation or "")

    def due(self, step: int) -> bool:
        """Whether the interval asks for a save after `step`."""
        return self._env.checkpoint_interval > 0 and step % self._env.checkpoint_interval == 0

    def resume(self, state: dict[str, Value]) -> dict[str, Any] | None:
        """Fill `state` from where this generation resumes; what was saved beside it, or None for a fresh start.

        Raises ResumeFailed where an agent must choose an older step; without an agent it is chosen here.
        """
        refused: list[str] = []
        while (point := self._open(refused)) is not None:
            train = self._load(point, state)
            if train is not None:
                self._report.event("resumed", step=point[0], of=point[1], generation=self.generation)
                return train
            if not self._own:
                raise ResumeFailed(f"step {point[0]} of generation {point[1]} could not be loaded")
            refused.append(point[2])
        return None

    def save(
        self,
        step: int,
        state: dict[str, Value],
        train: Mapping[str, Any],
        samples: Mapping[int, Sequence[int]],
    ) -> bool:
        """Leave this rank's part of a step on the storage; without an agent rank 0 commits it too."""
        if self._storage is None:
            return False
        save_rank(
            self._storage,
            step=step,
            generation=self.generation,
            rank=self._env.rank,
            world=self._env.world,
            state=state,
            train=train,
            samples=samples,
        )
        if self._own and self._env.rank == 0:
            self._commit(self._storage, step)
        return True

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
        text = _from_rank_0(text, self._device)
        return decode(DoubtFile, text.encode(), layout.DOUBTS) if text else None

    def _read_doubt(self, storage: Storage, done: int) -> str:
        try:
            found = doubt_above(storage, done)
        except FormatError as error:
            self._report.event("unreadable", why=str(error))
            return ""
        return encode(found).decode() if found else ""

    def _commit(self, storage: Local, step: int) -> None:
        try:
            commit_when_complete(storage, self.generation, self._env.world, step)
        except CommitError as error:
            self._report.event("uncommitted", step=step, why=str(error))
            return
        retain(storage, self.generation, self._env.checkpoint_keep)

    def _open(self, refused: Sequence[str]) -> Point | None:
        if self._storage is None:
            return None
        if not self._own:
            given = self._env.resume
            return (given.step, str(given.generation), given.digest) if given else None
        note = ""
        if self._env.rank == 0:
            opening = open_next(self._storage, self._env.job_uid, refused)
            note = json.dumps([opening.generation, opening.resume])
        self.generation, point = json.loads(_from_rank_0(note, self._device))
        return (point[0], point[1], point[2]) if point else None

    def _load(self, point: Point, state: dict[str, Value]) -> dict[str, Any] | None:
        """None where some rank could not load: then none of them did."""
        train = None
        try:
            train = load(self._storage, point, state) if self._storage else None
        except StateMismatch as error:
            raise ResumeMismatch(f"the checkpoint is of another model: {error}") from error
        except (DamagedCheckpoint, MissingCheckpoint) as error:
            print(f"stormjib_trainer: rank {self._env.rank}: {error}", file=sys.stderr, flush=True)
        loaded = torch.tensor(int(train is not None), device=self._device)
        dist.all_reduce(loaded, dist.ReduceOp.MIN)
        return train if loaded.item() else None


def _from_rank_0(text: str, device: torch.device) -> str:
    """A text of rank 0, on every rank. Bytes in a tensor: torch's own way for objects is pickle."""
    data = text.encode()
    length = torch.tensor(len(data), device=device)
    dist.broadcast(length, src=0)
    if not length.item():
        return ""
    note = torch.zeros(int(length.item()), dtype=torch.uint8)
    if data:
        note[:] = torch.tensor(list(data), dtype=torch.uint8)
    note = note.to(device)
    dist.broadcast(note, src=0)
    return bytes(note.tolist()).decode()
