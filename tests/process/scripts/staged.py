"""Saves the next step for good, and stages the one after it, of which nothing gets to the storage. Then waits for its end."""

from __future__ import annotations

import errno
import os
import signal
import sys
from pathlib import Path

import torch
import torch.distributed as dist

from stormjib_checkpoint.engine import Engine
from stormjib_checkpoint.files import Posix
from stormjib_checkpoint.node_memory import staged
from stormjib_checkpoint.storage import Local
from stormjib_runtime import codec
from stormjib_runtime.wire import Env, ResumePoint


class Gone(Posix):
    """A disk that takes nothing of one step."""

    step = -1

    def link(self, source: str, target: str) -> None:
        if f"step-{self.step:08d}" in target:
            raise OSError(errno.EIO, "the disk is gone")
        super().link(source, target)


def tables(step: int) -> dict[str, torch.Tensor]:
    """The state after a step; zeros before the first. Of two tables each of two ranks holds one."""
    dice = torch.Generator().manual_seed(step)
    return {name: torch.rand(2_500_000, generator=dice) * (step > 0) for name in ("one", "other")}


if os.environ["WORLD_SIZE"] != "1":
    dist.init_process_group("gloo")
memory, disk = os.environ[Env.MEMORY_DIR], Gone()
resume = os.environ[Env.RESUME]
point = codec.decode(ResumePoint, resume) if resume else None
engine = Engine(
    Local(os.environ[Env.CHECKPOINT_ROOT], disk),
    generation=os.environ[Env.GENERATION],
    resume=None if point is None else (point.step, str(point.generation), point.digest),  # type: ignore[arg-type]
    memory=memory,
)
state = tables(0)
engine.load(state)
base = 0 if point is None else point.step
assert all(torch.equal(state[name], table) for name, table in tables(base).items())
for step in (base + 1, base + 2):
    disk.step = base + 2
    save = engine.async_save(tables(step), step=step)
    save.staging_completion.result()
    if step == base + 1:
        save.upload_completion.result()
while max(one.record.step for one in staged(Path(memory))) < base + 2:
    pass
print(f"resumed from {base}, staged {base + 2}", flush=True)
sys.stdout.flush()
while True:
    signal.pause()
