"""Silent corruption on real ranks over Gloo: how soon a flipped bit is found, who is named, what the watching costs.

`python -m bench.health_integrity [--trials N] [--healthy STEPS] [--json FILE] [--raw FILE]`. A trial is one job of three
ranks that are replicas, one of which flips one bit: rank, step, element and, within its kind, the bit are random. The
kinds: sign; `exponent` (bits 23 to 30); `mantissa` (bits 0 to 22); each in weights, in either moment, in the gradient after
mixing, and in a gradient before mixing; and a NaN there.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console

from bench import integrity_costs
from bench.demo import say
from bench.table import Row, show, write_json

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))  # the faulty ranks are the tests' own

from fakes.faulty_trainer import Fault
from fakes.ranks import Warm

if TYPE_CHECKING:
    from collections.abc import Iterable

WORLD = 3
STEPS = 60
WITHIN = 20
"""Steps in which a flip of the state shall be found."""
PROOFS = ("Digest", "ReplayDiffers")
"""Findings that become verdicts; the others are a reason to do a step again."""
NOTHING = Fault(99, 0, "weight")
PLACES = ("weight", "exp_avg", "exp_avg_sq", "mixed", "own")
BITS = {"sign": (31, 31), "exponent": (23, 30), "mantissa": (0, 22)}
TINY = {
    "model.dim": 32,
    "model.heads": 2,
    "model.context": 32,
    "train.batch": 12,
    "optimizer.warmup": 5,
    "validation.sequences": 16,
    "parallel.replicate": WORLD,
}


@dataclass(frozen=True)
class Trial:
    """One job and what came of it. Raw records are lines of this."""

    kind: str
    fault: Fault
    fired: bool
    found: str
    """Which finding came first; empty for none."""
    after: int
    """Steps from the fault to the finding; -1 for none."""
    accused: int
    undone: bool
    """The job ended as if nothing had been: the step was done again, or it went back."""


def main() -> None:
    """Run the bench."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--trials", type=int, default=20, help="of each kind")
    parser.add_argument("--healthy", type=int, default=2000, help="steps without a fault")
    parser.add_argument("--seed", type=int, default=4)
    parser.add_argument(
        "--quick", action="store_true", help="one trial of each kind, 100 steps without a fault"
    )
    parser.add_argument("--json", type=Path)
    parser.add_argument("--raw", type=Path, help="one line of JSON for each trial")
    options = parser.parse_args()
    if options.quick:
        options.trials, options.healthy = 1, 100
    imports = ["torch.distributed.fsdp", "torch._dynamo", "stormjib_trainer.loop"]
    warm = Warm("faulty_trainer", imports)
    try:
        trials = [*all_trials(warm, options.trials, random.Random(options.seed))]
        rows = [row for kind in kinds() for row in summary(kind, [t for t in trials if t.kind == kind])]
        rows += [*healthy(warm, options.healthy), *integrity_costs.rows(warm)]
    finally:
        warm.close()
    Console().print(show(rows))
    if options.raw:
        options.raw.write_text("".join(json.dumps(asdict(trial)) + "\n" for trial in trials))
    if options.json:
        write_json(options.json, rows, ["torch"])


def kinds() -> list[str]:
    """All kinds of faults."""
    return [f"{place}-{bits}" for place in PLACES for bits in BITS] + ["own-nan"]


def all_trials(warm: Warm, count: int, draw: random.Random) -> Iterable[Trial]:
    """`count` trials of each kind."""
    for kind in kinds():
        found = [trial(warm, kind, draw) for _ in range(count)]
        seen = sum(t.after >= 0 for t in found)
        say(f"{kind}: {seen} of {count} found")
        yield from found


def draw_fault(kind: str, draw: random.Random) -> Fault:
    """A random fault of this kind."""
    place, _, bits = kind.partition("-")
    first, last = BITS.get(bits, (0, 0))
    where = "nan" if bits == "nan" else place
    return Fault(
        draw.randrange(WORLD), draw.randint(5, STEPS - 25), where, draw.randint(first, last), draw.random()
    )


def trial(warm: Warm, kind: str, draw: random.Random) -> Trial:
    """One job with one fault."""
    fault = draw_fault(kind, draw)
    with tempfile.TemporaryDirectory() as folder:
        job, codes = warm.run(WORLD, arguments(STEPS), Path(folder), fault.env())
        lines, own = job.lines(), job.text(fault.rank)
    findings = [line for line in lines if line.get("event") == "finding"]
    first = findings[0] if findings else None
    named = {line["accused"] for line in findings} - {-1}
    return Trial(
        kind,
        fault,
        fired='{"fault"' in own,
        found=first["kind"] if first else "",
        # A vote is about the state that the step before has left, so it comes one step after.
        after=first["step"] + (first["kind"] == "Digest") - fault.step if first else -1,
        accused=named.pop() if len(named) == 1 else -1,
        undone=bool(findings) and codes[0] in (0, 85),
    )


def arguments(steps: int, **changes: Any) -> list[str]:
    """Of a tiny job; `model__dim=64` changes model.dim."""
    settings = TINY | {"train.steps": steps} | {name.replace("__", "."): v for name, v in changes.items()}
    return [word for name, value in settings.items() for word in ("--set", f"{name}={value}")]


def summary(kind: str, trials: list[Trial]) -> list[Row]:
    """The rows of one kind; a fault that did not fire is no trial."""
    fired = [t for t in trials if t.fired]
    found = [t for t in fired if t.after >= 0]
    rows = [
        share("found", kind, [t.after >= 0 for t in fired]),
        share("found_within_20", kind, [0 <= t.after <= WITHIN for t in fired]),
        share("culprit_named", kind, [t.accused == t.fault.rank for t in fired]),
        share("another_named", kind, [t.accused not in (-1, t.fault.rank) for t in fired]),
    ]
    steps = [float(t.after) for t in found]
    return rows + ([Row.of("steps_to_finding", kind, "stormjib", steps, "steps")] if steps else [])


def share(metric: str, case: str, hits: list[bool]) -> Row:
    """How often something was so; `n` is of how many."""
    part = round(sum(hits) / len(hits), 4) if hits else 0.0
    return Row(
        metric,
        case,
        "stormjib",
        part,
        float(min(hits, default=0)),
        float(max(hits, default=0)),
        len(hits),
        "share",
    )


def healthy(warm: Warm, steps: int) -> list[Row]:
    """What is found in steps without a fault, on replicas and on shards of replicas: wrong proofs, and mere doubts that cost a step."""
    rows = []
    for world, replicate in ((3, 3), (4, 2), (3, 1)):
        with tempfile.TemporaryDirectory() as folder:
            words = arguments(steps, parallel__replicate=replicate)
            job, codes = warm.run(world, words, Path(folder), NOTHING.env())
            found = [line["kind"] for line in job.lines() if line.get("event") == "finding"]
            made = max(job.losses())
        say(f"healthy, {world} ranks, {replicate} replicas: {found} in {made} steps, exit {codes}")
        case, unit = f"healthy-{world}x{replicate}", f"of {made} steps"
        false = [float(sum(kind in PROOFS for kind in found))]
        again = [float(sum(kind == "ReplayAgrees" for kind in found))]
        rows.append(Row.of("false_votes", case, "stormjib", false, unit))
        rows.append(Row.of("steps_done_again", case, "stormjib", again, unit))
    return rows


if __name__ == "__main__":
    main()
