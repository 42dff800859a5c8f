"""Which trials there are: drawn from seeds, before anything runs. Pure."""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import TYPE_CHECKING

from stormjib_fault.catalogue import ROWS, of_row

if TYPE_CHECKING:
    from collections.abc import Sequence

    from stormjib_fault.words import Draw

TUNE, MEASURE = 0, 1000
"""First seeds. Thresholds are fixed on the first thousand; what is published comes from the others."""
WORLDS = (2, 4, 8)
PATTERNS = ("dp", "fsdp", "pp")
BODY: dict[str, tuple[str, ...]] = {
    "Crash": ("F1", "F2"),
    "CommunicationHang": ("F7", "F8"),
    "NonCommunicationHang": ("F3", "F4"),
    "CommunicationSlow": ("F9", "F10", "F11", "F12"),
    "NonCommunicationSlow": ("F6",),
}
"""Syndrome -> its rows. Every other row stands for itself."""
SHARE = 5
"""Other rows get one trial for so many of a syndrome's."""


@dataclass(frozen=True)
class Trial:
    """One trial with everything that chance decides. `id` is unique and says it all again."""

    id: str
    row: str
    draw: Draw
    ranks: int
    pattern: str
    healthy_steps: int
    """Steps of good health before the injection."""
    wait_s: float
    """Beyond them, so that the injection falls anywhere in a step."""


def draw(row: str, seed: int) -> Trial:
    """Trial number `seed` of a row. Faults and sizes take turns, so that each gets its share; the rest is chance."""
    faults = of_row(row)
    fault = faults[seed % len(faults)]
    worlds = [ranks for ranks in WORLDS if ranks >= fault.least_ranks]
    ranks = worlds[seed // len(faults) % len(worlds)]
    rng = random.Random(f"{row}/{seed}")
    return Trial(
        id=f"{row}-{seed}",
        row=row,
        draw=fault.drawn(seed, ranks),
        ranks=ranks,
        pattern=_pattern(row, rng),
        healthy_steps=rng.randrange(40, 81),
        wait_s=round(rng.random() * 0.1, 4),
    )


def _pattern(row: str, rng: random.Random) -> str:
    """Replicas that can be compared are data parallel's, and which link carries what is known for its ring."""
    if row in ("F10", "F11", "F12", "F16"):
        return "dp"
    if row in ("F7", "F8", "F9"):
        return rng.choice(("dp", "fsdp"))  # a pipeline's last link carries nothing back
    return rng.choices(PATTERNS, (2, 1, 1))[0]


def plan(rows: Sequence[str], per_syndrome: int, first_seed: int = MEASURE) -> list[Trial]:
    """All trials, those of one size together: a laboratory is started once for each."""
    trials = [draw(row, first_seed + number) for row in rows for number in range(count(row, per_syndrome))]
    return sorted(trials, key=lambda trial: (skewed(trial), trial.ranks, trial.id))


def count(row: str, per_syndrome: int) -> int:
    """How many trials a row needs."""
    for rows in BODY.values():
        if row in rows:
            return -(-per_syndrome // len(rows))
    return max(1, -(-per_syndrome // SHARE))


def skewed(trial: Trial) -> bool:
    """Whether it needs a laboratory whose clocks differ."""
    return trial.draw.fault == "skewed-clocks"


def all_rows() -> tuple[str, ...]:
    """Every row, in order, but the one that needs a trainer which looks at its numbers (`bench/health_integrity.py`)."""
    return tuple(row for row in ROWS if row != "F16")
