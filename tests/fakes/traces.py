"""What the agents of a job would send: seeded, pure, with any fault of the laboratory. No sockets, no processes, no clock.

A step is a list of calls; each call of a group ends when its last member has come and the slowest connection of its ring is done.
What connections show is taken from measured signatures of Gloo's ring (rank i sends to i - 1).
"""

from __future__ import annotations

import math
import random
from collections import deque
from dataclasses import dataclass, field, replace

from stormjib_health.sampler.calls import Thinned
from stormjib_health.sampler.core import MAX_TIMINGS, MIN_TIMINGS
from stormjib_health.wire import Call, Edge, Group, Kind, Pair, Phase, RankSample, Sample, Stack, Timing

BANDWIDTH = 1.25e8
"""Bytes a second of a connection: 1 Gb/s."""
NEVER = math.inf
RTT_S = 0.0002
SMALL = 4096
"""Bytes that a kernel takes at once: their sender never waits for them."""


@dataclass(frozen=True)
class Shape:
    """A healthy job."""

    layout: str = "dp"
    """`dp`, `fsdp`, `tp_dp` or `pp_dp`."""
    world: int = 4
    per_slot: int = 1
    inner: int = 2
    """Ranks of a TP or PP group."""
    step_s: float = 0.08
    comm: float = 0.3
    """Part of the step in calls."""
    noise: float = 0.02
    """Relative, of every piece of computing."""
    asleep: bool = True
    """Computing is a timed sleep, so that the process looks idle in it."""
    checkpoint_every: int = 0
    checkpoint_s: float = 0.0
    """0 steps: never. Every second one is an evaluation, and every third is rank 0's alone."""
    start_s: float = 0.0
    """Compile in the first step."""
    stall: float = 0.0
    """Chance a step that one rank pauses for up to three steps (garbage collection, a busy core)."""


@dataclass(frozen=True)
class Fault:
    """What goes wrong. Slots and ranks as the kind needs them; kinds are those of `KINDS`."""

    kind: str = "none"
    at: float = NEVER
    rank: int = 0
    peer: int = 0
    """The other rank of a link; the fault is on what `rank` sends to it."""
    severity: float = 1.5
    """Step time after over before."""
    agent_dies: bool = False
    """`node`: its agent cannot reach the coordinator either."""


KINDS = (
    "none", "stop", "stop_inside", "sleep", "sleep_data", "gil", "disk", "spin", "skip", "wrong_size", "slow", "quota", "link_cut",
    "node_cut", "link_slow", "node_tx", "node_rx", "loss", "latency", "congestion", "imbalance", "crash",
)  # fmt: skip
STOPS = {"stop", "sleep", "sleep_data", "gil", "disk", "spin"}
RATES = {"link_slow", "node_tx", "node_rx", "loss", "latency", "congestion"}


@dataclass
class Op:
    """One call of the step."""

    axis: str
    kind: Kind
    compute: float
    """Seconds of own work before it."""
    seconds: float
    """Of a healthy call, everybody there."""
    timed: bool = False
    source: int = -1
    """SEND: index of the stage in its group, and of the one that receives."""
    target: int = -1

    @property
    def bytes(self) -> float:
        return self.seconds * BANDWIDTH


class Line:
    """One end of a connection: what `source` sends to `target`."""

    def __init__(self, source: int, target: int, local: str, remote: str, main: bool) -> None:
        self.source, self.target, self.local, self.remote, self.main = source, target, local, remote, main
        self.done: deque[tuple[float, float, float]] = deque()
        """(moment, bytes, busy seconds)."""


@dataclass
class Ring:
    """A group with its connections; `lines[i]` is what its member i sends to member i - 1."""

    group: Group
    lines: list[Line] = field(default_factory=list)
    number: dict[int, int] = field(default_factory=dict)


@dataclass
class Issue:
    """One call of one rank, with the moment at which it ends."""

    at: float
    end: float
    call: Call
    timed: bool
    step: int
    """Last finished one."""


