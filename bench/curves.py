"""The losses of the demo's jobs as a picture: through faults, and across sizes."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import groupby
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from matplotlib.axes import Axes

    from bench.follow import Step

SHADES = ("#1f6f8b", "#c0392b", "#e0a030")


@dataclass(frozen=True)
class Curve:
    """The steps of a job and what was done to it: (seconds since the epoch, fault)."""

    steps: Sequence[Step]
    marks: Sequence[tuple[float, str]] = ()


def draw_curves(faulty: Curve, resized: Curve, path: Path) -> None:
    """Two losses as PNG: over wall time with each fault as a marked line, and over steps with each size as a shaded part and the
    first job's loss behind it."""
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    figure, (above, below) = plt.subplots(2, figsize=(10, 9), layout="constrained")
    _draw_faults(above, faulty)
    _draw_sizes(below, resized.steps, faulty.steps)
    for axes in (above, below):
        axes.set_ylabel("loss, nats per byte")
        axes.grid(alpha=0.25)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def _draw_faults(axes: Axes, curve: Curve) -> None:
    start, steps = curve.steps[0].at, curve.steps
    axes.plot([s.at - start for s in steps], [s.loss for s in steps], color="#1f6f8b", linewidth=1)
    top = max(s.loss for s in steps)
    for at, kind in curve.marks:
        axes.axvline(at - start, color="#c0392b", linewidth=0.8, linestyle="--")
        axes.text(at - start, top, f" {kind}", rotation=90, va="top", ha="right", fontsize=8, color="#c0392b")
    axes.set_xlabel("seconds of training")
    axes.set_title("Loss through the faults")


def _draw_sizes(axes: Axes, steps: Sequence[Step], others: Sequence[Step]) -> None:
    last, height = max(s.step for s in steps), axes.get_xaxis_transform()
    others = [s for s in others if s.step <= last]
    axes.plot(
        [s.step for s in others],
        [s.loss for s in others],
        color="#bbbbbb",
        linewidth=3,
        label="4 ranks throughout",
    )
    axes.plot(
        [s.step for s in steps],
        [s.loss for s in steps],
        color="#1f6f8b",
        linewidth=1,
        label="4, 3 and 5 ranks",
    )
    for part in (list(part) for _, part in groupby(steps, key=lambda s: s.world)):
        first, world = part[0].step, part[0].world
        axes.axvspan(first, part[-1].step, color=SHADES[world % len(SHADES)], alpha=0.15)
        axes.text(first, 0.03, f" {world} ranks, from step {first}", transform=height, fontsize=8)
    axes.set_xlabel("step")
    axes.set_title("Loss across sizes, and that of the same training on one size")
    axes.legend(loc="upper right")
