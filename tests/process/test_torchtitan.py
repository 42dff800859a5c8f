"""TorchTitan's order of calls over our manager; against TorchTitan's own class too, where it is installed."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
from safetensors.torch import load_file

from fakes import gloo, titan_ranks

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = pytest.mark.timeout(120)


def test_a_run_that_ended_goes_on_bit_for_bit_and_keeps_two_steps(tmp_path: Path) -> None:
    straight, cut = tmp_path / "straight", tmp_path / "cut"
    gloo.run(2, tmp_path, titan_ranks.train, str(straight), 6, 0, str(tmp_path / "one.safetensors"))
    gloo.run(2, tmp_path, titan_ranks.train, str(cut), 4, 0, str(tmp_path / "half.safetensors"))
    (cut / "checkpoint/step-99/step-00000000/g0.1").mkdir(parents=True)  # a save that was killed
    gloo.run(2, tmp_path, titan_ranks.train, str(cut), 6, 4, str(tmp_path / "two.safetensors"))
    one, two = load_file(tmp_path / "one.safetensors"), load_file(tmp_path / "two.safetensors")
    assert one.keys() == two.keys()
    assert all(bool((one[name] == two[name]).all()) for name in one)
    assert not list(tmp_path.rglob(".metadata")), "nothing of DCP's own, which is a pickle"
    left = {path.name for path in (cut / "checkpoint").iterdir()}
    assert left == {"step-3", "step-4", "step-5", "step-6", "step-99"}, (
        "two that were committed before the last purge"
    )
