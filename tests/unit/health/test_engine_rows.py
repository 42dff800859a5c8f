"""Each row of the fault laboratory on simulated traces. Thresholds were tuned on seeds below 1000; these are held out."""

from __future__ import annotations

import pytest

from fakes.traces_cases import CASES, Case, run
from stormjib_health.verdict import Scope

SEEDS = (1000, 1001, 1002)
SLOWEST_STEPS = 16
"""Of a slowdown at samples every 0.2 s, which last two of the shortest steps; the bench prints the percentile."""


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("case", CASES, ids=[f"{case.row}-{case.kind}" for case in CASES])
def test_row(case: Case, seed: int) -> None:
    result = run(case, seed)
    assert result.exact, f"said {result.said}: {[told.verdict.sentence for told in result.verdicts]}"
    if case.syndrome is not None and case.kind != "spin":
        assert result.after_s <= 2.0 or result.steps <= SLOWEST_STEPS
    for told in result.verdicts:
        verdict = told.verdict
        assert len(verdict.evidence) <= 8
        assert verdict.sentence
        assert bool(verdict.culprits) == (verdict.scope is not Scope.JOB)
