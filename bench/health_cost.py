"""What recording costs a rank: per call, and per step of two models. Medians, recorded against not, in random turns.

`python -m bench.health_cost [--quick] [--json FILE]`. It wants a machine that does nothing else.
"""

from __future__ import annotations

import argparse
import random
import statistics
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console

from bench import health_ranks
from bench.table import Row, show, write_json

if TYPE_CHECKING:
    from collections.abc import Sequence

    from bench.health_ranks import Times

BOUND_TIGHT_US, BOUND_INSIDE_US = 6.0, 25.0
BOUND_SHARE, BOUND_STEP = 0.3, 2.0
"""Percent of a step of at least 10 ms per call; upper end of the interval of the paired steps."""


def main() -> None:
    """Run the bench."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="a twentieth of the calls and steps")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    least = 20 if options.quick else 1
    rows = calls(100_000 // least)
    for part, steps in (("ddp", 2000), ("demo", 1000)):
        rows += paired(part, steps // least)
    Console().print(show(rows))
    if options.json:
        write_json(options.json, rows, ["torch"])


def calls(number: int) -> list[Row]:
    """Cost of one recorded call, and what it comes to in a step of 10 ms per call."""
    rows = []
    for part, bound in (("tight", BOUND_TIGHT_US), ("inside", BOUND_INSIDE_US)):
        times, _ = health_ranks.run(part, 1, number)
        added = (statistics.median(times.on) - statistics.median(times.off)) / 1e3
        rows.append(_row("added_per_call_us", f"{part}, bound {bound:g}", [added], len(times.on), "us"))
        rows.append(_row("added_per_call_us", f"{part}, mean", [_mean(times) / 1e3], len(times.on), "us"))
    share = 100 * rows[-1].median / 10_000
    rows.append(_row("share_of_step", f"10 ms per call, bound {BOUND_SHARE:g}", [share], number, "%"))
    return rows


def _mean(times: Times) -> float:
    """Added on average: calls whose end is taken cost more. The slowest hundredth is the machine's, on both sides."""

    def trimmed(values: Sequence[float]) -> float:
        return statistics.fmean(sorted(values)[: max(1, len(values) * 99 // 100)])

    return trimmed(times.on) - trimmed(times.off)


def paired(part: str, steps: int) -> list[Row]:
    """The same step with and without, pair by pair: the median of the differences, and its 95 % interval."""
    times, number = health_ranks.run(part, 2, steps)
    base = statistics.median(times.off)
    added = [100 * (on - off) / base for on, off in zip(times.on, times.off, strict=True)]
    middle, low, high = (round(x, 3) for x in (statistics.median(added), *interval(added)))
    return [
        _row("step_ms", f"{part}, 2 ranks, {number} calls", times.off, len(times.off), "ms"),
        Row("added_to_step", f"{part}, bound {BOUND_STEP:g}", "probe", middle, low, high, len(added), "%"),
    ]


def interval(values: Sequence[float], rounds: int = 2000) -> tuple[float, float]:
    """95 % interval of the median, by bootstrap."""
    draw = random.Random(0)
    medians = sorted(statistics.median(draw.choices(values, k=len(values))) for _ in range(rounds))
    return medians[rounds // 40], medians[-rounds // 40]


def _row(metric: str, case: str, values: Sequence[float], n: int, unit: str) -> Row:
    median = round(statistics.median(values), 3)
    return Row(metric, case, "probe", median, round(min(values), 3), round(max(values), 3), n, unit)


if __name__ == "__main__":
    main()
