"""What saves cost, from a rank's page to the lines of /metrics."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

from fakes.runtime import FakeAgent
from stormjib_runtime.narrate import checkpoint_metrics
from stormjib_runtime.page import Page
from stormjib_runtime.saves import Saves, together
from stormjib_runtime.wire import Cause, Generation, GenerationId, Report, ResumePoint, Saving

FULL = Saving(3, 1, 2, 2**40, 0.25, 0.001, 0.002, 0.5, 1.5)


def report(slot: int, number: int, saving: Saving | None, committed: ResumePoint | None = None) -> Report:
    generation = Generation(GenerationId(1, number), None, (), Cause.START)
    return replace(FakeAgent(slot).report(), generation=generation, saving=saving, committed=committed)


def test_a_page_holds_what_a_rank_has_told(tmp_path: Path) -> None:
    page = Page.create(tmp_path / "0", GenerationId(1, 2))
    assert page.saving == Saving()
    page.saving = FULL
    assert Page.open(tmp_path / "0").saving == FULL
    assert (page.step, page.save_at, page.saved) == (-1, 0, -1), "nothing else is touched"
    page.saving = replace(FULL, in_flight=-5)
    assert page.saving.in_flight == 0, "a rank may write anything"


def test_of_ranks_the_slowest_counts_and_bytes_and_failures_are_added() -> None:
    other = Saving(2, 1, 1, 10, 0.5, 0.0, 0.0, 0.1, 3.0)
    assert together([FULL, other]) == Saving(3, 2, 2, 2**40 + 10, 0.5, 0.001, 0.002, 0.5, 3.0)


def test_sums_grow_over_generations_and_never_shrink() -> None:
    saves = Saves()
    assert (saves.sums(), saves.step(), saves.age_s(5)) == (None, None, None)
    saves.heard(report(0, 1, Saving(saves=5, bytes=50, lost_s=1.0, durable_s=2.0)), 0)
    saves.heard(report(0, 1, Saving(saves=4, bytes=40)), 1)  # late on its way
    saves.heard(report(1, 1, Saving(saves=5, bytes=50, lost_s=3.0, durable_s=9.0)), 2)
    saves.heard(report(0, 2, Saving(saves=1, bytes=10, in_flight=1, durable_s=0.5)), 3)
    saves.heard(report(1, 1, Saving(saves=6, bytes=60, lost_s=3.0, durable_s=9.0)), 4)
    sums = saves.sums()
    assert sums == Saving(saves=6, bytes=120, lost_s=3.0, in_flight=1, durable_s=0.5)


def test_the_age_counts_from_when_a_newer_step_was_told() -> None:
    saves = Saves()
    point = ResumePoint(7, GenerationId(1, 1), "d")
    saves.heard(report(0, 1, None, point), 10)
    saves.heard(report(0, 1, None, point), 20)
    saves.heard(report(0, 1, None, replace(point, step=6)), 25)
    assert (saves.step(), saves.age_s(30)) == (7, 20)
    saves.heard(report(0, 2, None, ResumePoint(3, GenerationId(1, 2), "e")), 40)
    assert (saves.step(), saves.age_s(41)) == (3, 1), "a newer generation may have gone back"


def test_copied_is_what_the_slot_that_is_furthest_behind_has_copied() -> None:
    """Of the newest generation: whoever is no member any more tells nothing new."""
    saves = Saves()
    saves.heard(report(0, 1, None), 0)
    assert saves.copied() is None
    for slot, number, step in ((0, 1, 9), (1, 1, 7), (2, 1, 3)):
        saves.heard(replace(report(slot, number, None), copied=step), 0)
    assert saves.copied() == 3
    for slot, step in ((0, 5), (1, 6)):
        saves.heard(replace(report(slot, 2, None), copied=step), 1)
    assert saves.copied() == 5


def test_every_metric_is_on_the_page_of_metrics() -> None:
    saves = Saves()
    saves.heard(replace(report(0, 1, FULL, ResumePoint(7, GenerationId(1, 1), "d")), copied=8), 0)
    told = checkpoint_metrics(saves, 1)
    page = (Path(__file__).resolve().parents[3] / "docs" / "metrics.md").read_text()
    names = set(re.findall(r"^# TYPE (\S+)", told, re.MULTILINE))
    assert len(names) == 9
    assert names == set(re.findall(r"`(stormjib_checkpoint_\w+)", page))
    assert told.count('stage="') == 4
