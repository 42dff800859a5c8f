"""What watching the numbers costs a step: timed on one core beside the step that it belongs to, and as a paired A/B."""

from __future__ import annotations

import statistics
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from bench.demo import say
from bench.table import Row
from stormjib_health.probe.numbers import Digests
from stormjib_runtime.wire import Env
from stormjib_trainer import init
from stormjib_trainer.config import ModelConfig
from stormjib_trainer.model import Llama
from stormjib_trainer.step import summed_loss

if TYPE_CHECKING:
    from collections.abc import Callable

    from fakes.ranks import Warm

PAIRS = 6
DEMO_STEPS = 150
WARM_UP = 20
MODELS = {
    "demo": (ModelConfig(), 8),
    "85M": (ModelConfig(dim=768, layers=12, heads=12, context=256), 4),
}
"""Model and sequences of a rank in a step."""


def rows(warm: Warm) -> list[Row]:
    """All figures of cost."""
    return [*(row for name in MODELS for row in alone(name)), paired(warm)]


def alone(name: str) -> list[Row]:
    """Norm and digest of one rank as shares of its forward, backward and update, without any communication: what a
    step costs at least."""
    torch.set_num_threads(1)
    config, sequences = MODELS[name]
    model = Llama(config)
    init.fill(model, 0, config.layers)
    adam = torch.optim.AdamW(model.parameters(), fused=True)
    windows = torch.randint(256, (sequences, config.context + 1))

    def step() -> None:
        summed_loss(model, windows).backward()  # type: ignore[no-untyped-call]
        adam.step()

    step()
    step_s = _median(step, 3 if name != "demo" else 30)
    state = [
        t for p in model.parameters() for t in (p, adam.state[p]["exp_avg"], adam.state[p]["exp_avg_sq"])
    ]
    gradient = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
    digests = Digests(state)
    index = iter(range(1 << 30))
    digest_s = _median(lambda: digests.of(next(index)), 64)
    norm_s = _median(lambda: torch.linalg.vector_norm(gradient, dtype=torch.float32), 20)
    say(f"{name}: step {step_s * 1e3:.2f} ms, digest {digest_s * 1e3:.3f} ms, norm {norm_s * 1e3:.3f} ms")
    return [
        Row.of("step", name, "no communication", [step_s * 1e3], "ms"),
        Row.of("digest_share", name, "stormjib", [100 * digest_s / step_s], "%"),
        Row.of("norm_share", name, "stormjib", [100 * norm_s / step_s], "%"),
    ]


def paired(warm: Warm) -> Row:
    """Median step of the demo's model on three replicas with the watch against without, in pairs, the order by turns."""
    ratios = []
    for pair in range(PAIRS):
        order = (True, False) if pair % 2 else (False, True)
        took = {on: _median_step(warm, on=on) for on in order}
        ratios.append(100 * (took[True] / took[False] - 1))
        say(f"pair {pair + 1}: {took[True]:.2f} ms on, {took[False]:.2f} ms off")
    return Row.of("step_longer", "demo-3x3", "stormjib", ratios, "%")


def _median_step(warm: Warm, *, on: bool) -> float:
    word = "On" if on else "Off"
    env = {Env.INTEGRITY_NORMS.value: word, Env.INTEGRITY_DIGESTS.value: word}
    changes = {"train.steps": DEMO_STEPS, "parallel.replicate": 3, "validation.sequences": 1}
    words = [word for name, value in changes.items() for word in ("--set", f"{name}={value}")]
    with tempfile.TemporaryDirectory() as folder:
        job, codes = warm.run(3, words, Path(folder), env)
        if any(codes):
            raise SystemExit(f"the job that is timed ended with {codes}:\n{job.text()}")
        steps = [line for line in job.lines() if "loss" in line and line["step"] > WARM_UP]
    return statistics.median(float(line["time_ms"]) for line in steps)


def _median(work: Callable[[], object], times: int) -> float:
    seconds = []
    for _ in range(times):
        began = time.perf_counter()
        work()
        seconds.append(time.perf_counter() - began)
    return statistics.median(seconds)
