"""Healthy training for long, with everything that healthy training does: whatever is said against anybody is wrong."""

from __future__ import annotations

import os
import random
import subprocess
import sys
import time
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING

from bench.lab.grade import Seen, blaming
from bench.lab.lab import Plan
from bench.lab.trial import restarts, seen
from stormjib_fault.words import FaultError

if TYPE_CHECKING:
    from collections.abc import Iterator

    from bench.lab.lab import Lab

CHECKPOINT_S, EVALUATION_S, NOISE_S = 60.0, 150.0, 45.0
"""How often, about: each time between half of it and one and a half."""
BURN = "while True: pass"


@dataclass(frozen=True)
class Soak:
    """What came of it."""

    minutes: float
    steps: int
    checkpoints: int
    evaluations: int
    noises: int
    wrong: tuple[Seen, ...]
    """Verdicts above a note."""
    restarts: tuple[str, ...]
    accused: int


def run(lab: Lab, minutes: float, seed: int) -> Soak:
    """Train for so long in the laboratory."""
    rng = random.Random(f"soak/{seed}")
    lab.give_plan(Plan(pattern=rng.choice(("dp", "fsdp"))))
    before = lab.fresh()
    began = time.monotonic()
    due = {name: began + every * (0.5 + rng.random()) for name, every in _EVERY.items()}
    counts = dict.fromkeys(_EVERY, 0)
    while (now := time.monotonic()) < began + 60 * minutes:
        for name in [name for name, moment in due.items() if moment <= now]:
            with suppress(FaultError):  # a restart, wrong as it is, must not end the soak
                _ACTS[name](lab, rng)
                counts[name] += 1
            due[name] = now + _EVERY[name] * (0.5 + rng.random())
        time.sleep(0.1)
    after = lab.watcher.until(lambda state: True, 10)
    return Soak(
        minutes=round((time.monotonic() - began) / 60, 2),
        steps=after.step,
        checkpoints=counts["checkpoint"],
        evaluations=counts["evaluation"],
        noises=counts["noise"],
        wrong=tuple(blaming(seen(lab, began))),
        restarts=restarts(before, after),
        accused=len(after.accusations) - len(before.accusations),
    )


def _checkpoint(lab: Lab, rng: random.Random) -> None:
    """All ranks save, or one does and the others wait for it."""
    ranks = [place for place in lab.world(0.1).ranks]
    chosen = ranks if rng.random() < 0.5 else [ranks[0]]
    for place in chosen:
        how = {"phase": "Checkpoint", "seconds": round(rng.uniform(0.5, 5.0), 2)}
        lab.control.order(place.rank, place.pid, "phase", **how)


def _evaluation(lab: Lab, rng: random.Random) -> None:
    seconds = round(rng.uniform(2.0, 8.0), 2)
    for place in lab.world(0.1).ranks:
        lab.control.order(place.rank, place.pid, "phase", phase="Evaluation", seconds=seconds)


def _noise(lab: Lab, rng: random.Random) -> None:
    with burning(rng.randint(1, os.cpu_count() or 1)):
        time.sleep(rng.uniform(1.0, 6.0))


_EVERY = {"checkpoint": CHECKPOINT_S, "evaluation": EVALUATION_S, "noise": NOISE_S}
_ACTS = {"checkpoint": _checkpoint, "evaluation": _evaluation, "noise": _noise}


@contextmanager
def burning(processes: int) -> Iterator[None]:
    """So many processes use all the processor that they get."""
    burners = [subprocess.Popen([sys.executable, "-c", BURN]) for _ in range(processes)]
    try:
        yield
    finally:
        for one in burners:
            one.kill()
            one.wait()
