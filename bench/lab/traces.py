"""What ranks wrote about their steps: the ground on which peers' rules are replayed."""

from __future__ import annotations

import statistics
import struct
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pathlib import Path

_STEP = struct.Struct("<dff")


@dataclass(frozen=True)
class Step:
    """One finished step of one rank."""

    at_s: float
    """Its end, after the injection."""
    step_s: float
    work_s: float
    """Without the time in collectives: the rank's own."""


Trace = dict[int, list[Step]]
"""rank -> steps, oldest first."""


def read(folder: Path, pids: dict[int, int], began: float) -> Trace:
    """The steps of some processes (rank -> pid), timed from `began` on CLOCK_MONOTONIC."""
    trace: Trace = {}
    for rank, pid in pids.items():
        path = folder / f"trace-{pid}"
        raw = path.read_bytes() if path.exists() else b""
        whole = raw[: len(raw) - len(raw) % _STEP.size]
        trace[rank] = [Step(at - began, step, work) for at, step, work in _STEP.iter_unpack(whole)]
    return trace


def pack(trace: Trace, before: int, after: int) -> dict[str, tuple[tuple[float, ...], ...]]:
    """The last and first so many steps around the injection, rounded: what a record keeps."""
    kept = {}
    for rank, steps in trace.items():
        old = [step for step in steps if step.at_s <= 0][-before:]
        new = [step for step in steps if step.at_s > 0][:after]
        numbers = ((s.at_s, s.step_s, s.work_s) for s in (*old, *new))
        kept[str(rank)] = tuple(tuple(round(number, 4) for number in three) for three in numbers)
    return kept


def unpack(kept: dict[str, tuple[tuple[float, ...], ...]]) -> Trace:
    """The same, back."""
    return {int(rank): [Step(*three) for three in steps] for rank, steps in kept.items()}


def median_step(trace: Trace, begin: float, end: float) -> float:
    """Median over all ranks of steps that ended in a window; 0 where there is none."""
    found = [step.step_s for steps in trace.values() for step in steps if begin < step.at_s <= end]
    return statistics.median(found) if found else 0.0


def steps_until(trace: Trace, moment: float) -> int:
    """Steps that the quickest rank finished between the injection and a moment after it."""
    return max((sum(0 < step.at_s <= moment for step in steps) for steps in trace.values()), default=0)
