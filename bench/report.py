"""What the demo leaves behind: tables on the terminal and `report.json`; `curves` draws the losses."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from itertools import zip_longest
from typing import TYPE_CHECKING

from rich.table import Table

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path


@dataclass
class FaultRecord:
    """One injected fault. Seconds count from the moment of the fault; a generation is text such as `1.3`."""

    kind: str
    at_step: int
    detected_s: float | None
    stepping_again_s: float
    lost_steps: int
    generation: str


@dataclass
class VerdictRecord:
    """One fault that slows, and what was said of it. Seconds and steps count from the moment of the fault."""

    kind: str
    at_step: int
    told_s: float
    steps: int
    text: str
    right: bool
    """It names who it was."""


@dataclass
class Resize:
    """One change of the number of ranks. Seconds are from what asked for it to the first step after it, and between the last
    step before it and that one."""

    before: int
    after: int
    why: str
    at_step: int
    changed_s: float
    still_s: float
    lost_steps: int
    generation: str


@dataclass
class Resized:
    """A job whose number of ranks changed."""

    steps: int
    sizes: list[int]
    """Numbers of ranks in the order in which they were."""
    changes: list[Resize]
    samples_missing: int
    samples_twice: int
    loss_apart: float | None
    """Largest difference to the losses of the job that kept its size, at the same steps, in nats per byte."""


@dataclass
class Report:
    """The figures of one demo run, in the order of `report.json`."""

    steps: int = 0
    loss_first: float = 0.0
    loss_last: float = 0.0
    val_nats_per_byte: float = 0.0
    goodput: float = 0.0
    samples_missing: int = -1
    samples_twice: int = -1
    torchrun_rank_kill_s: float | None = None
    coordinator_registered_s: float | None = None
    fork_to_collective_s: float | None = None
    idle_core_percent: float | None = None
    rss_mb: dict[str, float] = field(default_factory=dict)
    saves_ms: dict[str, float] = field(default_factory=dict)
    """Medians over the saves of rank 0."""
    saves: int = 0
    lost_to_saves_percent: float | None = None
    faults: list[FaultRecord] = field(default_factory=list)
    verdicts: list[VerdictRecord] = field(default_factory=list)
    verdicts_without_fault: list[str] = field(default_factory=list)
    resized: Resized | None = None

    def write(self, path: Path) -> None:
        """Write `report.json`."""
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(asdict(self), indent=2) + "\n")


@dataclass(frozen=True)
class Promise:
    """One bound and what was seen. `ok` is None where the run has no figure for it, which counts as broken."""

    name: str
    seen: float | None
    bound: float
    unit: str

    @property
    def ok(self) -> bool:
        """Whether the promise was kept."""
        return self.seen is not None and self.seen <= self.bound


# A single run may take twice the median that `bench/recovery.py` holds it to.
SINGLE_RUN = 2.0
VERDICT_S = 5.0
LOST_STEPS = 10
"""Where saves follow each other: two on their way, and the steps in which the ranks were not ready for the next."""
STEPPING_AGAIN_S = {"rank-kill": 1.5, "rank-freeze": 4.0, "node-cut": 6.0}
GROWING_S = 3.0
"""A planned change: ranks end after a save and others are forked."""
SIZES = (4, 3, 5)
LOSS_APART = 1e-4
"""What rounding may make of it in a thousand steps, in nats per byte: 5e-7 was seen after 300."""


def promises(report: Report) -> list[Promise]:
    """Every promise that the demo can check, with what this run showed."""
    found = []
    for fault in report.faults:
        bound = STEPPING_AGAIN_S.get(fault.kind)
        if bound is not None:
            found.append(
                Promise(f"{fault.kind}: stepping again", fault.stepping_again_s, bound * SINGLE_RUN, "s")
            )
        allowed = 0 if fault.kind in ("operator-kill", "coordinator-cut") else LOST_STEPS
        found.append(Promise(f"{fault.kind}: steps lost", fault.lost_steps, allowed, "steps"))
    kill = next((f.stepping_again_s for f in report.faults if f.kind == "rank-kill"), None)
    if report.torchrun_rank_kill_s is not None:
        found.append(
            Promise("rank-kill, against torchrun's", kill, report.torchrun_rank_kill_s / 2 * SINGLE_RUN, "s")
        )
    found += [
        Promise(
            "samples lost", report.samples_missing if report.samples_missing >= 0 else None, 0, "samples"
        ),
        Promise("samples twice", report.samples_twice if report.samples_twice >= 0 else None, 0, "samples"),
        Promise("validation loss", report.val_nats_per_byte or None, 2.5, "nats/byte"),
        Promise("coordinator back, agents registered", report.coordinator_registered_s, 10 * SINGLE_RUN, "s"),
        Promise("fork to first collective", report.fork_to_collective_s, 0.15 * SINGLE_RUN, "s"),
        Promise("lost to saves", report.lost_to_saves_percent, 0.5 * SINGLE_RUN, "% of the time"),
        Promise("idle cost", report.idle_core_percent, 3 * SINGLE_RUN, "% of a core"),
    ]
    found += [
        Promise(f"{v.kind}: named", v.told_s if v.right else None, VERDICT_S, "s") for v in report.verdicts
    ]
    found.append(Promise("verdicts without a fault", len(report.verdicts_without_fault), 0, "verdicts"))
    for name, bound in (("operator", 90), ("coordinator", 60), ("agent", 60)):
        found.append(Promise(f"memory of the {name}", report.rss_mb.get(name), bound, "MB"))
    return found + ([] if report.resized is None else _resized_promises(report.resized))


def _resized_promises(resized: Resized) -> list[Promise]:
    found = []
    for change in resized.changes:
        name, planned = f"{change.before} -> {change.after} ranks", change.after > change.before
        bound_s = GROWING_S if planned else STEPPING_AGAIN_S["node-cut"]
        found += [
            Promise(f"{name}: stepping again", change.still_s, bound_s * SINGLE_RUN, "s"),
            Promise(f"{name}: steps lost", change.lost_steps, 0 if planned else LOST_STEPS, "steps"),
        ]
    words = ", then ".join(map(str, SIZES))
    return [
        *found,
        Promise(f"sizes other than {words}", _unlike(resized.sizes, SIZES), 0, "sizes"),
        Promise("samples lost across sizes", resized.samples_missing, 0, "samples"),
        Promise("samples twice across sizes", resized.samples_twice, 0, "samples"),
        Promise("loss across sizes, against one size", resized.loss_apart, LOSS_APART, "nats/byte"),
    ]


def _unlike(seen: Sequence[int], wanted: Sequence[int]) -> int:
    """At how many places one list differs from another."""
    return sum(a != b for a, b in zip_longest(seen, wanted))


def promise_table(found: Sequence[Promise]) -> Table:
    """The promises as a table for the terminal."""
    table = Table(title="Promises", title_justify="left")
    for column in ("promise", "seen", "bound", ""):
        table.add_column(column, justify="left" if column in ("promise", "") else "right")
    for p in found:
        seen = "-" if p.seen is None else f"{p.seen:.3g}"
        table.add_row(
            p.name, f"{seen} {p.unit}", f"≤ {p.bound:.3g}", "[green]kept" if p.ok else "[red]broken"
        )
    return table


def fault_table(faults: Sequence[FaultRecord]) -> Table:
    """The injected faults as a timeline."""
    table = Table(title="Faults", title_justify="left")
    for column in ("fault", "at step", "decided after", "stepping again", "steps lost", "generation"):
        table.add_column(column, justify="left" if column == "fault" else "right")
    for f in faults:
        decided = "-" if f.detected_s is None else f"{f.detected_s:.2f} s"
        again = f"{f.stepping_again_s:.2f} s"
        table.add_row(f.kind, str(f.at_step), decided, again, str(f.lost_steps), f.generation)
    return table


def verdict_table(verdicts: Sequence[VerdictRecord]) -> Table:
    """What was said of the faults that slow."""
    table = Table(title="Verdicts", title_justify="left")
    for column in ("fault", "at step", "said after", "steps", "what"):
        table.add_column(column, justify="left" if column in ("fault", "what") else "right")
    for v in verdicts:
        table.add_row(v.kind, str(v.at_step), f"{v.told_s:.2f} s", str(v.steps), v.text)
    return table


def resize_table(changes: Sequence[Resize]) -> Table:
    """The changes of size."""
    table = Table(title="Sizes", title_justify="left")
    for column in ("ranks", "why", "at step", "changed after", "stepping again", "steps lost", "generation"):
        table.add_column(column, justify="left" if column in ("ranks", "why") else "right")
    for c in changes:
        seconds = f"{c.changed_s:.2f} s", f"{c.still_s:.2f} s"
        ranks = f"{c.before} -> {c.after}"
        table.add_row(ranks, c.why, str(c.at_step), *seconds, str(c.lost_steps), c.generation)
    return table
