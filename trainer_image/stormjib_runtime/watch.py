"""The health engine of the running generation: samples in, verdicts out, and what agents are asked for in between.

One engine a generation, made when its ranks begin to run, so a coordinator that comes new to a job begins with an empty
one and knows a baseline again after some steps. The engine of a generation that a rank's exit has ended is asked once more:
the restart does not wait for it, and who died first is known a moment later.
"""

from __future__ import annotations

from collections import Counter, deque
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from stormjib_health.engine import Engine, Malformed, Place
from stormjib_health.wire import Check, CheckKind, Wish
from stormjib_runtime.state import Refused, Running
from stormjib_runtime.wire import EXIT_RESUME_FAILED, EXIT_ROLL_BACK, EXIT_STOPPED, PROTOCOL

if TYPE_CHECKING:
    from stormjib_health.engine import Ask
    from stormjib_health.verdict import Syndrome, Verdict
    from stormjib_health.wire import Sample
    from stormjib_runtime.state import State
    from stormjib_runtime.wire import Generation, Report

INTERVAL_S = 0.2
PER_AGENT_S = 0.006
"""With many agents samples come so much rarer: 1,250 of them send 170 a second together."""
PACE = 20.0
"""Samples a second that an agent may send, and so many at once after a pause."""
LATER_S = 1.0
"""How long the engine of a generation that a crash has ended may take to say who was first."""
_AS_ASKED = (None, 0, EXIT_STOPPED, EXIT_RESUME_FAILED, EXIT_ROLL_BACK)


@dataclass
class _Slot:
    """What is known of one agent's samples."""

    measures: str = ""
    number: int = -1
    tokens: float = PACE
    filled: float = 0.0
    checks: list[Check] = field(default_factory=list)
    stacks: set[int] = field(default_factory=set)


@dataclass(frozen=True)
class _Former:
    """The engine of a generation that is over."""

    engine: Engine
    generation: Generation
    until: float


