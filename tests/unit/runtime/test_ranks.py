"""What an agent says of its ranks' ages."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

import pytest

from stormjib_runtime.page import Page
from stormjib_runtime.ranks import Process, Rank, Ranks
from stormjib_runtime.wire import GenerationId

if TYPE_CHECKING:
    from pathlib import Path


def test_a_step_is_no_older_than_the_agent_has_been_awake(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ahead, clock = [0.0], time.monotonic_ns
    monkeypatch.setattr("stormjib_runtime.ranks.time.monotonic_ns", lambda: clock() + int(ahead[0] * 1e9))
    page = Page.create(tmp_path / "0", GenerationId(1, 1))
    ranks = Ranks(tmp_path, lambda: None)
    ranks._ranks.append(Rank(0, Process(lambda: None), page))
    ages = []
    page.step = 7
    for ahead[0] in (
        0.0,
        1.5,
        3.0,
        93.0,
        94.5,
    ):  # between the last but one and that before it, all was frozen
        ranks.sample()
        ages.append(ranks.states()[0].step_age_s)
    page.close()
    assert ages == pytest.approx([0.0, 1.5, 3.0, 0.0, 1.5], abs=0.2)
