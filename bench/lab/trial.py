"""Runs one trial in a laboratory: a fresh generation, good health for a while, one fault, what was said about it."""

from __future__ import annotations

import os
import time
from typing import TYPE_CHECKING, Protocol

from bench.lab import traces
from bench.lab.grade import SETTLE_S, Record, Seen, blaming
from bench.lab.lab import Plan
from stormjib_fault import catalogue, words
from stormjib_fault.words import FaultError, NotFired
from stormjib_runtime.wire import Cause

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from bench.lab.calls import Watcher
    from bench.lab.draws import Trial
    from stormjib_fault.fault import Fault
    from stormjib_fault.world import World
    from stormjib_runtime.wire import JobState

HEALTHY_S = 60.0
PROVE_S = 5.0
BASE_STEPS = 30
"""The normal step is the median of so many before the injection."""
KEPT_BEFORE, KEPT_AFTER = 20, 40
"""Steps of the trace that a record keeps."""
POLL_S = 0.02
WATCH_S = {
    words.CRASH: 3.0,
    words.COMMUNICATION_HANG: 8.0,
    words.NON_COMMUNICATION_HANG: 8.0,
    words.COMMUNICATION_SLOW: 8.0,
    words.NON_COMMUNICATION_SLOW: 6.0,
    words.CORRUPTION: 6.0,
    words.DESYNC: 6.0,
}
HARMLESS_S = 6.0
"""Watched so long after an injection that nobody is to be blamed for; long phases last so much longer."""


class Site(Protocol):
    """What a trial needs of a laboratory."""

    @property
    def folder(self) -> Path:
        """Where ranks write their traces."""

    @property
    def watcher(self) -> Watcher:
        """What the coordinator says."""

    def give_plan(self, plan: Plan) -> None:
        """What steps shall be like from the next generation on."""

    def fresh(self, before: Callable[[], None]) -> JobState:
        """A new life of every rank; `before` is called while there is none."""

    def world(self, step_s: float) -> World:
        """The ranks as they are now."""


def run(lab: Site, trial: Trial) -> Record:
    """One trial. Raises FaultError where the laboratory itself fails; the fault is healed in any case."""
    lab.give_plan(Plan(pattern=trial.pattern))
    kind = catalogue.FAULTS[trial.draw.fault]
    return _run_early(lab, trial) if kind.early else _run(lab, trial)


def _run(lab: Site, trial: Trial) -> Record:
    lab.fresh(lambda: None)
    world = _healthy(lab, trial.healthy_steps)
    fault = catalogue.make(world, trial.draw)
    try:
        fault.arm()
        time.sleep(trial.wait_s)
        before = lab.watcher.until(lambda state: True, HEALTHY_S)
        began = time.monotonic()
        fault.inject()
        return _observe(lab, trial, world, fault, fault.struck_at or began, before)
    finally:
        fault.heal()


def _run_early(lab: Site, trial: Trial) -> Record:
    """The fault is there before the ranks are."""
    before = lab.watcher.until(lambda state: True, HEALTHY_S)
    fault = catalogue.make(lab.world(0.1), trial.draw)
    began = [time.monotonic()]

    def inject() -> None:
        fault.arm()
        began.append(time.monotonic())
        fault.inject()

    try:
        lab.fresh(inject)
        return _observe(lab, trial, lab.world(0.1), fault, began[-1], before)
    finally:
        fault.heal()


def _healthy(lab: Site, steps: int) -> World:
    """Wait until rank 0 has made so many steps; the world, with what its steps are like. Raises FaultError."""
    world = lab.world(0.1)
    deadline = time.monotonic() + HEALTHY_S
    while len((trace := _trace(lab, world, 0.0)).get(0, ())) < steps:
        if time.monotonic() > deadline:
            raise FaultError(f"rank 0 did not make {steps} healthy steps in {HEALTHY_S:.0f} s")
        time.sleep(POLL_S)
    last = trace[0][-BASE_STEPS:]
    return lab.world(sum(step.step_s for step in last) / len(last)) if last else world


