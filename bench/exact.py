"""What exact mode costs a step beside fast mode, and whether the bits are equal: two models, one to four ranks over Gloo.

`python -m bench.exact [--quick] [--json FILE]`. Fast mode with passes of one micro-batch is measured too: it tells what small
passes cost from what the order of the sum costs. The three are run in turns, on the same samples.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
from collections import defaultdict
from pathlib import Path

from rich.console import Console

from bench.demo import say
from bench.table import Row, show, write_json

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))  # the ranks are the tests' own

from fakes.ranks import Warm

WORLDS = (1, 2, 3, 4)
WARM_UP = 5
"""Steps that are not counted."""
MODELS: dict[str, dict[str, object]] = {
    "demo, 0.13 M": {"train.batch": 32, "train.micro_batch": 8},
    "1.9 M": {
        "model.dim": 192,
        "model.layers": 4,
        "model.context": 128,
        "train.batch": 8,
        "train.micro_batch": 2,
    },
}
"""Four micro-batches each."""
MODES: dict[str, dict[str, object]] = {
    "fast": {},
    "fast, one micro-batch at once": {"train.at_once": 1},
    "exact": {"train.reduce": "exact"},
}


def main() -> None:
    """Run the bench."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--quick", action="store_true", help="one turn of ten steps")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    if options.quick:
        options.turns, options.steps = 1, WARM_UP + 10
    warm = Warm("stormjib_trainer", ["torch.distributed.fsdp", "torch._dynamo", "stormjib_trainer.loop"])
    try:
        rows = [row for model in MODELS for row in compared(warm, model, options.turns, options.steps)]
    finally:
        warm.close()
    Console().print(show(rows))
    if options.json:
        write_json(options.json, rows, ["torch"])


def compared(warm: Warm, model: str, turns: int, steps: int) -> list[Row]:
    """ms of a step in each mode on each world, and on how many other worlds than one rank the losses are the same bits."""
    took: dict[tuple[int, str], list[float]] = defaultdict(list)
    losses: dict[tuple[int, str], dict[int, float]] = {}
    for turn in range(turns):
        for world in WORLDS:
            for mode, chosen in MODES.items():
                ms, told = trained(warm, world, {**MODELS[model], **chosen, "train.steps": steps})
                took[world, mode].append(ms)
                losses[world, mode] = told
        say(f"{model}: turn {turn + 1} of {turns}")
    rows = [
        Row.of("step", f"{model}, {world} ranks", mode, values, "ms")
        for (world, mode), values in took.items()
    ]
    for mode in MODES:
        same = sum(losses[world, mode] == losses[1, mode] for world in WORLDS[1:])
        rows.append(Row.of("worlds with the bits of one rank", model, mode, [same], f"of {len(WORLDS) - 1}"))
    return rows


def trained(warm: Warm, world: int, settings: dict[str, object]) -> tuple[float, dict[int, float]]:
    """Median ms of a step, and all losses."""
    settings |= {"optimizer.warmup": 4, "validation.sequences": 1}
    arguments = [word for name, value in settings.items() for word in ("--set", f"{name}={value}")]
    with tempfile.TemporaryDirectory(prefix="stormjib-exact-") as folder:
        job, codes = warm.run(world, arguments, Path(folder))
        if any(codes):
            raise SystemExit(f"bench.exact: {job.text()}")
        times = [line["time_ms"] for line in job.lines() if line.get("step", 0) > WARM_UP and "loss" in line]
        return statistics.median(times), job.losses()


if __name__ == "__main__":
    main()
