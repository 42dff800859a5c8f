"""The health engine at the size of a large job: exact at it, and what one decision and one second of samples cost."""

from __future__ import annotations

import copy
import gc
import random
import time
from typing import TYPE_CHECKING, ParamSpec, TypeVar

from bench.table import Row
from fakes.traces import Fault, Shape, Trace
from fakes.traces_cases import CASES, Case, judge
from fakes.traces_play import Play
from stormjib_health.wire import Sample
from stormjib_runtime.codec import pack, unpack
from stormjib_runtime.coordinator import COLLECT

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

P = ParamSpec("P")
R = TypeVar("R")

PER_SLOT = 8
WARM_S = 45.0
KINDS = ("stop", "sleep", "link_cut", "node_cut", "slow", "link_slow", "node_tx", "skip")


def measure(world: int, trials: int) -> list[Row]:
    """Faults of all kinds on one warm job of `world` ranks, each on a copy of it."""
    warm = Play(Trace(Shape("tp_dp", world, PER_SLOT, PER_SLOT, step_s=1.0), 1), 1, lost=0.0, interval=2.0)
    warm.run(WARM_S)
    exact: list[float] = []
    ticks: list[float] = []
    observes: list[float] = []
    for trial in range(trials):
        right, slowest, samples = one(copy.deepcopy(warm), trial)
        exact.append(float(right))
        ticks.append(slowest)
        observes += samples
    name = f"{world} ranks"
    return [
        Row(
            "exact", name, "engine", round(sum(exact) / len(exact), 4), min(exact), max(exact), len(exact), ""
        ),
        Row.of("slowest decision of a trial", name, "engine", ticks, "s"),
        Row.of("observe a sample of 8 ranks", name, "engine", [1e3 * s for s in observes], "ms"),
    ]


def one(play: Play, trial: int) -> tuple[bool, float, Sequence[float]]:
    """One fault: whether it was named exactly, the slowest tick, and what observing took.

    Python looks for cycles as often as in a coordinator, and not in the simulated job, which a coordinator does not hold: going
    through that once takes seconds.
    """
    gc.freeze()
    gc.set_threshold(*COLLECT)
    case = next(case for case in CASES if case.kind == KINDS[trial % len(KINDS)])
    trace, clock = play.trace, Stopwatch(play)
    trace.fault = place(case, trace, random.Random(trial))
    play.run(trace.fault.at + (14.0 if case.most > 1 else 8.0))
    return judge(case, trace, trial, play.told).exact, max(clock.ticks), clock.observes


def place(case: Case, trace: Trace, dice: random.Random) -> Fault:
    """A rank, or a connection between slots, of this job."""
    lines = [line for ring in trace.rings["dp"] for line in ring.lines if line.main]
    line = dice.choice(lines)
    return Fault(
        case.kind, WARM_S + 0.5, line.source, line.target, max(case.least, 1.4 if case.most > 1 else 1.0)
    )


class Stopwatch:
    """Times every observe and tick of one play's engine."""

    def __init__(self, play: Play) -> None:
        self.ticks: list[float] = []
        self.observes: list[float] = []
        engine = play.engine
        play.engine.tick = timed(engine.tick, self.ticks)  # type: ignore[method-assign]
        play.engine.observe = timed(engine.observe, self.observes)  # type: ignore[method-assign]


def timed(call: Callable[P, R], into: list[float]) -> Callable[P, R]:
    """The same call, its seconds of processor kept."""

    def wrapped(*args: P.args, **kwargs: P.kwargs) -> R:
        began = time.process_time()
        result = call(*args, **kwargs)
        into.append(time.process_time() - began)
        return result

    return wrapped


def agents(count: int) -> Row:
    """Part of a core for unpack, observe and tick with `count` agents, a sample every 6 ms."""
    trace = Trace(Shape("tp_dp", count * PER_SLOT, PER_SLOT, PER_SLOT, step_s=1.0), 2)
    play = Play(trace, 2, lost=0.0, interval=count * 0.006)
    bodies = [pack(trace.sample(slot, 8.0 + i * 0.006)) for i, slot in enumerate(trace.slots)]
    bodies += [pack(trace.sample(slot, 16.0 + i * 0.006)) for i, slot in enumerate(trace.slots)]
    for i, body in enumerate(bodies[:count]):
        play.engine.observe(unpack(Sample, body), 8.0 + i * 0.006)
    cost = [spend(play, bodies[count + k :][:100], 16.0 + k * 0.006) for k in range(0, count, 100)]
    return Row.of("part of a core", f"{count} agents", "unpack + observe + tick", cost, "")


def spend(play: Play, bodies: Sequence[bytes], now: float) -> float:
    """Processor seconds per second for some samples in a row, with ten ticks a second."""
    began = time.process_time()
    for i, body in enumerate(bodies):
        at = now + i * 0.006
        play.engine.observe(unpack(Sample, body), at)
        if i % 16 == 0:
            play.engine.tick(at)
    return (time.process_time() - began) / (len(bodies) * 0.006)
