"""The same trainer on a GPU: bf16, NCCL, by the same code."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import torch

from fakes.ranks import Warm
from stormjib_checkpoint.history import committed
from stormjib_checkpoint.storage import Local
from stormjib_runtime.wire import Env

if TYPE_CHECKING:
    from pathlib import Path


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_it_learns_and_resumes_in_bf16(tmp_path: Path) -> None:
    warm = Warm("stormjib_trainer", ["torch.distributed.fsdp", "torch._dynamo"])
    env: dict[str, str] = {Env.CHECKPOINT_ROOT: str(tmp_path / "storage")}
    arguments = ["--set", "train.device=cuda", "--set", "train.precision=bf16", "--set"]
    for steps in (200, 210):
        job, codes = warm.run(1, [*arguments, f"train.steps={steps}"], tmp_path / str(steps), env)
        assert codes == [0], job.text()
        assert job.lines()[-1]["val_nats_per_byte"] < 3.15
    assert min(job.losses()) == 201
    assert committed(Local(tmp_path / "storage"))[0].step == 210
    warm.close()