class Watch:
    """Follows the state of one coordinator. No clock of its own: `now` is the coordinator's."""

    def __init__(self) -> None:
        self.accepted = 0
        self.refused: Counter[str] = Counter()
        """Samples that were not taken, by reason."""
        self.found: Counter[Syndrome] = Counter()
        self.suspicious = False
        """Something may be wrong: a look soon is worth while."""
        self._generation: Generation | None = None
        self._engine: Engine | None = None
        self._slots: dict[int, _Slot] = {}
        self._places: dict[int, int] = {}
        self._former: _Former | None = None
        self._crashed = False
        """A rank of the generation has ended by itself."""
        self._known: deque[tuple[str, int]] = deque(maxlen=256)
        """Verdicts that are counted."""

    @property
    def urgent(self) -> bool:
        """A rank has ended by itself, and who went first is about to be told."""
        return self._crashed or self._former is not None

    def follow(self, state: State, now: float) -> None:
        """Begin anew with each generation whose ranks run; forget one that is over."""
        generation = state.generation if isinstance(state.stage, Running) else None
        if generation == self._generation:
            return
        if self._engine is not None and self._generation is not None and self._crashed:
            self._former = _Former(self._engine, self._generation, now + LATER_S)
        self._generation, self._crashed = generation, False
        self._slots.clear()
        self._places = _places(generation) if generation else {}
        places = [Place(rank, slot) for rank, slot in self._places.items()]
        self._engine = Engine(places, now=now) if generation else None

    def take(self, state: State, sample: Sample, now: float) -> Wish:
        """One sample in; what is wanted of its agent out. Raises Refused, and counts it."""
        try:
            slot = self._admit(state, sample, now)
            if self._engine is not None:
                self._engine.observe(sample, now)
                for answer in sample.answers:
                    self._engine.answered(sample.slot, answer, now)
        except Malformed as error:
            self.refused["malformed"] += 1
            raise Refused(400, str(error)) from error
        self.accepted += 1
        slot.measures = sample.measures or slot.measures
        return self._wish(slot, sample.slot)

    def exits(self, state: State, report: Report, now: float) -> None:
        """What a report says of ranks that have ended. Under a planned stop they end because they are asked to."""
        said = report.generation.id if report.generation else None
        stopping = isinstance(state.stage, Running) and state.stage.stop is not None
        if self._former is not None and said == self._former.generation.id:
            _feed(self._former.engine, report, now)
        elif self._engine is not None and said == state.current and not stopping:
            self._crashed = _feed(self._engine, report, now) or self._crashed

    def tick(self, state: State, now: float) -> list[tuple[str, Verdict]]:
        """What was found since the last look, with the generation that it is about."""
        found = self._last_words(now)
        if self._engine is None or self._generation is None:
            return found
        for agent in state.agents.values():
            if agent.silent(now):
                self._engine.silent(agent.report.slot, now)
        findings = self._engine.tick(now)
        self.suspicious = findings.suspicious
        for ask in findings.asks:
            self._ask(ask)
        for rank in findings.stacks:
            if rank in self._places:
                self._slots.setdefault(self._places[rank], _Slot(filled=now)).stacks.add(rank)
        return found + [self._counted(self._generation, verdict) for verdict in findings.verdicts]

    def _last_words(self, now: float) -> list[tuple[str, Verdict]]:
        former = self._former
        if former is None:
            return []
        verdicts = former.engine.tick(now).verdicts
        if verdicts or now > former.until:
            self._former = None
        return [self._counted(former.generation, verdict) for verdict in verdicts]

    def _counted(self, generation: Generation, verdict: Verdict) -> tuple[str, Verdict]:
        key = (str(generation.id), verdict.id)
        if key not in self._known:
            self._known.append(key)
            self.found[verdict.syndrome] += 1
        return key[0], verdict

    def _admit(self, state: State, sample: Sample, now: float) -> _Slot:
        reason, status, text = _reason(state, sample)
        slot = self._slots.setdefault(sample.slot, _Slot(filled=now)) if not reason else _Slot()
        if not reason and sample.number <= slot.number:
            reason, status, text = "old", 409, f"sample {sample.number} is not above {slot.number}"
        if not reason and not _paced(slot, now):
            reason, status, text = "pace", 429, f"more than {PACE:.0f} samples a second"
        if reason:
            self.refused[reason] += 1
            raise Refused(status, text)
        slot.number = sample.number
        return slot

    def _wish(self, slot: _Slot, number: int) -> Wish:
        groups = self._engine is not None and self._engine.lacks_groups(number)
        checks, slot.checks = tuple(slot.checks), []
        stacks, slot.stacks = tuple(sorted(slot.stacks)), set()
        interval = max(INTERVAL_S, PER_AGENT_S * len(self._generation.members if self._generation else ()))
        return Wish(interval, groups=groups, stacks=stacks, checks=checks)

    def _ask(self, ask: Ask) -> None:
        """Put a check where the next sample of its agent finds it. Without the other side's address there is none."""
        slot = self._slots.get(ask.slot)
        peer = self._slots.get(ask.peer_slot)
        address = peer.measures if peer is not None else ""
        if slot is None or (ask.kind is CheckKind.TRANSFER and not address):
            return
        peer_address = address if ask.kind is CheckKind.TRANSFER else ""
        slot.checks.append(Check(ask.id, ask.kind, peer_address, ask.rank, ask.limit_s))


def _feed(engine: Engine, report: Report, now: float) -> bool:
    """Tell the engine of the exits in a report; whether there were any."""
    ended = [rank for rank in report.ranks if rank.exit not in _AS_ASKED]
    for rank in ended:
        engine.exited(rank.rank, rank.exit or 0, rank.last_lines, now)
    return bool(ended)


def _places(generation: Generation) -> dict[int, int]:
    """Rank -> slot."""
    slots = [member.slot for member in generation.members for _ in range(member.processes)]
    return dict(enumerate(slots))


def _reason(state: State, sample: Sample) -> tuple[str, int, str]:
    """Why a sample may not be heard: a word to count, HTTP status and a sentence; empty where it may."""
    if sample.protocol != PROTOCOL:
        return "protocol", 409, f"protocol {sample.protocol}; this coordinator speaks {PROTOCOL}"
    if sample.job_uid != state.job_uid:
        return "job", 403, f"job {sample.job_uid[:64]!r} is not served here"
    if not isinstance(state.stage, Running) or sample.generation != str(state.current):
        return "generation", 409, f"generation {sample.generation[:40]!r} does not run here"
    member = state.generation.member(sample.slot) if state.generation is not None else None
    if member is None or member.agent != sample.agent:
        return "slot", 403, f"agent {sample.agent} of slot {sample.slot} is no member of {state.current}"
    return "", 200, ""


def _paced(slot: _Slot, now: float) -> bool:
    slot.tokens = min(PACE, slot.tokens + PACE * max(0.0, now - slot.filled))
    slot.filled = now
    if slot.tokens < 1:
        return False
    slot.tokens -= 1
    return True
