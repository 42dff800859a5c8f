"""The form of a benchmark's result: a table on the terminal, and with `--json` the file that `docs/benchmarks/` keeps."""

from __future__ import annotations

import json
import platform
import statistics
import sys
import timeit
from dataclasses import asdict, dataclass
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING

from rich.table import Table

if TYPE_CHECKING:
    from collections.abc import Sequence


@dataclass(frozen=True)
class Row:
    """One figure: median and spread of n runs."""

    metric: str
    case: str
    subject: str
    median: float
    min: float
    max: float
    n: int
    unit: str

    @staticmethod
    def of(metric: str, case: str, subject: str, values: Sequence[float], unit: str) -> Row:
        """The row of some measured values."""
        median = statistics.median(values)
        return Row(
            metric,
            case,
            subject,
            round(median, 3),
            round(min(values), 3),
            round(max(values), 3),
            len(values),
            unit,
        )


def hardware() -> str:
    """This machine in a few words."""
    cpu = next(
        (
            x.split(":")[1].strip()
            for x in Path("/proc/cpuinfo").read_text().splitlines()
            if "model name" in x
        ),
        "?",
    )
    memory = int(Path("/proc/meminfo").read_text().split()[1]) / 1e6
    cores = Path("/proc/cpuinfo").read_text().count("processor\t")
    linux = platform.release().split("-")[0]
    return f"{cores} cores {cpu}, {memory:.0f} GB, Linux {linux}; a million additions in Python: {_speed()}"


def _speed() -> str:
    """How fast this machine is just now: on a shared one that differs by a factor of three from hour to hour."""
    times = sorted(timeit.repeat("for i in range(1_000_000): total += i", "total = 0", number=1, repeat=9))
    return f"{1e3 * times[4]:.0f} ms ({1e3 * times[0]:.0f}-{1e3 * times[-1]:.0f})"


def write_json(path: Path, rows: Sequence[Row], versions: Sequence[str]) -> None:
    """Write the result file. `versions` names the packages whose versions matter."""
    result = {
        "hardware": hardware(),
        "date": date.today().isoformat(),
        "command": "python -m " + " ".join([sys.modules["__main__"].__spec__.name, *sys.argv[1:]]),  # type: ignore[union-attr]
        "versions": {"python": platform.python_version(), **{name: version(name) for name in versions}},
        "rows": [asdict(row) for row in rows],
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(result, indent=2) + "\n")


def show(rows: Sequence[Row]) -> Table:
    """The rows as a table for the terminal."""
    table = Table()
    for column in ("metric", "case", "subject", "median", "min", "max", "n", "unit"):
        table.add_column(column, justify="right" if column in ("median", "min", "max", "n") else "left")
    for r in rows:
        table.add_row(
            r.metric, r.case, r.subject, f"{r.median:g}", f"{r.min:g}", f"{r.max:g}", str(r.n), r.unit
        )
    return table
