"""How right and how fast the health engine is on simulated traces, and what it costs at 1,000 and 10,000 ranks.

`python -m bench.health_engine [--quick] [--trials N] [--large N] [--json FILE]`. Thresholds were tuned on seeds below 1000; trials begin there.
"""

from __future__ import annotations

import argparse
import sys
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))  # the simulated traces are the tests' own

from bench import health_scale
from bench.table import Row, show, write_json
from fakes.traces_cases import CASES, Case, Result, run

if TYPE_CHECKING:
    from collections.abc import Sequence

FIRST_SEED = 1000


def main() -> None:
    """Run the bench."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="3 trials a row, 1,000 ranks only")
    parser.add_argument("--trials", type=int, default=100, help="of each row")
    parser.add_argument(
        "--large", type=int, default=40, help="with 1,000 ranks, and with 10,000, where each takes minutes"
    )
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    results = [result for case in CASES for result in trials(case, 3 if options.quick else options.trials)]
    sizes = [1000] if options.quick else [1000, 10_000]
    rows = [row for case in CASES for row in figures(case, results)]
    rows += [
        row for size in sizes for row in health_scale.measure(size, 8 if options.quick else options.large)
    ]
    rows.append(health_scale.agents(125 if options.quick else 1250))
    console = Console()
    console.print(confusion(results))
    console.print(show(rows))
    if options.json:
        write_json(options.json, rows, [])


def trials(case: Case, count: int) -> list[Result]:
    """Held-out seeds, in order."""
    return [run(case, FIRST_SEED + i) for i in range(count)]


def figures(case: Case, results: Sequence[Result]) -> list[Row]:
    """Exact rate, and time to the first verdict of the right syndrome."""
    own = [result for result in results if result.case is case]
    name = f"{case.row}-{case.kind}"
    exact = [float(result.exact) for result in own]
    rows = [
        Row(
            "exact", name, "engine", round(sum(exact) / len(exact), 4), min(exact), max(exact), len(exact), ""
        )
    ]
    right = [result for result in own if result.right and case.syndrome is not None]
    if right:
        seconds, steps = [r.after_s for r in right], [r.steps for r in right]
        rows.append(Row.of("detected_s", name, "engine", seconds, "s"))
        rows.append(Row.of("detected_p95_s", name, "engine", [high(seconds)], "s"))
        rows.append(Row.of("detected_p95_steps", name, "engine", [high(steps)], "steps"))
    return rows


def high(values: Sequence[float]) -> float:
    """The 95th percentile."""
    return sorted(values)[int(0.95 * (len(values) - 1))]


def confusion(results: Sequence[Result]) -> Table:
    """What was said of each row."""
    said = sorted({result.said for result in results})
    table = Table(title="what the engine said, by row")
    table.add_column("row")
    for name in said:
        table.add_column(name, justify="right")
    table.add_column("exact", justify="right")
    for case in CASES:
        own = [result for result in results if result.case is case]
        counts = Counter(result.said for result in own)
        cells = [str(counts[name] or "") for name in said]
        table.add_row(f"{case.row} {case.kind}", *cells, f"{sum(r.exact for r in own)}/{len(own)}")
    return table


if __name__ == "__main__":
    main()
