"""Faults of every kind in a laboratory of real agents, ranks and coordinator: what was found, how soon, and who was blamed wrongly.

`python -m bench.health [--quick] [--rows F3,F7] [--ranks 2,4] [--trials N] [--resume] [--tune] [--busy] [--torchrun N] [--soak MINUTES]
[--json FILE]`.
Trials are drawn from seeds (`bench/lab/draws.py`) and written one JSON line each to FILE with the ending `.trials.jsonl`, so that
`--resume` goes on where a run was cut off and anybody can grade them again. Linux and root.
"""

from __future__ import annotations

import argparse
import os
from contextlib import nullcontext
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console

from bench.lab import draws, report, soak, torchrun, trial
from bench.lab.grade import Record, grade
from bench.lab.lab import Lab
from bench.table import show, write_json
from stormjib_fault.catalogue import of_row
from stormjib_fault.words import FaultError
from stormjib_runtime import codec

if TYPE_CHECKING:
    from collections.abc import Sequence

    from bench.table import Row

TRIALS, QUICK = 100, 2
SOAK_RANKS = 4
LINE_BYTES = 1 << 22
RAW = Path("build/health.trials.jsonl")


def main(words: Sequence[str] | None = None) -> None:
    """Run the bench."""
    options = _parser().parse_args(words)
    raw = options.json.with_suffix(".trials.jsonl") if options.json else RAW
    rows: list[Row] = []
    if options.soak:
        rows += measure_soak(options.soak)
    elif options.torchrun:
        rows += measure_torchrun(options.rows, options.torchrun)
    else:
        rows += measure(options, raw)
    Console().print(show(rows))
    if options.json:
        write_json(options.json, rows, ["torch"])


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rows", type=_rows, default=draws.all_rows(), help="such as F3,F7; default: all")
    parser.add_argument("--ranks", type=_ranks, default=draws.WORLDS, help="sizes of jobs; default: all")
    parser.add_argument("--trials", type=int, default=TRIALS, help="for each syndrome (default %(default)s)")
    parser.add_argument(
        "--quick", action="store_true", help=f"{QUICK} trials for each row, two ranks and more"
    )
    parser.add_argument("--resume", action="store_true", help="keep the trials that are written already")
    parser.add_argument("--tune", action="store_true", help="seeds that thresholds may be fixed on")
    parser.add_argument("--busy", action="store_true", help="every core is used by somebody else meanwhile")
    parser.add_argument(
        "--torchrun", type=int, default=0, metavar="N", help="instead: stock torchrun, N times a row"
    )
    parser.add_argument(
        "--soak", type=float, default=0.0, metavar="MINUTES", help="instead: healthy training"
    )
    parser.add_argument("--json", type=Path, metavar="FILE")
    return parser


def _ranks(text: str) -> tuple[int, ...]:
    sizes = {str(size): size for size in draws.WORLDS}
    words = text.split(",")
    if unknown := [word for word in words if word not in sizes]:
        raise argparse.ArgumentTypeError(f"no size {unknown[0]!r}; sizes: {', '.join(sizes)}")
    return tuple(sizes[word] for word in words)


def _rows(text: str) -> tuple[str, ...]:
    chosen = tuple(text.split(","))
    for row in chosen:
        try:
            of_row(row)
        except FaultError as error:
            raise argparse.ArgumentTypeError(str(error)) from error
    return chosen


def measure(options: argparse.Namespace, raw: Path) -> list[Row]:
    """All trials that are not written yet; the figures of all that are."""
    first = draws.TUNE if options.tune else draws.MEASURE
    planned = draws.plan(options.rows, QUICK if options.quick else options.trials, first)
    planned = [one for one in planned if one.ranks in options.ranks]
    if not options.resume:
        raw.unlink(missing_ok=True)
    done = load(raw)
    todo = [one for one in planned if one.id not in {record.id for record in done}]
    with soak.burning(os.cpu_count() or 1) if options.busy else nullcontext():
        done += _run_all(todo, raw)
    wanted = {one.id for one in planned}
    records = [record for record in done if record.id in wanted]
    report.print_confusion(records)
    return report.rows(records, "busy" if options.busy else "")


def _run_all(todo: Sequence[draws.Trial], raw: Path) -> list[Record]:
    """Every trial, in laboratories of the sizes that they need; each is written as soon as it is over."""
    done: list[Record] = []
    left = len(todo)
    for (skewed, ranks), some in groupby(todo, key=lambda one: (draws.skewed(one), one.ranks)):
        queue = list(some)
        while queue:
            with Lab(ranks, skewed=skewed) as lab:
                while queue and (record := _one(lab, queue[0])) is not None:
                    queue.pop(0)
                    left -= 1
                    append(raw, record)
                    done.append(record)
                    print(f"{left:4} left  {report.line(record, grade(record))}", flush=True)
                if queue:
                    print(f"{queue[0].id}: once more, in a new laboratory", flush=True)
                    record = _last_try(queue.pop(0), skewed)
                    left -= 1
                    append(raw, record)
                    done.append(record)
    return done


def _one(lab: Lab, one: draws.Trial) -> Record | None:
    """The trial, or None where the laboratory broke."""
    try:
        return trial.run(lab, one)
    except (FaultError, OSError) as error:
        print(f"{one.id}: {str(error)[:300]}", flush=True)
        return None


def _last_try(one: draws.Trial, skewed: bool) -> Record:
    """In a laboratory of its own. A trial that cannot be run is written as one whose fault did not fire."""
    with Lab(one.ranks, skewed=skewed) as lab:
        return _one(lab, one) or report.not_run(one)


def load(raw: Path) -> list[Record]:
    """Records that are written. A last line that was cut off is removed, and its trial runs again."""
    if not raw.exists():
        return []
    data = raw.read_bytes()
    whole = data[: data.rfind(b"\n") + 1]
    if whole != data:
        os.truncate(raw, len(whole))
    return [codec.decode(Record, line, limit=LINE_BYTES) for line in whole.splitlines()]


def append(raw: Path, record: Record) -> None:
    """Write one record."""
    raw.parent.mkdir(parents=True, exist_ok=True)
    with open(raw, "ab") as file:
        file.write(codec.encode(record) + b"\n")


def measure_torchrun(rows: Sequence[str], times: int) -> list[Row]:
    """How long until stock torchrun notices, for every fault that it can be given."""
    found = []
    for row in rows:
        kinds = [kind for kind in of_row(row) if not kind.early and kind.least_ranks <= torchrun.NODES]
        for number in range(times if row != "F17" and kinds else 0):
            kind = kinds[number % len(kinds)]
            noticed = torchrun.measure(kind.drawn(draws.MEASURE + number, torchrun.NODES))
            print(
                f"{row} {noticed.fault}: {noticed.after_s:.2f} s; {noticed.proof or 'NOT FIRED'}", flush=True
            )
            found.append(noticed)
    return report.torchrun_rows(found)


def measure_soak(minutes: float) -> list[Row]:
    """Healthy training for so long."""
    with Lab(SOAK_RANKS) as lab:
        result = soak.run(lab, minutes, draws.MEASURE)
    for verdict in result.wrong:
        print(f"wrong: {verdict.syndrome} {verdict.scope} {verdict.culprits}: {verdict.sentence}")
    print(result)
    return report.soak_rows(result)


if __name__ == "__main__":
    main()
