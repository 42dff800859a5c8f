"""Saving as often as it costs next to nothing: all ranks save the same steps, and the slowest disk says how often."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from fakes.faulty_trainer import DISK_S, Fault
from fakes.ranks import Warm
from stormjib_checkpoint.history import committed, saves
from stormjib_checkpoint.storage import Local
from stormjib_runtime.wire import INTERVAL_AUTO, Env

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

pytestmark = pytest.mark.timeout(120)
STEPS = 400
TINY = {
    "model.dim": 32,
    "model.heads": 2,
    "model.context": 32,
    "train.batch": 4,
    "train.steps": STEPS,
    "optimizer.warmup": 5,
    "validation.sequences": 8,
}


@pytest.fixture(scope="module")
def warm() -> Iterator[Warm]:
    process = Warm("faulty_trainer", ["torch.distributed.fsdp", "torch._dynamo", "stormjib_trainer.loop"])
    yield process
    process.close()


@pytest.mark.parametrize("slow", [False, True])
def test_commits_keep_coming_at_the_rate_of_the_slowest_rank(warm: Warm, tmp_path: Path, slow: bool) -> None:
    storage = Local(tmp_path / "storage")
    env: dict[str, str] = {
        Env.CHECKPOINT_ROOT: storage.root,
        Env.CHECKPOINT_INTERVAL: INTERVAL_AUTO,
        Env.CHECKPOINT_KEEP: "100",
        **(Fault(rank=1, step=0, where="disk").env() if slow else {}),
    }
    arguments = [word for name, value in TINY.items() for word in ("--set", f"{name}={value}")]
    job, codes = warm.run(2, arguments, tmp_path / "job", env)
    assert codes == [0, 0], job.text()
    steps = sorted(point.step for point in committed(storage))
    assert steps == [step for step, _ in saves(storage)], "what one rank has saved, all have"
    assert steps[-1] == STEPS
    assert len(steps) >= 4, "they keep coming"
    if slow:
        lines = [line for line in job.lines() if "time_ms" in line]
        trained_s = sum(line["time_ms"] for line in lines) / 1e3
        assert '{"fault": "disk"}' in (job.folder / "rank-1.log").read_text()
        assert len(steps) - 2 <= trained_s / (2 * DISK_S), (
            "two syncs each: nobody is asked for more than it can do"
        )
