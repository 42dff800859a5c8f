"""What the demo makes of a job that changed its size: which sizes it saw, how far its loss is from another's, what it promises."""

from __future__ import annotations

from typing import Any

from bench.follow import Step
from bench.report import Report, Resize, Resized, promises
from bench.resize import apart, sizes_of


def step(number: int, world: int, loss: float = 2.0, at: float | None = None) -> Step:
    return Step(float(number) if at is None else at, number, loss, 1.0, 1.0, "1.1", world)


def broken(**change: Any) -> list[str]:
    """Names of the promises about sizes that a good run breaks once it is changed so."""
    shrunk = Resize(4, 3, "a node was cut off", 60, 3.0, 3.0, 5, "1.2")
    grown = Resize(3, 5, "asked for", 200, 20.0, 1.0, 0, "1.3")
    good: dict[str, Any] = {"steps": 300, "sizes": [4, 3, 5], "changes": [shrunk, grown], "loss_apart": 1e-5}
    resized = Resized(**({"samples_missing": 0, "samples_twice": 0} | good | change))
    found = promises(Report(resized=resized))
    return [p.name for p in found if not p.ok and ("size" in p.name or "ranks" in p.name)]


def test_sizes_are_told_in_the_order_of_time_and_not_of_arrival() -> None:
    late = [step(3, 3), step(1, 4), step(2, 4), step(4, 5), step(5, 3)]
    assert sizes_of(late) == [4, 3, 5, 3]


def test_losses_are_compared_at_the_same_steps() -> None:
    ours = [step(1, 4, 3.0), step(2, 3, 2.5), step(9, 3, 100.0)]
    assert apart(ours, [step(2, 4, 2.25), step(1, 4, 3.1), step(5, 4, 0.0)]) == 0.25
    assert apart(ours, [step(5, 4)]) is None


def test_a_run_across_the_sizes_keeps_its_promises() -> None:
    assert broken() == []


def test_a_size_nobody_asked_for_breaks_a_promise() -> None:
    for sizes in ([4, 3, 4, 5], [4, 3], [4, 2, 5], [4, 3, 5, 4]):
        assert broken(sizes=sizes) == ["sizes other than 4, then 3, then 5"]


def test_samples_and_losses_that_differ_break_promises() -> None:
    assert broken(samples_missing=1) == ["samples lost across sizes"]
    assert broken(samples_twice=1) == ["samples twice across sizes"]
    assert broken(loss_apart=None) == ["loss across sizes, against one size"]


def test_growing_may_lose_no_step() -> None:
    late = Resize(3, 5, "asked for", 200, 20.0, 1.0, 1, "1.3")
    assert broken(changes=[late]) == ["3 -> 5 ranks: steps lost"]
