"""Figures of a whole run: what the trainer said at its end, and what the ledger on the storage says about the samples."""

from __future__ import annotations

import itertools
import json
import re
import statistics
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from stormjib_checkpoint.ledger import audit as read_ledger
from stormjib_checkpoint.order import Order, Source
from stormjib_checkpoint.storage import Local
from stormjib_trainer.config import Config

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence
    from pathlib import Path

    from bench.faults import Scene
    from bench.follow import Line, Step


@dataclass(frozen=True)
class Samples:
    """The ledger against the plan: how many samples are missing and how many were fed more often than planned."""

    steps: int
    missing: int
    twice: int


def root(scene: Scene) -> Path:
    """The job's checkpoints, as this machine sees the volume of the claim that is called as the job."""
    volume = scene.stage.get("pvc", scene.job, "-n", scene.namespace)["spec"]["volumeName"]
    folder: Path = scene.stage.cluster.shared_folder / volume / scene.namespace / scene.job
    return folder


def audit(scene: Scene) -> Samples:
    """Compare the ledger of the job, along the history of its highest generation, with the plan for those steps."""
    config = Config()
    started = next(record for _, record in events(scene.follower.lines, "start"))
    order = Order((Source("text", started["samples"]),), config.train.lmb, config.train.seed)
    found = read_ledger(Local(root(scene)))
    differences = found.differences(order.ids)
    return Samples(
        found.last, sum(len(d.missing) for d in differences), sum(len(d.extra) for d in differences)
    )


def events(lines: Iterable[Line], name: str) -> Iterator[tuple[Line, dict[str, Any]]]:
    """The trainer's events of that name, in the order in which they were seen."""
    for line in list(lines):
        match = re.match(r'(?:\[\d+\] )?(\{"event":.*\})$', line.text)
        record = json.loads(match[1]) if match else {}
        if record.get("event") == name:
            yield line, record


def validation(lines: Iterable[Line]) -> float:
    """The validation loss at the end, nats per byte; 0 where the run did not get there."""
    return next((record["val_nats_per_byte"] for _, record in events(lines, "done")), 0.0)


def forks_to_collective(lines: Iterable[Line]) -> list[float]:
    """Seconds from the fork of rank 0 to its first collective, of each generation."""
    return [record["fork_to_collective_s"] for _, record in events(lines, "start")]


def fork_to_collective(lines: Iterable[Line]) -> float | None:
    """Their median."""
    seen = forks_to_collective(lines)
    return round(statistics.median(seen), 4) if seen else None


def goodput(steps: Sequence[Step]) -> float:
    """Steps that count, each at the median pace, as a share of the wall time from the first step to the last."""
    kept = {s.step: s for s in steps}
    pace = statistics.median(b.at - a.at for a, b in itertools.pairwise(steps))
    return round(min(1.0, len(kept) * pace / (steps[-1].at - steps[0].at)), 4)


SAVE_TIMES = ("call_ms", "wait_ms", "staged_ms", "durable_ms")


def save_times(lines: Iterable[Line]) -> dict[str, float]:
    """Medians over rank 0's saves: the call, what optimizers waited, until staged, and until durable; none without a save."""
    found = [record for _, record in events(lines, "saved")]
    return {key: round(statistics.median(r[key] for r in found), 3) for key in SAVE_TIMES} if found else {}


def lost_to_saves(lines: Iterable[Line], steps: Sequence[Step]) -> float | None:
    """Percent of the time of rank 0's steps that the calls took and its optimizer waited; None without a save."""
    lost_ms = [record["call_ms"] + record["wait_ms"] for _, record in events(lines, "saved")]
    return 100 * sum(lost_ms) / sum(step.time_ms for step in steps) if lost_ms else None
