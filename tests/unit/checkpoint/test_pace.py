"""How often to save: never for more than it is worth."""

from __future__ import annotations

import pytest

from stormjib_checkpoint.pace import BUDGET, RANK_HOURS, seconds_between

HOUR = 3600.0


@pytest.mark.parametrize("cost_s", [0.0, 0.001, 0.5, 30.0])
def test_a_save_never_takes_more_than_its_share_where_failures_are_rare(cost_s: float) -> None:
    assert seconds_between(cost_s, ranks=1) == cost_s / BUDGET


def test_where_failures_are_frequent_it_is_worth_more() -> None:
    """16,384 ranks fail every three hours, as those of Llama 3 did: two minutes a save are worth it every 27 minutes."""
    rare = seconds_between(120.0, ranks=8)
    often = seconds_between(120.0, ranks=16_384)
    assert rare == 120.0 / BUDGET
    assert often == pytest.approx(27 * 60, rel=0.05)


def test_what_a_job_has_lived_through_counts() -> None:
    """Ten failures in a day are no accident, whatever others have seen; a year without one is none either."""
    unlucky = seconds_between(60.0, ranks=64, trained_s=24 * HOUR, failures=10)
    assert unlucky < seconds_between(60.0, ranks=64)
    mean_s = (RANK_HOURS / 64 * HOUR + 24 * HOUR) / 11
    assert unlucky == pytest.approx((2 * 60.0 * mean_s) ** 0.5)
    lucky = seconds_between(60.0, ranks=16_384, trained_s=365 * 24 * HOUR)
    assert lucky > seconds_between(60.0, ranks=16_384)
