"""A training run without training: states that say which step and generation they are of, saved by pretended ranks."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from fakes.saving import save_rank
from stormjib_checkpoint.commit import commit_step
from stormjib_checkpoint.reader import load

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from stormjib_checkpoint.format import ResumePoint
    from stormjib_checkpoint.storage import Storage

WORLD = 2


def state_of(step: int, mark: float = 0.0) -> dict[str, torch.Tensor]:
    """What every rank holds after `step`; `mark` tells two runs of one step apart."""
    return {
        "model.a": torch.arange(12, dtype=torch.float32).reshape(3, 4) + step + mark,
        "model.b": torch.full((5,), step, dtype=torch.bfloat16),
        "optim.a.step": torch.tensor(float(step)),
    }


def plan(step: int) -> list[int]:
    """The sample ids of a step."""
    return list(range(step * 4, step * 4 + 4))


def samples(above: int, upto: int, rank: int) -> Mapping[int, Sequence[int]]:
    """What one rank of WORLD feeds in the steps of (above, upto]."""
    return {step: plan(step)[rank::WORLD] for step in range(above + 1, upto + 1)}


def save(storage: Storage, generation: str, above: int, step: int, mark: float = 0.0) -> None:
    """All ranks leave `step`; nobody commits."""
    for rank in range(WORLD):
        save_rank(
            storage,
            step=step,
            generation=generation,
            rank=rank,
            world=WORLD,
            state=state_of(step, mark),
            train={"step": step, "mark": mark},
            samples=samples(above, step, rank),
        )


def train(storage: Storage, generation: str, above: int, step: int, mark: float = 0.0) -> ResumePoint:
    """All ranks leave `step`, and it is committed."""
    save(storage, generation, above, step, mark)
    return commit_step(storage, generation, WORLD, step)


def loads(storage: Storage, point: ResumePoint) -> float:
    """Load a step, check every value, and say which mark it has."""
    state = {name: torch.full_like(value, 77) for name, value in state_of(0).items()}
    found = load(storage, point, state)
    expected = state_of(point.step, float(found["mark"]))
    assert found["step"] == point.step
    assert all(torch.equal(state[name], value) for name, value in expected.items())
    return float(found["mark"])
