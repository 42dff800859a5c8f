"""A save without an engine: staged whole, then flushed by one thread, so that every run does the same operations in the same order."""

from __future__ import annotations

import time
from types import MappingProxyType
from typing import TYPE_CHECKING

from stormjib_checkpoint import layout
from stormjib_checkpoint.commit import commit_step
from stormjib_checkpoint.engine.arena import Arena
from stormjib_checkpoint.engine.flush import Handover, flush
from stormjib_checkpoint.engine.staging import Copying
from stormjib_checkpoint.history import committed
from stormjib_checkpoint.image import image_of
from stormjib_checkpoint.layout import GenerationId
from stormjib_checkpoint.left import leave
from stormjib_checkpoint.opening import open_next
from stormjib_checkpoint.writer import Part, checked_ids, records_of, split, told_as_saved

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from stormjib_checkpoint.format import ResumePoint
    from stormjib_checkpoint.records import Json
    from stormjib_checkpoint.spec.layout import Layout
    from stormjib_checkpoint.storage import Storage
    from stormjib_checkpoint.tensors import Held, Value


def save_rank(
    storage: Storage,
    *,
    step: int,
    generation: str,
    rank: int,
    world: int,
    state: Mapping[str, Value],
    train: Mapping[str, Json],
    samples: Mapping[int, Sequence[int]],
    attempt: str = "",
    layout: Layout | None = None,
) -> None:
    """Leave this rank's part of `step`; nobody commits."""
    parts, ties, scalars = split(state, rank, world, layout)
    who = Part(step, GenerationId.parse(generation), rank, world, attempt)
    save_parts(storage, who, parts, scalars, train, samples, ties)


def commit_states(
    storage: Storage, *states: Mapping[str, Value], step: int = 1, **train: Json
) -> ResumePoint:
    """Open the next generation, have each rank leave a state, and commit the step."""
    generation, world = open_next(storage).generation, len(states)
    for rank, state in enumerate(states):
        save_rank(
            storage,
            step=step,
            generation=generation,
            rank=rank,
            world=world,
            state=state,
            train=train,
            samples={},
        )
    return commit_step(storage, generation, world, step)


def save_parts(
    storage: Storage,
    who: Part,
    parts: Sequence[Held],
    scalars: Mapping[str, Json],
    train: Mapping[str, Json],
    samples: Mapping[int, Sequence[int]],
    ties: Mapping[str, str] = MappingProxyType({}),
) -> None:
    """As `save_rank`, for boxes that the caller has cut itself."""
    ids = checked_ids(samples)
    file = image_of(parts, who.rank, ties)
    arena, handover = Arena(file.size), Handover()
    data = Copying(file, [part.local for part in file.parts], arena, handover.put).finish()
    handover.end()
    path = f"{layout.folder(who.step, who.generation)}/{layout.rank_data(who.rank)}"
    with told_as_saved(who):
        flush(storage, path, file.size, arena, handover, writers=1)
        records = records_of(who, data, file, scalars, train, ids, storage.key)
        leave(storage, who.step, who.generation, who.rank, records)


def until_left(storage: Storage, steps: list[int], limit_s: float = 30.0) -> None:
    """Wait until these are the committed steps, newest first: the others are deleted when the newest two are proved, beside all else."""
    deadline = time.monotonic() + limit_s
    while (left := [point.step for point in committed(storage)]) != steps:
        assert time.monotonic() < deadline, f"{left} are left, not {steps}"
        time.sleep(0.01)
