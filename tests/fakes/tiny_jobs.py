"""The trainer as real processes: tiny runs, an agent that does what an agent does for them, and what must hold of them."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from fakes.ranks import Warm
from stormjib_checkpoint.commit import commit_step
from stormjib_checkpoint.ledger import audit
from stormjib_checkpoint.opening import open_generation
from stormjib_checkpoint.storage import Local
from stormjib_runtime import codec
from stormjib_runtime.page import Page
from stormjib_runtime.wire import Env, GenerationId, ResumePoint

if TYPE_CHECKING:
    from pathlib import Path

    from stormjib_checkpoint.order import Order

BATCH = 13  # divides by no world size
TINY = {
    "model.dim": 32,
    "model.heads": 2,
    "model.context": 32,
    "train.batch": BATCH,
    "train.unit": 1,  # every block on its own, as a large model has it
    "train.steps": 20,
    "optimizer.warmup": 5,
    "validation.sequences": 64,
}


def tiny(**changes: object) -> list[str]:
    """Arguments of a tiny run; `train__steps=3` changes train.steps."""
    settings = TINY | {name.replace("__", "."): value for name, value in changes.items()}
    return [word for name, value in settings.items() for word in ("--set", f"{name}={value}")]


def warm_trainer() -> Warm:
    """A process that forks ranks of the trainer."""
    return Warm("stormjib_trainer", ["torch.distributed.fsdp", "torch._dynamo", "stormjib_trainer.loop"])


class Agent:
    """What an agent does for the ranks of one generation: opens it, makes pages, commits."""

    def __init__(self, folder: Path, number: int, world: int, refused: tuple[str, ...] = ()) -> None:
        self.storage = Local(folder / "storage")
        self.id, self.world = GenerationId(1, number), world
        self.folder = folder / f"g{self.id}"
        self.folder.mkdir()
        self.pages = [Page.create(self.folder / str(rank), self.id) for rank in range(world)]
        self.resume = open_generation(self.storage, str(self.id), "a-uid", refused).resume

    def env(self, interval: int = 0) -> dict[str, str]:
        point = self.resume and ResumePoint(
            self.resume.step, GenerationId.parse(self.resume.generation), self.resume.digest
        )
        return {
            Env.GENERATION: str(self.id),
            Env.RESUME: codec.encode(point).decode() if point else "",
            Env.PAGE_DIR: str(self.folder),
            Env.CHECKPOINT_ROOT: self.storage.root,
            Env.CHECKPOINT_INTERVAL: str(interval),
        }

    def commit(self, step: int) -> None:
        commit_step(self.storage, str(self.id), self.world, step)

    def close(self) -> None:
        for page in self.pages:
            page.close()


def assert_planned(storage: Local, order: Order, last: int) -> None:
    """The ledger holds what the plan says for every step: no sample lost, none twice."""
    found = audit(storage)
    assert found.last == last
    assert set(found.steps) == set(range(1, last + 1))
    assert not found.problems
    assert not found.gaps()
    assert not found.twice()
    assert not found.differences(order.ids)
    assert found.order == order, "what the audit goes by is what the trainer was told"


def assert_near(found: dict[int, float], wanted: dict[int, float], relative: float) -> None:
    """The same steps, and each loss as near as that."""
    assert found.keys() == wanted.keys()
    for step, loss in found.items():
        assert loss == pytest.approx(wanted[step], rel=relative), step
