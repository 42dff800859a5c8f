"""A tiny training run through the engine: states that say which step they are of, and the next process on the same storage."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

import torch

from stormjib_checkpoint.engine import Engine, Save

if TYPE_CHECKING:
    from stormjib_checkpoint.storage import Storage

SOON_S = 10.0


def state_of(step: int) -> dict[str, torch.Tensor]:
    """Some small pieces for each of two ranks, and two types."""
    return {"a": torch.arange(12_000.0) + step, "d": torch.full((9_000,), step, dtype=torch.bfloat16)}


def begin(engine: Engine, step: int) -> Save:
    return engine.async_save(state_of(step), step=step, train={"step": step})


def save(engine: Engine, step: int) -> BaseException | None:
    """Save a step, have it proved, and what is too old deleted; how the save failed."""
    failed = begin(engine, step).upload_completion.exception(SOON_S)
    tidied(engine)
    return failed


def tidied(engine: Engine) -> None:
    """Wait until the newest steps are proved, and what is too old is deleted."""
    engine._tidier.settled()
    deadline = time.monotonic() + SOON_S
    while engine._tidier._going:
        assert time.monotonic() < deadline, "old steps are not deleted in time"
        time.sleep(0.001)


def load(engine: Engine) -> int:
    """Load what the engine resumes from, and check every bit; the step."""
    found = {name: torch.zeros_like(value) for name, value in state_of(0).items()}
    train = engine.load(found)
    assert train is not None
    assert all(torch.equal(found[name], value) for name, value in state_of(train["step"]).items())
    return int(train["step"])


def next_life(storage: Storage) -> int:
    """Another process opens the next generation, loads, and saves a later step; the step that it has loaded."""
    engine = Engine(storage)
    step = load(engine)
    assert save(engine, step + 100) is None
    engine.close()
    again = Engine(storage)
    assert load(again) == step + 100
    again.close()
    return step