class Person:
    """One rank: where its simulated time stands, and what is not yet sampled."""

    def __init__(self, rank: int, slot: int, max_timings: int) -> None:
        self.rank, self.slot = rank, slot
        self.timings = Thinned(max_timings)
        self.time = 0.0
        self.step_began = 0.0
        self.issues: deque[Issue] = deque()
        self.newest: dict[int, Issue] = {}
        self.last_issue: Issue | None = None
        self.timed: list[Issue] = []
        self.steps: deque[tuple[float, int, float, float]] = deque()
        """(end, number, seconds, of these own work that is known)."""
        self.own = 0.0
        self.free = False
        """The end of its last call is taken, so what comes before the next one is known for own work."""
        self.phases: deque[tuple[float, int]] = deque()
        self.phase, self.phase_at = 0, 0.0
        self.step = -1
        self.halted_at = NEVER
        """When it stopped running on its own account."""
        self.pairs: dict[int, dict[int, Pair]] = {}
        """Group -> peer -> counts."""
        self.told: dict[int, tuple[int, int, int]] = {}

    def meets(self, group: int, peer: int, sent: int = 0, received: int = 0) -> None:
        """One more message to or from this peer."""
        pairs = self.pairs.setdefault(group, {})
        old = pairs.get(peer, Pair(peer, 0, 0))
        pairs[peer] = Pair(peer, old.sent + sent, old.received + received)

    def works(self, until: float, *, known: bool) -> None:
        """It comes to a call, whose end is `known` or not."""
        self.own += until - self.time if self.free else 0.0
        self.free = known


