"""Records as figures: the rows of the house's result file, the confusion matrix, one line a trial."""

from __future__ import annotations

import math
from collections import defaultdict
from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table

from bench.lab import peers, traces
from bench.lab.grade import (
    UNSEEN,
    Grade,
    Record,
    confusion,
    counts,
    f1,
    grade,
    percentile,
    wilson,
)
from bench.table import Row
from stormjib_fault.words import CRASH, NONE, Truth

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    from bench.lab.draws import Trial
    from bench.lab.soak import Soak
    from bench.lab.torchrun import Noticed

OURS = "stormjib"
Judged = tuple[Record, Grade]


def rows(records: Sequence[Record], note: str = "") -> list[Row]:
    """All figures. `note` marks the cases, such as `busy`."""
    judged = [(record, grade(record)) for record in records if counts(record)]
    end = f" ({note})" if note else ""
    found: list[Row] = [
        _plain("not_fired", "all" + end, OURS, len(records) - len(judged), len(records), "trials")
    ]
    by_case: dict[str, list[Judged]] = defaultdict(list)
    for record, one in judged:
        by_case[record.truth.syndrome or f"harmless {record.row}"].append((record, one))
        by_case[f"{record.row} {record.fault}"].append((record, one))
    for case, some in sorted(by_case.items()):
        found += _case(case + end, some)
    return [*found, *_whole(judged, end), *_peers(judged, end)]


def _case(case: str, some: list[Judged]) -> list[Row]:
    """Shares and times of one syndrome or fault."""
    found = [
        _share("right", case, [one.right for _, one in some]),
        _share("exact", case, [one.exact for _, one in some]),
    ]
    times = [one.detected_s for _, one in some if not math.isinf(one.detected_s)]
    if times:
        found += [_times("detected_p50_s", case, times, 0.5), _times("detected_p95_s", case, times, 0.95)]
    steps = [float(one.steps) for _, one in some if one.steps >= 0]
    if steps:
        found.append(_times("steps_p95", case, steps, 0.95, "steps"))
    noticed = [float(count) for record, _ in some if (count := noticed_steps(record)) >= 0]
    if noticed:
        found.append(_times("noticed_steps_p95", case, noticed, 0.95, "steps"))
    restarts = sum(len(record.restarts) for record, _ in some if record.truth.harmless)
    if any(record.truth.harmless for record, _ in some):
        found.append(_plain("restarts", case, OURS, restarts, len(some), "restarts"))
    return found


def noticed_steps(record: Record) -> int:
    """Steps from the injection to the first word of the true syndrome, however unsure: checks may follow. -1 without one."""
    said = (verdict.at_s for verdict in record.verdicts if verdict.syndrome == record.truth.syndrome)
    first = next(said, None)
    return -1 if first is None else traces.steps_until(traces.unpack(record.trace), first)


def _whole(judged: list[Judged], end: str) -> list[Row]:
    """Figures over all trials: wrong isolations, wrong blame, F1 of the slow ranks."""
    n = len(judged)
    precision, recall, both = f1([record for record, _ in judged])
    case = "NonCommunicationSlow, over all" + end
    return [
        _plain(
            "wrong_isolations", "all" + end, OURS, sum(one.wrongly_accused for _, one in judged), n, "nodes"
        ),
        _plain("wrong_blame", "all" + end, OURS, sum(one.wrongly_blamed for _, one in judged), n, "trials"),
        _plain("precision", case, OURS, precision, n, "share"),
        _plain("recall", case, OURS, recall, n, "share"),
        _plain("f1", case, OURS, both, n, "share"),
    ]