def _trace(lab: Site, world: World, began: float) -> traces.Trace:
    return traces.read(lab.folder, {place.rank: place.pid for place in world.ranks}, began)


def _observe(lab: Site, trial: Trial, world: World, fault: Fault, began: float, before: JobState) -> Record:
    truth = fault.truth()
    load = os.getloadavg()[0] / (os.cpu_count() or 1)
    proof = _proof(fault)
    _watch(lab, truth, began, _limit(trial, truth))
    after = lab.watcher.until(lambda state: True, HEALTHY_S)
    return _record(lab, trial, world, truth, proof, began, before, after, load)


def _proof(fault: Fault) -> str:
    try:
        return fault.prove(PROVE_S)
    except NotFired:
        return ""


def _limit(trial: Trial, truth: words.Truth) -> float:
    if not truth.harmless:
        return WATCH_S[truth.syndrome]
    lasts = trial.row == "F15" or trial.draw.fault == "pause"  # their severity is their length
    return HARMLESS_S + (trial.draw.severity if lasts else 0.0)


def _watch(lab: Site, truth: words.Truth, began: float, limit_s: float) -> None:
    """Until somebody was blamed and the blame has settled; what is harmless is watched to the end."""
    end = began + limit_s
    while (left := end - time.monotonic()) > 0:
        said = blaming(seen(lab, began))
        if said and not truth.harmless:
            end = min(end, began + said[0].at_s + SETTLE_S + POLL_S)
        time.sleep(min(POLL_S, max(left, 0.0)))


def seen(lab: Site, began: float) -> tuple[Seen, ...]:
    """Every verdict since a moment, as a record keeps it."""
    found = []
    for sight in lab.watcher.sights(began):
        one = sight.verdict
        found.append(
            Seen(
                round(sight.at - began, 4),
                one.id,
                one.syndrome.value,
                one.scope.value,
                one.culprits,
                one.slots,
                round(one.confidence, 3),
                one.confirmed,
                one.software,
                round(one.severity, 3),
                bool(one.stack),
                one.sentence[:300],
            )
        )
    return tuple(found)


def _record(
    lab: Site,
    trial: Trial,
    world: World,
    truth: words.Truth,
    proof: str,
    began: float,
    before: JobState,
    after: JobState,
    load: float,
) -> Record:
    watched = time.monotonic() - began
    trace = _trace(lab, world, began)
    step_s = traces.median_step(trace, -BASE_STEPS * 1.0, 0.0)
    verdicts = seen(lab, began)
    said = blaming(verdicts)
    known = {accusation.id for accusation in before.accusations}
    return Record(
        id=trial.id,
        row=trial.row,
        fault=trial.draw.fault,
        ranks=trial.ranks,
        pattern=trial.pattern,
        severity=trial.draw.severity,
        victim=trial.draw.victim,
        seed=trial.draw.seed,
        truth=truth,
        proof=proof[:200],
        verdicts=verdicts,
        steps=traces.steps_until(trace, said[0].at_s) if said else -1,
        step_s=round(step_s, 4),
        slowdown=round(traces.median_step(trace, 2 * step_s, watched) / step_s, 3) if step_s else 1.0,
        restarts=restarts(before, after),
        accused=tuple(one.slot for one in after.accusations if one.id not in known),
        load=round(load, 2),
        watched_s=round(watched, 2),
        trace=traces.pack(trace, KEPT_BEFORE, KEPT_AFTER),
    )


def restarts(before: JobState, after: JobState) -> tuple[str, ...]:
    """Why generations began between two states, each with its rank, such as `RankHang rank 3`; those that we asked for left out."""
    old = before.generation.id if before.generation else None
    fresh = [entry for entry in after.history if old is None or entry.generation.id > old]
    fresh = [entry for entry in fresh if entry.generation.cause is not Cause.RESUME]
    return tuple(
        f"{entry.generation.cause.value} rank {entry.fault.rank if entry.fault else None}" for entry in fresh
    )