class Trace:
    """A job and its agents. `sample(slot, now)` must be called with growing `now` for each slot."""

    def __init__(self, shape: Shape, seed: int, fault: Fault = Fault()) -> None:
        self.shape, self.fault = shape, fault
        self.random = random.Random(seed)
        most = max(MIN_TIMINGS, MAX_TIMINGS // shape.per_slot)
        self.people = [Person(rank, rank // shape.per_slot, most) for rank in range(shape.world)]
        self.slots = sorted({person.slot for person in self.people})
        self.rings = self._make_rings()
        self.ops = self._make_ops()
        self.of_slot: dict[int, list[Line]] = {slot: [] for slot in self.slots}
        for ring in (ring for rings in self.rings.values() for ring in rings):
            for line in ring.lines:
                self.of_slot[self.people[line.source].slot].append(line)
        self._offset = {slot: self.random.uniform(0, 0.2) for slot in self.slots}
        self._number = dict.fromkeys(self.slots, 0)
        self._before = dict.fromkeys(self.slots, 0.0)
        self._known: set[int] = set()
        self._steps = 0
        self._desynced = False
        self.durations: list[tuple[float, float]] = []
        """(end, seconds) of every step of rank 0: whether a fault has slowed the job is measured, not assumed."""

    # --- the job ---

    def _make_rings(self) -> dict[str, list[Ring]]:
        world, inner = self.shape.world, self.shape.inner
        everybody = [list(range(world))]
        if self.shape.layout in ("dp", "fsdp"):
            return {"world": self._ring_all("default_pg", everybody, 0)}
        near = [list(range(i, i + inner)) for i in range(0, world, inner)]
        far = [list(range(i, world, inner)) for i in range(inner)]
        name = self.shape.layout[:2]
        return {
            "world": self._ring_all("default_pg", everybody, 0),
            "inner": self._ring_all(name, near, 1),
            "dp": self._ring_all("dp", far, 2),
        }

    def _ring_all(self, name: str, lists: list[list[int]], axis: int) -> list[Ring]:
        return [self._ring(name, ranks, axis * 100_000 + i + 1) for i, ranks in enumerate(lists)]

    def _ring(self, name: str, ranks: list[int], key: int) -> Ring:
        ring = Ring(Group.of(key, name, tuple(ranks)), number=dict.fromkeys(ranks, 0))
        for i, rank in enumerate(ranks):
            before = ranks[i - 1]
            if len(ranks) == 1:
                continue
            a, b = self._address(key, rank, min(rank, before)), self._address(key, before, min(rank, before))
            ring.lines.append(Line(rank, before, a, b, True))
            if len(ranks) > 2:
                self_back = Line(before, rank, b, a, False)
                ring.lines.append(self_back)
        return ring

    def _address(self, key: int, rank: int, salt: int) -> str:
        slot = rank // self.shape.per_slot
        return (
            f"10.{slot >> 8}.{slot & 255}.2:{20_000 + (rank * 7 + salt * 3 + key * 11) % 40_000}.{key}.{salt}"
        )

    def _make_ops(self) -> list[Op]:
        shape = self.shape
        plan: list[tuple[str, Kind, bool]]
        if shape.layout == "dp":
            plan = [("world", Kind.ALL_REDUCE, i in (0, 2)) for i in range(4)]
        elif shape.layout == "fsdp":
            plan = [("world", Kind.ALL_GATHER, i == 0) for i in range(4)]
            plan += [("world", Kind.REDUCE_SCATTER, False)] * 2 + [("world", Kind.ALL_REDUCE, True)]
        elif shape.layout == "tp_dp":
            plan = [("inner", Kind.ALL_REDUCE, i in (0, 5)) for i in range(6)] + [
                ("dp", Kind.ALL_REDUCE, True)
            ] * 2
        else:
            return self._pipeline_ops()
        call = shape.step_s * shape.comm / len(plan)
        work = shape.step_s * (1 - shape.comm) / len(plan)
        return [Op(axis, kind, work, call, timed) for axis, kind, timed in plan]

    def _pipeline_ops(self, batches: int = 4) -> list[Op]:
        """All forward, then all backward; then gradients over DP, and the norm over all."""
        shape, stages = self.shape, self.shape.inner
        slots = 2 * (batches + stages - 1)
        work, call = shape.step_s * (1 - shape.comm) / slots, shape.step_s * shape.comm / (slots + 2)
        ops = []
        for _ in range(batches):
            ops += [Op("inner", Kind.SEND, work, call, source=s, target=s + 1) for s in range(stages - 1)]
        for _ in range(batches):
            ops += [
                Op("inner", Kind.SEND, work, call, source=s, target=s - 1) for s in range(stages - 1, 0, -1)
            ]
        return [
            *ops,
            Op("dp", Kind.ALL_REDUCE, work, call, True),
            Op("world", Kind.ALL_REDUCE, 0.0, call, True),
        ]

    def run_to(self, moment: float) -> None:
        """Simulate until every rank is past `moment`, or stands for ever."""
        while min((p.time for p in self.people if p.time < NEVER), default=NEVER) <= moment:
            self._step()

    def _step(self) -> None:
        self._pause()
        lucky = self.random.randrange(self.shape.world) if self.random.random() < self.shape.stall else -1
        for person in self.people:
            person.step_began = person.time
        for position, op in enumerate(self.ops):
            for ring in self.rings[op.axis]:
                if op.kind is Kind.SEND:
                    self._send(ring, op)
                else:
                    self._collective(ring, op, position, lucky)
        for person in self.people:
            if person.time < NEVER:
                lasted = person.time - person.step_began
                person.steps.append((person.time, self._steps, lasted, person.own))
                person.own = 0.0
        first = self.people[0]
        if first.time < NEVER:
            self.durations.append((first.time, first.time - first.step_began))
        self._steps += 1

    def _pause(self) -> None:
        """What may last: start, checkpoint, evaluation."""
        shape, step = self.shape, self._steps
        if step == 0 and shape.start_s:
            self._long(Phase.COMPILE, shape.start_s, range(shape.world))
        elif shape.checkpoint_every and step and step % shape.checkpoint_every == 0:
            turn = step // shape.checkpoint_every
            phase = Phase.EVALUATION if turn % 2 else Phase.CHECKPOINT
            self._long(phase, shape.checkpoint_s, [0] if turn % 3 == 0 else range(shape.world))

    def _long(self, phase: Phase, seconds: float, ranks: range | list[int]) -> None:
        for rank in ranks:
            person = self.people[rank]
            if person.time < NEVER:
                person.phases.append((person.time, int(phase)))
                person.time += seconds * self.random.uniform(0.8, 1.2)
                person.phases.append((person.time, int(Phase.STEP)))

    def _work(self, person: Person, seconds: float, lucky: int, position: int) -> float:
        """When the rank has done its own work and comes to the call."""
        work = seconds * max(0.2, self.random.gauss(1, self.shape.noise))
        if person.rank == lucky and position == 0:
            work += self.shape.step_s * self.random.uniform(0.5, 3)
        arrives = person.time + work
        fault = self.fault
        if arrives < fault.at:
            return arrives
        if fault.kind in STOPS and person.rank == fault.rank:
            if person.halted_at == NEVER:
                person.halted_at = max(person.time, fault.at)
                if fault.kind == "sleep_data":
                    person.phases.append((person.halted_at, int(Phase.DATA)))
            return NEVER
        return arrives + self._drag(person, work, position)

    def _drag(self, person: Person, work: float, position: int) -> float:
        fault, shape = self.fault, self.shape
        lost = (fault.severity - 1) * shape.step_s
        if fault.kind == "quota" and person.rank == fault.rank:
            return lost * work / max(1e-9, self._own_work(person))
        if fault.kind == "slow" and person.rank == fault.rank:
            # Before the first call of the rank in the step.
            first = position == 0 or (shape.layout == "pp_dp" and work > 0)
            return (
                lost * (work / max(1e-9, self._own_work(person)) if shape.layout == "pp_dp" else 1)
                if first
                else 0.0
            )
        if fault.kind == "imbalance" and position == 0 and person.rank == self._unlucky():
            return lost
        return 0.0

    def _own_work(self, person: Person) -> float:
        if self.shape.layout != "pp_dp":
            return sum(op.compute for op in self.ops)
        return sum(op.compute for op in self.ops) / max(1, self.shape.inner - 1)

    def _unlucky(self) -> int:
        return (
            (self._steps * 7 + self._steps // 5) % self.shape.world if self.fault.rank == 0 else self._draw()
        )

    def _draw(self) -> int:
        return random.Random(self._steps * 7919 + self.fault.rank).randrange(self.shape.world)

    # --- calls ---

    def _collective(self, ring: Ring, op: Op, position: int, lucky: int) -> None:
        here = [self.people[rank] for rank in ring.group.ranks]
        arrivals = {p.rank: self._work(p, op.compute, lucky, position) for p in here if p.time < NEVER}
        if self._skips(ring, op, arrivals):
            return
        last = max(arrivals.values()) if len(arrivals) == len(here) else NEVER
        ends = self._ends(ring, op, arrivals, last)
        for person in here:
            if person.rank in arrivals:
                self._enter(person, ring, op, arrivals[person.rank], ends[person.rank])

    def _skips(self, ring: Ring, op: Op, arrivals: dict[int, float]) -> bool:
        """The faulty rank leaves this call out: it makes the next one, and the others wait for ever."""
        fault = self.fault
        if fault.kind not in ("skip", "wrong_size") or self._desynced or fault.rank not in arrivals:
            return False
        if arrivals[fault.rank] < fault.at or len(arrivals) < 2:
            return False
        self._desynced = True
        for rank, at in arrivals.items():
            odd = rank == fault.rank
            kind = Kind.BROADCAST if odd and fault.kind == "skip" else op.kind
            person = self.people[rank]
            self._enter(person, ring, replace(op, kind=kind), at, NEVER, 77 if odd else 11)
        return True

    def _ends(self, ring: Ring, op: Op, arrivals: dict[int, float], last: float) -> dict[int, float]:
        if last == NEVER:
            return dict.fromkeys(arrivals, NEVER)
        slowest = 0.0
        deaf: list[int] = []
        for line in ring.lines:
            seconds = op.seconds if line.main else op.seconds / 1000
            factor, busy = self._factor(line, last)
            if line.main and self._cut(line, last + op.seconds):
                deaf.append(line.target)
            slowest = max(slowest, seconds * factor)
            line.done.append((last + seconds * factor, op.bytes if line.main else 500.0, seconds * busy))
        inside = self.fault.kind == "stop_inside" and self.fault.rank in arrivals
        end = last + slowest * max(0.5, self.random.gauss(1, self.shape.noise))
        if inside and end > self.fault.at:
            self.people[self.fault.rank].halted_at = self.fault.at
            return dict.fromkeys(arrivals, NEVER)
        if deaf and op.bytes > SMALL:
            return dict.fromkeys(arrivals, NEVER)
        return {rank: NEVER if rank in deaf else end for rank in arrivals}

    def _enter(self, person: Person, ring: Ring, op: Op, at: float, end: float, signature: int = 0) -> None:
        if at == NEVER:
            person.time = NEVER
            return
        number = ring.number[person.rank] = ring.number[person.rank] + 1
        call = Call(
            ring.group.key, number, int(op.kind), signature=signature, signed=number if signature else 0,
            pairs=tuple(person.pairs.get(ring.group.key, {}).values()),
        )  # fmt: skip
        person.issues.append(Issue(at, end, call, op.timed, self._steps - 1))
        person.works(at, known=op.timed)
        person.time = end

    def _send(self, ring: Ring, op: Op) -> None:
        ranks, key = ring.group.ranks, ring.group.key
        source, target = self.people[ranks[op.source]], self.people[ranks[op.target]]
        sent_at = self._work(source, op.compute, -1, 1) if source.time < NEVER else NEVER
        if sent_at < NEVER:
            source.meets(key, target.rank, sent=1)
            self._message(source, ring, Kind.SEND, target.rank, sent_at, sent_at)
        source.time = sent_at
        if target.time == NEVER:
            return
        line = next(x for x in ring.lines if x.source == source.rank and x.target == target.rank)
        factor, busy = self._factor(line, max(sent_at, target.time))
        arrives = sent_at + op.seconds * factor
        if self._cut(line, arrives):
            arrives = NEVER
        elif arrives < NEVER:
            line.done.append((arrives, op.bytes, op.seconds * busy))
        target.meets(key, source.rank, received=1)
        self._message(target, ring, Kind.RECV, source.rank, target.time, max(arrives, target.time))

    def _message(self, person: Person, ring: Ring, kind: Kind, peer: int, at: float, end: float) -> None:
        key = ring.group.key
        call = Call(
            key, ring.number[person.rank], int(kind), peer=peer, pairs=tuple(person.pairs[key].values()),
        )  # fmt: skip
        inside = self.fault.kind == "stop_inside" and person.rank == self.fault.rank and kind is Kind.RECV
        if inside and at <= self.fault.at < end:
            person.halted_at, end = self.fault.at, NEVER
        person.issues.append(Issue(at, end, call, False, self._steps - 1))
        person.works(at, known=False)
        person.time = end

    # --- connections ---

    def _slots(self, line: Line) -> tuple[int, int]:
        return self.people[line.source].slot, self.people[line.target].slot

    def rate(self, a: int, b: int, now: float) -> float:
        """How many times as long bytes take from slot a to slot b."""
        fault = self.fault
        if now < fault.at or fault.kind not in RATES or a == b:
            return 1.0
        at, to = self.people[fault.rank].slot, self.people[fault.peer].slot
        hit = {
            "node_tx": a == at, "node_rx": b == at, "congestion": True,
        }.get(fault.kind, (a, b) == (at, to))  # fmt: skip
        return 1 + (fault.severity - 1) * self.shape.step_s / self._time_on(at, to) if hit else 1.0

    def _time_on(self, at: int, to: int) -> float:
        """Seconds a step in calls whose ring has a connection between slots that the fault touches."""
        crossing = {
            axis for axis, rings in self.rings.items() for ring in rings for line in ring.lines
            if line.main and self._touched(self._slots(line), at, to)
        }  # fmt: skip
        return sum(op.seconds for op in self.ops if op.axis in crossing) or self.shape.step_s

    def _touched(self, slots: tuple[int, int], at: int, to: int) -> bool:
        if slots[0] == slots[1]:
            return False
        kinds = {"node_tx": slots[0] == at, "node_rx": slots[1] == at, "congestion": True}
        return kinds.get(self.fault.kind, slots == (at, to))

    def _factor(self, line: Line, now: float) -> tuple[float, float]:
        """Of the time that bytes take, and of the time in which the connection is busy."""
        a, b = self._slots(line)
        if self.fault.kind not in RATES or now < self.fault.at:
            return 1.0, self.random.uniform(0.9, 1.15)
        factor = self.rate(a, b, now)
        if self.fault.kind == "loss" and factor > 1:
            factor *= self.random.uniform(0.6, 1.4)
        return factor, factor * self._echo(a, b, now) * self.random.uniform(0.9, 1.15)

    def _echo(self, a: int, b: int, now: float) -> float:
        """Acknowledgements share the queue of a slow side: the other direction looks busy for longer too."""
        back = self.rate(b, a, now)
        return 1 + 0.5 * (back - 1) if self.fault.kind in ("node_tx", "node_rx") else 1.0

    def _cut(self, line: Line, moment: float) -> bool:
        fault = self.fault
        if moment < fault.at:
            return False
        a, b = self._slots(line)
        at, to = self.people[fault.rank].slot, self.people[fault.peer].slot
        if fault.kind == "node_cut":
            return a != b and at in (a, b)
        return fault.kind == "link_cut" and (a, b) == (at, to)

    def reaches(self, a: int, b: int, now: float) -> bool:
        """Whether a burst from slot a to slot b gets through."""
        fault = self.fault
        at, to = self.people[fault.rank].slot, self.people[fault.peer].slot
        if now < fault.at or a == b:
            return True
        return not (fault.kind == "node_cut" and at in (a, b)) and not (
            fault.kind == "link_cut" and {a, b} == {at, to}
        )

    @property
    def steps(self) -> int:
        """Steps simulated so far."""
        return self._steps

    def skip(self, seconds: float) -> None:
        """The machine was stopped, and its clocks ran on: whatever was going on took so much longer."""
        for person in self.people:
            person.time += seconds
            if person.last_issue and person.last_issue.end > self._before[person.slot]:
                person.last_issue.end += seconds
            for issue in person.issues:
                issue.at, issue.end = issue.at + seconds, issue.end + seconds
            person.steps = deque((at + seconds, n, took + seconds, own) for at, n, took, own in person.steps)

    # --- the agents ---

    def forget_groups(self) -> None:
        """Agents send their groups again: a new coordinator asks."""
        self._known.clear()

    def sample(self, slot: int, now: float, stacks: tuple[int, ...] = ()) -> Sample:
        """What the agent of `slot` says at `now`."""
        self.run_to(now)
        over = now - self._before[slot]
        self._before[slot] = now
        self._number[slot] += 1
        people = [person for person in self.people if person.slot == slot]
        groups: tuple[Group, ...] = ()
        if slot not in self._known:
            self._known.add(slot)
            rings = [ring for rings in self.rings.values() for ring in rings]
            groups = tuple(r.group for r in rings if any(p.rank in r.number for p in people))
        return Sample(
            1, "uid", slot, 0, "1.1", self._number[slot], over,
            ranks=tuple(self._rank_sample(person, now, over) for person in people if not self._dead(person, now)),
            edges=self._edges(slot, now, over)[:64], groups=groups,
            stacks=tuple(Stack(rank, f'File "train.py", line {rank + 7}, in work') for rank in stacks),
        )  # fmt: skip

    def _dead(self, person: Person, now: float) -> bool:
        return self.fault.kind == "crash" and person.rank == self.fault.rank and now >= self.fault.at

    def _rank_sample(self, person: Person, now: float, over: float) -> RankSample:
        self._advance(person, now)
        steps = []
        while person.steps and person.steps[0][0] <= now:
            _, person.step, *seconds = person.steps.popleft()
            steps.append(seconds)
        while person.phases and person.phases[0][0] <= now:
            person.phase_at, person.phase = person.phases.popleft()
        halted = now >= person.halted_at
        kind = self.fault.kind
        state = "T" if kind in ("stop", "stop_inside") else "D" if kind == "disk" else "S"
        for issue in person.timed:
            if issue.end <= now:
                person.timings.add(issue.step if issue.step >= 0 else issue.call.issued, _timing(issue))
        timings = person.timings.items()
        person.timings.told(timings)
        person.timed = [issue for issue in person.timed if issue.end > now]
        quota = kind == "quota" and person.rank == self.fault.rank and now >= self.fault.at
        return RankSample(
            person.rank, person.step, 0.0, tuple(lasted for lasted, _ in steps[-8:]), tuple(own for _, own in steps[-8:]),
            person.step if steps else -1, person.phase, now - person.phase_at,
            state if halted else "S",
            now - person.halted_at if halted and state in "TD" else 0.0, self._idle(person, now),
            "hrtimer_nanosleep" if halted else "futex_wait_queue", 1 if halted and state == "T" else 0,
            over * 0.3 if quota else 0.0, over * 0.3 if quota else 0.0,
            self._calls(person, now), timings,
        )  # fmt: skip

    def _advance(self, person: Person, now: float) -> None:
        while person.issues and person.issues[0].at <= now:
            issue = person.issues.popleft()
            person.newest[issue.call.group] = person.last_issue = issue
            if issue.timed:
                person.timed.append(issue)

    def _idle(self, person: Person, now: float) -> float:
        if now >= person.halted_at:
            return 0.0 if self.fault.kind == "spin" else now - person.halted_at
        issue = person.last_issue
        inside = issue is not None and issue.end > now
        if self.shape.asleep:
            return now
        return now - issue.at if inside and issue else 0.0

    def _calls(self, person: Person, now: float) -> tuple[Call, ...]:
        told = []
        for key, issue in person.newest.items():
            over = issue is not person.last_issue or (issue.timed and issue.end <= now)
            call = replace(issue.call, age_s=now - issue.at, done=over)
            mark = (call.issued, sum(pair.sent + pair.received for pair in call.pairs), over)
            if person.told.get(key) != mark or not over:
                told.append(call)
            person.told[key] = mark
        return tuple(told)

    def _edges(self, slot: int, now: float, over: float) -> tuple[Edge, ...]:
        listed = []
        for line in self.of_slot[slot]:
            size = busy = 0.0
            while line.done and line.done[0][0] <= now:
                _, more, seconds = line.done.popleft()
                size, busy = size + more, busy + seconds
            edge = (
                self._trouble(line, now)
                if self._in_trouble(line, now)
                else Edge(line.source, line.local, line.remote)
            )
            if size or edge.unacked:
                listed.append(self._counted(edge, line, size, busy, over, now))
        return tuple(sorted(listed, key=lambda e: -e.sent))

    def _counted(self, edge: Edge, line: Line, size: float, busy: float, over: float, now: float) -> Edge:
        a, b = self._slots(line)
        queue = (self.rate(a, b, now) + self.rate(b, a, now) - 2) * 0.005
        lost = 0.03 if self.fault.kind == "loss" and self.rate(a, b, now) > 1 else 0.0
        return replace(
            edge, sent=int(size), busy_s=min(busy, over), over_s=over, retransmitted=int(size * lost),
            rtt_s=edge.rtt_s or RTT_S * self.random.uniform(0.7, 1.5) + queue, rto_s=edge.rto_s or 0.2,
        )  # fmt: skip

    def _in_trouble(self, line: Line, now: float) -> bool:
        """Only what had something to send at the cut shows it."""
        if now < self.fault.at + 0.05 or not (line.main or self.fault.kind == "node_cut"):
            return False
        if not self._cut(line, now):
            return False
        return line.main or line.source % 2 == 0

    def _trouble(self, line: Line, now: float) -> Edge:
        since = now - self.fault.at
        backoff = int(math.log2(1 + since / 0.2)) if since > 0.2 else 0
        return Edge(
            line.source, line.local, line.remote, rtt_s=RTT_S, rto_s=0.2 * 2**backoff, backoff=backoff, unacked=10,
            last_ack_s=since, unsent=500_000 if line.main else 100,
        )  # fmt: skip

    def silent(self, slot: int, now: float) -> bool:
        """The agent of this slot cannot reach the coordinator."""
        fault = self.fault
        return (
            fault.kind == "node_cut"
            and fault.agent_dies
            and now >= fault.at
            and self.people[fault.rank].slot == slot
        )

    def first_moment(self, slot: int, now: float) -> float:
        """When the agent of this slot samples first after `now`."""
        return now + self._offset[slot]


def _timing(issue: Issue) -> Timing:
    return Timing(issue.call.group, issue.call.issued, issue.end - issue.at)