def _peers(judged: list[Judged], end: str) -> list[Row]:
    """What others' rules say of the same traces."""
    rules: dict[str, Callable[[Record, traces.Trace, bool], peers.Said | None]] = {
        "Gloo's time-out, replayed": lambda _, trace, hung: peers.gloo(trace, hung),
        "NVRx heartbeat, replayed": lambda record, trace, hung: peers.nvrx(trace, hung, record.fault),
        "DLRover, replayed": lambda _, trace, hung: peers.dlrover(trace, hung),
    }
    by_case: dict[tuple[str, str], list[peers.Said | None]] = defaultdict(list)
    for record, _ in judged:
        trace = traces.unpack(record.trace)
        hung = peers.hangs(trace, record.watched_s, record.step_s) and not _ended(record)
        for name, rule in rules.items():
            by_case[(record.truth.syndrome or f"harmless {record.row}", name)].append(
                rule(record, trace, hung)
            )
    found = []
    for (case, name), said in sorted(by_case.items()):
        found.append(_share("noticed", case + end, [one is not None for one in said], name))
        times = [one.after_s for one in said if one is not None]
        if times:
            found.append(Row.of("noticed_s", case + end, name, times, "s"))
    return found


def _ended(record: Record) -> bool:
    """A rank that ends makes the others' calls fail by themselves: there is nothing to time out."""
    return record.truth.syndrome == CRASH or any(cause.startswith("RankExit") for cause in record.restarts)


def _share(metric: str, case: str, hits: Sequence[bool], subject: str = OURS) -> Row:
    """A share with its Wilson interval in the place of min and max."""
    low, high = wilson(sum(hits), len(hits))
    share = sum(hits) / len(hits)
    return Row(
        metric, case, subject, round(share, 4), round(low, 4), round(high, 4), len(hits), "share, 95 %"
    )


def _times(metric: str, case: str, values: Sequence[float], share: float, unit: str = "s") -> Row:
    value = percentile(values, share)
    return Row(
        metric, case, OURS, round(value, 3), round(min(values), 3), round(max(values), 3), len(values), unit
    )


def _plain(metric: str, case: str, subject: str, value: float, n: int, unit: str) -> Row:
    return Row(metric, case, subject, round(value, 4), round(value, 4), round(value, 4), n, unit)


def print_confusion(records: Iterable[Record]) -> None:
    """True syndromes down, found ones across."""
    table = confusion(record for record in records if counts(record))
    across = sorted({found for row in table.values() for found in row} | {UNSEEN})
    shown = Table(title="true down, found across")
    for column in ("", *across):
        shown.add_column(column, justify="right" if column else "left")
    for true in sorted(table):
        shown.add_row(true, *(str(table[true][found] or "") for found in across))
    Console().print(shown)


def line(record: Record, one: Grade) -> str:
    """One trial for whoever watches."""
    mark = "not fired" if not counts(record) else "exact" if one.exact else "right" if one.right else "WRONG"
    when = "" if math.isinf(one.detected_s) else f"{one.detected_s:.2f} s"
    blamed = " BLAMED" if one.wrongly_blamed else ""
    return (
        f"{record.id:9} {record.fault:16} {record.ranks} ranks {record.pattern:4} x{record.severity:<6g} "
        f"slow {record.slowdown:<5g} -> {one.syndrome:22} {mark:9} {when}{blamed} {' '.join(record.restarts)}"
    )


def not_run(one: Trial) -> Record:
    """A trial that could not be run twice: kept, and counted as not fired."""
    draw = one.draw
    nothing = Truth(NONE, "Job")
    return Record(
        one.id, one.row, draw.fault, one.ranks, one.pattern, draw.severity, draw.victim, draw.seed, nothing
    )


def torchrun_rows(found: Sequence[Noticed]) -> list[Row]:
    """When stock torchrun noticed; faults that did not fire are left out."""
    by_case: dict[str, list[float]] = defaultdict(list)
    for one in found:
        if one.proof:
            by_case[f"{one.row} {one.fault}"].append(one.after_s)
    return [Row.of("noticed_s", case, "torchrun", values, "s") for case, values in by_case.items()]


def soak_rows(result: Soak) -> list[Row]:
    """What came of a soak."""
    case = f"healthy, {result.minutes:g} min"
    values = {
        "steps": result.steps,
        "checkpoints": result.checkpoints,
        "evaluations": result.evaluations,
        "cpu_noises": result.noises,
        "wrong_verdicts": len(result.wrong),
        "restarts": len(result.restarts),
        "isolations": result.accused,
    }
    return [_plain(metric, case, OURS, value, 1, "") for metric, value in values.items()]
