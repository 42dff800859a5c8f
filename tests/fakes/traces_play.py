"""Plays a trace to an engine, as a coordinator would: samples as they arrive, ticks, questions and their answers."""

from __future__ import annotations

import heapq
import random
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from fakes.traces import BANDWIDTH, RTT_S
from stormjib_health.engine import DEFAULT, Engine, Place
from stormjib_health.verdict import Scope, Syndrome, Verdict
from stormjib_health.wire import Answer, CheckKind

if TYPE_CHECKING:
    from collections.abc import Callable

    from fakes.traces import Trace
    from stormjib_health.engine import Ask

TICK_S = 0.1
BURST = 1 << 20


@dataclass(frozen=True)
class Told:
    """One verdict and when it came."""

    at: float
    verdict: Verdict


@dataclass
class Play:
    """One job under the eyes of an engine. `lost` is the part of the samples that never arrive."""

    trace: Trace
    seed: int
    lost: float = 0.02
    interval: float = 0.2
    cut_off: Callable[[int, float], bool] = lambda slot, now: False
    """Whether the agent of a slot is cut off from the coordinator."""
    answers: bool = True
    now: float = 0.0
    told: list[Told] = field(default_factory=list)
    shift: float = 0.0
    """Seconds that this coordinator's clock is ahead of the job's: it was stopped for so long."""

    def __post_init__(self) -> None:
        self.random = random.Random(self.seed)
        places = [Place(person.rank, person.slot) for person in self.trace.people]
        self.places = places
        self.engine = Engine(places, now=self.now)
        self.restart_agents()
        self._answers: list[tuple[float, int, Answer]] = []
        self._exits = _exits(self.trace, self.random)
        self._stacks: tuple[int, ...] = ()

    def restart_coordinator(self) -> None:
        """A new engine in the middle of the job; the agents send their groups again."""
        self.engine = Engine(self.places, now=self.now + self.shift)
        self.trace.forget_groups()
        self._answers.clear()

    def restart_agents(self) -> None:
        """They sample from now on."""
        self._due = [(self.trace.first_moment(slot, self.now), slot) for slot in self.trace.slots]
        heapq.heapify(self._due)

    def run(self, until: float) -> list[Told]:
        """Go on to `until`; all verdicts so far."""
        while self.now < until:
            self.now += TICK_S
            self._deliver()
            self._tick()
        return self.told

    def run_until_told(self, until: float, wanted: Callable[[Verdict], bool]) -> Told | None:
        """Go on until a verdict is as wanted, or `until`."""
        seen = len(self.told)
        while self.now < until:
            self.run(self.now + TICK_S / 2)
            for told in self.told[seen:]:
                if wanted(told.verdict):
                    return told
            seen = len(self.told)
        return None

    def _deliver(self) -> None:
        while self._due[0][0] <= self.now:
            at, slot = heapq.heappop(self._due)
            heapq.heappush(self._due, (at + self.interval * self.random.uniform(0.97, 1.06), slot))
            if self.cut_off(slot, at) or self.trace.silent(slot, at) or self.random.random() < self.lost:
                continue
            wanted = tuple(r for r in self._stacks if self.trace.people[r].slot == slot)
            sample = self.trace.sample(slot, at, wanted)
            self.engine.observe(sample, at + self.shift + self.random.uniform(0.0005, 0.01))
        while self._exits and self._exits[0][0] <= self.now:
            at, rank, code, lines = heapq.heappop(self._exits)
            self.engine.exited(rank, code, lines, at + self.shift)
        while self._answers and self._answers[0][0] <= self.now:
            at, slot, answer = heapq.heappop(self._answers)
            self.engine.answered(slot, answer, at + self.shift)

    def _tick(self) -> None:
        found = self.engine.tick(self.now + self.shift)
        self._stacks = found.stacks
        self.told += [Told(self.now, verdict) for verdict in found.verdicts]
        for ask in found.asks:
            if (
                self.answers
                and not self.cut_off(ask.slot, self.now)
                and not self.trace.silent(ask.slot, self.now)
            ):
                due = self.now + self.random.uniform(0.25, 0.8)
                heapq.heappush(self._answers, (due, ask.slot, self._measure(ask)))

    def _measure(self, ask: Ask) -> Answer:
        noise = self.random.uniform(0.92, 1.12)
        if ask.kind is CheckKind.COMPUTE:
            fault = self.trace.fault
            slow = fault.severity if fault.kind == "quota" and ask.rank == fault.rank else 1.0
            return Answer(ask.id, True, seconds=0.05 * slow * (1 + (noise - 1) / 4), digest="d", versions="v")
        if not self.trace.reaches(ask.slot, ask.peer_slot, self.now):
            return Answer(ask.id, False, text="timed out")
        rate = self.trace.rate(ask.slot, ask.peer_slot, self.now)
        return Answer(
            ask.id, True, seconds=BURST / BANDWIDTH * rate * noise, bytes=BURST, rtt_s=RTT_S * noise
        )


def _exits(trace: Trace, dice: random.Random) -> list[tuple[float, int, int, str]]:
    """The root, and victims that name its address or, in a cascade, each other's."""
    fault = trace.fault
    if fault.kind != "crash":
        return []
    code, words = dice.choice(
        [(-9, ""), (-6, "Fatal Python error: Aborted"), (1, "ValueError: bad batch"), (-11, "")]
    )
    exits = [(fault.at + dice.uniform(0.01, 0.12), fault.rank, code, words)]
    for person in trace.people:
        if person.rank != fault.rank:
            near = person.rank if dice.random() < 0.3 else fault.rank
            slot = trace.people[(near + 1) % len(trace.people) if near == person.rank else near].slot
            lines = f"RuntimeError: [gloo/transport/tcp/pair.cc:534] Connection closed by peer [10.{slot >> 8}.{slot & 255}.2]:4000"
            exits.append((fault.at + dice.uniform(0.1, 0.25), person.rank, 1, lines))
    heapq.heapify(exits)
    return exits


def blames(verdict: Verdict) -> bool:
    """It names somebody, or asks for a restart: above a note."""
    return verdict.scope is not Scope.JOB or verdict.syndrome not in (Syndrome.CONGESTION, Syndrome.IMBALANCE)


def acts(verdict: Verdict) -> bool:
    """Sure enough that somebody would act on it."""
    return blames(verdict) and verdict.confidence >= DEFAULT.act_confidence
