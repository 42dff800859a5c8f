"""Records of calls on a GPU: the same, with start and end told by events."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import torch

from fakes import gloo, probed

if TYPE_CHECKING:
    from pathlib import Path


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_start_and_end_come_from_the_device(tmp_path: Path) -> None:
    gloo.run(1, tmp_path, probed.device, tmp_path)
