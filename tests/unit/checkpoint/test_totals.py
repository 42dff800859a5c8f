"""What an engine counts of its saves, the failed ones too."""

from __future__ import annotations

import re
from pathlib import Path

import torch
from prometheus_client import CollectorRegistry, generate_latest

from stormjib_checkpoint.engine import Engine, Save, Totals
from stormjib_checkpoint.errors import StorageFull
from stormjib_checkpoint.figures import collector


def test_saves_and_failures_are_counted_as_they_end() -> None:
    totals = Totals()
    assert (totals.now().saves, totals.now().age_s) == (0, None)
    good, bad = Save(1), Save(2)
    for save in (good, bad):
        totals.begun(save)
    assert totals.now().in_flight == 2
    good.figures.bytes, good.figures.call_s, good.figures.durable_s = 100, 0.5, 2.0
    good.upload_completion.set_result(None)
    good.figures.waited_s = 0.25  # by an optimizer that is told of the copy later than we
    now = totals.now()
    assert (now.saves, now.failures, now.in_flight, now.bytes, now.lost_s) == (1, 0, 1, 100, 0.75)
    bad.figures.call_s = 1.0
    bad.upload_completion.set_exception(StorageFull("x", "no space", "Free some."))
    now = totals.now()
    assert (now.saves, now.failures, now.in_flight, now.bytes, now.lost_s) == (1, 1, 0, 100, 1.75)
    assert now.last.durable_s == 2.0
    assert now.age_s is not None


def test_an_engine_tells_prometheus_by_the_names_of_the_page(tmp_path: Path) -> None:
    engine = Engine(tmp_path)
    registry = CollectorRegistry()
    registry.register(collector(engine))
    assert "age_seconds" not in generate_latest(registry).decode()
    engine.async_save({"w": torch.zeros(9)}, step=1)
    engine.wait()
    engine.close()
    told = generate_latest(registry).decode()
    page = (Path(__file__).resolve().parents[3] / "docs" / "metrics.md").read_text()
    names = set(re.findall(r"^# TYPE (\S+)", told, re.MULTILINE))
    assert len(names) == 7
    assert names <= set(re.findall(r"`(stormjib_checkpoint_\w+)", page))
