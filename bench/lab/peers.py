"""What others' rules would have said of a recorded trial, and when. Pure; the values are the published defaults.

Gloo: `torch.distributed` gives its Gloo groups 30 minutes (`torch/distributed/constants.py`, default_pg_timeout); the error comes that
long after the call that never ended.
NVRx (NVIDIA/nvidia-resiliency-ext, `inprocess/wrap.py`): soft_timeout 60 s and hard_timeout 90 s since a rank's last heartbeat, looked
at every second; a rank that is stopped or holds the interpreter's lock is only ended by the hard one.
DLRover (intelligent-machine-learning/dlrover): a node whose check takes more than twice the median of all is a straggler
(`master/elastic_training/rdzv_manager.py`); no step for 300 s is a hang (`diagnosis`, `training_hang.py`, xpu_timer).
"""

from __future__ import annotations

import statistics
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from bench.lab.traces import Step

GLOO_S = 1800.0
NVRX_SOFT_S, NVRX_HARD_S, NVRX_LOOK_S = 60.0, 90.0, 1.0
DLROVER_HANG_S, DLROVER_STRAGGLER = 300.0, 2.0
SILENT = frozenset({"stop", "stop-between", "stop-inside", "freeze", "hold-gil", "device-wait"})
"""Faults after which no Python of the victim runs."""


@dataclass(frozen=True)
class Said:
    """What a rule says: after how many seconds, and which rank it names (-1 for nobody)."""

    after_s: float
    rank: int = -1


def last_step_s(trace: Mapping[int, Sequence[Step]]) -> float:
    """When the last step ended that everybody finished, after the injection; 0 where none did."""
    return min((max((step.at_s for step in steps), default=0.0) for steps in trace.values()), default=0.0)


def hangs(trace: Mapping[int, Sequence[Step]], watched_s: float, step_s: float) -> bool:
    """Whether the trial stood still at its end: no step for ten times as long as one lasts, and for a second at least."""
    return watched_s - last_step_s(trace) > max(10 * step_s, 1.0)


def gloo(trace: Mapping[int, Sequence[Step]], hung: bool) -> Said | None:
    """Gloo's time-out: says that something waits too long, and on whose side it was noticed, not who is to blame."""
    return Said(max(0.0, last_step_s(trace)) + GLOO_S) if hung else None


def nvrx(trace: Mapping[int, Sequence[Step]], hung: bool, fault: str) -> Said | None:
    """The heartbeat rule, with a heartbeat per step. All ranks fall silent together, so it names nobody."""
    if not hung:
        return None
    limit = NVRX_HARD_S if fault in SILENT else NVRX_SOFT_S
    return Said(max(0.0, last_step_s(trace)) + limit + NVRX_LOOK_S)


def dlrover(trace: Mapping[int, Sequence[Step]], hung: bool) -> Said | None:
    """The hang rule, else the straggler rule on each rank's own work in a step, as its check has each node's own time."""
    if hung:
        return Said(max(0.0, last_step_s(trace)) + DLROVER_HANG_S)
    after = {rank: [step for step in steps if step.at_s > 0] for rank, steps in trace.items()}
    for position in range(min((len(steps) for steps in after.values()), default=0)):
        work = {rank: steps[position].work_s for rank, steps in after.items()}
        slowest = max(work, key=lambda rank: work[rank])
        if work[slowest] > DLROVER_STRAGGLER * statistics.median(work.values()):
            return Said(after[slowest][position].at_s, slowest)
    return None
