"""Agents that live only in memory, and a world of them around the engine, with a clock that a test moves."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from stormjib_runtime import engine
from stormjib_runtime.kept import fresh
from stormjib_runtime.orders import job_state, order_for
from stormjib_runtime.state import Refused
from stormjib_runtime.wire import (
    EXIT_STOPPED,
    PROTOCOL,
    AgentPhase,
    Bounds,
    Do,
    Fault,
    Generation,
    Hang,
    JobState,
    Order,
    RankPhase,
    RankState,
    Report,
    ResumePoint,
    Saving,
    StorageFinding,
)

if TYPE_CHECKING:
    from stormjib_runtime.state import State

JOB = "job-uid"
TICK_S = 0.1


def bounds(replicas: int = 2, minimum: int = 1, spares: int = 0, **other: Any) -> Bounds:
    """Bounds whose slots are all filled by pods `pod-SLOT`."""
    slots = {str(slot): f"pod-{slot}" for slot in range(replicas + spares)}
    base = Bounds(
        version=1,
        incarnation=1,
        spec_generation=1,
        replicas=replicas,
        min_replicas=minimum,
        processes=2,
        slots=slots,
        restarts_left=3,
        interval_steps=20,
        hang=Hang(500, 60.0, True),
    )
    return replace(base, **other)


def on_report(state: State, report: Report, now: float) -> State:
    """A report, and what follows from it."""
    return engine.decided(state, engine.heard(state, report, now), now)


def on_lost(state: State, slot: int, agent: int, now: float) -> State:
    """A broken connection, and what follows from it."""
    return engine.decided(state, engine.lost(state, slot, agent, now), now)


@dataclass
class FakeAgent:
    """Does what an agent does with its orders, at once; its ranks step when the test says so."""

    slot: int
    number: int = 1
    pod_uid: str = ""
    phase: AgentPhase = AgentPhase.IDLE
    incarnation: int = 0
    version: int = 0
    generation: Generation | None = None
    store: str = ""
    resume: ResumePoint | None = None
    offers: ResumePoint | None = None
    """What its storage offers to resume from."""
    ranks: tuple[RankState, ...] = ()
    committed: ResumePoint | None = None
    saving: Saving | None = None
    storage: StorageFinding | None = None
    leaving: bool = False
    preflight: str = ""
    measures: str = ""
    copies: str = ""
    node: str = ""
    listens: bool = True
    slow_stop: bool = False
    """Goes on under STOP until the test calls `stop`."""
    prepare_error: str = ""
    error: str = ""
    events: tuple[str, ...] = ()
    alive: bool = True
    median: float = 0.1
    processes: int = 2
    did: list[Do] = field(default_factory=list)
    ran: list[str] = field(default_factory=list)
    """Ids of the generations whose ranks it has started, in order."""
    last: Order | None = None

    def __post_init__(self) -> None:
        self.pod_uid = self.pod_uid or f"pod-{self.slot}"

    def report(self) -> Report:
        return Report(
            protocol=PROTOCOL,
            job_uid=JOB,
            incarnation=self.incarnation,
            slot=self.slot,
            agent=self.number,
            pod_uid=self.pod_uid,
            address=f"10.0.0.{self.slot}",
            processes=self.processes,
            phase=self.phase,
            order_version=self.version,
            generation=self.generation,
            store=self.store,
            resume=self.resume,
            ranks=self.ranks,
            committed=self.committed,
            saving=self.saving,
            storage=self.storage,
            leaving=self.leaving,
            preflight=self.preflight,
            measures=self.measures,
            copies=self.copies,
            node=self.node,
            error=self.error,
            events=self.events,
        )

    def obey(self, order: Order) -> None:
        if order.incarnation < self.incarnation or order.version < self.version:
            return
        self.incarnation, self.version, self.last = order.incarnation, order.version, order
        self.did.append(order.do)
        same = order.generation is not None and self.generation == order.generation
        if order.do in (Do.PREPARE, Do.RUN) and not self._mine(order):
            self._end(AgentPhase.IDLE)
        elif order.do is Do.WAIT:
            self._end(AgentPhase.IDLE if self.phase is not AgentPhase.STARTING else AgentPhase.STARTING)
        elif order.do is Do.FINISH:
            self._end(AgentPhase.IDLE)
            self.alive = False
        elif order.do is Do.PREPARE and not same:
            self._prepare(order)
        elif order.do is Do.RUN and not (same and self.phase in (AgentPhase.RUNNING, AgentPhase.STOPPED)):
            self._run(order)
        elif order.do is Do.STOP and not self.slow_stop:
            self.stop(order)

    def _mine(self, order: Order) -> bool:
        """Whether it names this life: one for the life before the last restart may come late."""
        members = order.generation.members if order.generation is not None else ()
        me = (self.slot, self.number, self.pod_uid)
        return any((member.slot, member.agent, member.pod_uid) == me for member in members)

    def _end(self, phase: AgentPhase) -> None:
        self.phase, self.generation, self.ranks, self.store, self.resume = phase, None, (), "", None
        self.error, self.committed = "", None

    def _prepare(self, order: Order) -> None:
        failed = bool(self.prepare_error)
        self._end(AgentPhase.FAILED if failed else AgentPhase.PREPARED)
        self.generation, self.error = order.generation, self.prepare_error
        if not failed:
            self.store = f"10.0.0.{self.slot}:1"
            self.resume = None if self.offers and self.offers.digest in order.refused else self.offers

    def _run(self, order: Order) -> None:
        if order.generation is None:
            return
        mine, store = order.generation.node_rank(self.slot), self.store
        first = order.generation.first_rank(mine or 0)
        self.phase, self.generation, self.resume = AgentPhase.RUNNING, order.generation, order.resume
        self.store = store if mine == 0 else ""
        self.ran.append(str(order.generation.id))
        self.ranks = tuple(
            RankState(first + i, listens=self.listens, phase=RankPhase.START) for i in range(self.processes)
        )

    def stop(self, order: Order) -> None:
        """End as asked; who holds nothing of it has nothing to end."""
        if self.generation != order.generation:
            self._end(AgentPhase.IDLE)
            return
        self.phase, self.generation = AgentPhase.STOPPED, order.generation
        self.ranks = tuple(
            replace(r, exit=EXIT_STOPPED if r.exit is None else r.exit, step=order.stop_after)
            for r in self.ranks
        )

    def all_ranks(self, **change: Any) -> None:
        self.ranks = tuple(replace(rank, **change) for rank in self.ranks)

    def rank(self, local: int, **change: Any) -> None:
        self.ranks = tuple(replace(r, **change) if i == local else r for i, r in enumerate(self.ranks))

    def step(self, step: int) -> None:
        self.all_ranks(step=step, step_age_s=0.0, median_step_s=self.median, phase=RankPhase.STEP, idle_s=0.0)

    def age(self, seconds: float) -> None:
        """Time passes without a step: clocks and idle times grow."""
        for i, rank in enumerate(self.ranks):
            frozen = rank.process in ("T", "Z")
            self.rank(
                i,
                step_age_s=rank.step_age_s + seconds,
                idle_s=rank.idle_s + seconds,
                process_age_s=rank.process_age_s + seconds if frozen else 0.0,
            )

    def restart(self) -> None:
        """The container died and starts again."""
        self.number += 1
        self._end(AgentPhase.IDLE)
        self.incarnation = self.version = 0
        self.alive = True


class World:
    """The engine, its agents and a clock. A message is delivered at once unless a test loses it."""

    def __init__(self, given: Bounds, agents: int | None = None) -> None:
        count = len(given.slots) if agents is None else agents
        self.now = 1000.0
        self.agents = {slot: FakeAgent(slot) for slot in range(count)}
        self.state: State = fresh(JOB, given.incarnation, self.now)
        self.cut: set[int] = set()
        self.operator_away = False
        self.set_bounds(given)

    # facts

    def set_bounds(self, given: Bounds) -> None:
        self.state = engine.on_bounds(self.state, given, self.now)

    def change(self, **change: Any) -> None:
        held = self.state.bounds
        if held is None:
            raise RuntimeError("no bounds")
        self.set_bounds(replace(held, version=held.version + 1, **change))

    def deliver(self, slot: int) -> None:
        """One report of this agent, and the order that answers it."""
        agent = self.agents[slot]
        if agent.alive and slot not in self.cut:
            self.state = on_report(self.state, agent.report(), self.now)
            agent.obey(order_for(self.state, slot))

    def settle(self) -> None:
        """Reports and orders go round until nothing changes any more."""
        for _ in range(50):
            before = (self.state.version, [agent.report() for agent in self.agents.values()])
            for slot in self.agents:
                self.deliver(slot)
            if before == (self.state.version, [agent.report() for agent in self.agents.values()]):
                return
        raise RuntimeError(f"does not settle: {self.state.stage}")

    def pass_time(self, seconds: float, *, stepping: bool = False) -> None:
        """Ticks every TICK_S, a heartbeat every second; ranks step on, or their clocks age."""
        for tick in range(1, round(seconds / TICK_S) + 1):
            self.now += TICK_S
            self.tick()
            for slot, agent in self.agents.items():
                agent.age(TICK_S)
                if stepping and agent.phase is AgentPhase.RUNNING:
                    agent.step(max(agent.ranks[0].step, 0) + 1)
                if tick % 10 == 0:
                    self.deliver(slot)
        self.settle()

    def tick(self) -> None:
        """Time passes; the operator asks as often as it does."""
        if not self.operator_away:
            self.state = replace(self.state, operator_heard=self.now)
        self.state = engine.on_tick(self.state, self.now)

    def kill(self, slot: int) -> None:
        """Its container dies: the connection breaks."""
        self.agents[slot].alive = False
        self.state = on_lost(self.state, slot, self.agents[slot].number, self.now)

    def come_back(self, slot: int) -> None:
        self.agents[slot].restart()
        self.deliver(slot)

    def step_all(self, step: int) -> None:
        for agent in self.agents.values():
            if agent.phase is AgentPhase.RUNNING:
                agent.step(step)
        self.settle()

    # what came of it

    def job(self) -> JobState:
        return job_state(self.state, self.now)

    def phase(self, slot: int) -> AgentPhase:
        return self.agents[slot].phase

    @property
    def slots(self) -> list[int]:
        return [member.slot for member in self.state.members]

    @property
    def causes(self) -> list[str]:
        return [str(entry.generation.cause) for entry in self.state.history]

    def refused(self, slot: int) -> int:
        """Status with which a report of this agent is refused; 0 where it is not."""
        try:
            on_report(self.state, self.agents[slot].report(), self.now)
        except Refused as error:
            return error.status
        return 0


def running_world(given: Bounds | None = None, step: int = 10) -> World:
    """A world whose first generation has reached `step`."""
    world = World(given or bounds())
    world.settle()
    world.step_all(step)
    return world


def last_fault(world: World) -> Fault:
    """Why the newest generation began."""
    fault = world.state.history[-1].fault
    if fault is None:
        raise RuntimeError("the newest generation was planned")
    return fault
