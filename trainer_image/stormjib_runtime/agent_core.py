"""What an agent does next: a pure function of what it runs and of the newest order. No process, no clock, no socket.

Orders are level-based, so `decide` compares instead of remembering: the same order twice gives nothing to do the second
time, and a lost one is made good by the next.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from enum import StrEnum
from typing import TYPE_CHECKING

from stormjib_runtime.wire import AgentPhase, Do

if TYPE_CHECKING:
    from stormjib_runtime.wire import Generation, GenerationId, Order, Report


class Stage(StrEnum):
    """How far this agent is with the generation that it holds."""

    NONE = "None"
    PREPARING = "Preparing"
    PREPARED = "Prepared"
    FAILED = "Failed"
    STARTING = "Starting"
    RUNNING = "Running"
    STOPPING = "Stopping"  # the ranks were asked to stop
    SETTLING = "Settling"  # they have; commits are pending
    STOPPED = "Stopped"  # what they saved is committed


class Act(StrEnum):
    """One thing to do, in the order given."""

    END = "End"  # SIGKILL every rank, forget the generation
    PREPARE = "Prepare"  # open the generation on the storage, start its store
    START = "Start"  # start the ranks
    STOP = "Stop"  # ask the ranks to stop
    SETTLE = "Settle"  # the ranks have stopped: finish pending commits
    EXIT = "Exit"


@dataclass(frozen=True)
class Me:
    """Which life of which slot this agent is."""

    slot: int
    agent: int
    pod_uid: str


@dataclass(frozen=True)
class Held:
    """The generation that this agent holds, and how far it is with it."""

    generation: Generation | None = None
    stage: Stage = Stage.NONE
    ended: bool = False
    """Every rank of it has exited."""

    @property
    def id(self) -> GenerationId | None:
        return None if self.generation is None else self.generation.id


NOTHING = Held()


def accepts(order: Order, incarnation: int, version: int) -> bool:
    """Whether an order is news: of the highest incarnation seen, and no older than what was obeyed."""
    return order.incarnation > incarnation or (order.incarnation == incarnation and order.version >= version)


def decide(me: Me, held: Held, order: Order, heard: Report | None) -> tuple[Act, ...]:
    """What to do now. `heard` is the last report that the coordinator has answered: it knows at least that."""
    leaving = heard is not None and heard.leaving
    match order.do:
        case Do.FINISH:
            return (*_end(held), Act.EXIT)
        case Do.WAIT:
            return (*_end(held), *((Act.EXIT,) if leaving else ()))
        case Do.PREPARE:
            return _prepare(me, held, order)
        case Do.RUN:
            return _run(me, held, order)
        case Do.STOP:
            return _stop(held, order, heard)


def _end(held: Held) -> tuple[Act, ...]:
    return () if held.stage is Stage.NONE else (Act.END,)


def _prepare(me: Me, held: Held, order: Order) -> tuple[Act, ...]:
    if not _mine(me, order.generation):
        return _end(held)
    return () if _holds(held, order) else (*_end(held), Act.PREPARE)


def _run(me: Me, held: Held, order: Order) -> tuple[Act, ...]:
    """A newer generation without this agent: it ends its ranks, and is a spare from then on."""
    if not _mine(me, order.generation):
        return _end(held)
    if not _holds(held, order):
        return (*_end(held), Act.START)
    return (Act.START,) if held.stage is Stage.PREPARED else ()


def _stop(held: Held, order: Order, heard: Report | None) -> tuple[Act, ...]:
    """An agent that holds nothing has nothing to stop, and one that leaves then goes."""
    if not _holds(held, order):
        return (*_end(held), *((Act.EXIT,) if order.end_leaving else ()))
    if held.stage is Stage.RUNNING:
        return (Act.STOP,)
    if held.stage is Stage.STOPPING:
        return (Act.SETTLE,) if held.ended else ()
    if held.stage in (Stage.STARTING, Stage.SETTLING):
        return ()
    if (
        held.stage is Stage.STOPPED
    ):  # whoever goes before that is heard looks as if it had not stopped in time
        told = heard is not None and heard.phase is AgentPhase.STOPPED
        return (Act.EXIT,) if order.end_leaving and told else ()
    return _end(held)  # prepared only: nothing runs that could stop


def _holds(held: Held, order: Order) -> bool:
    return held.stage is not Stage.NONE and order.generation is not None and held.id == order.generation.id


def _mine(me: Me, generation: Generation | None) -> bool:
    """Whether this very life is a member: an order for the container's life before the last restart is not for us."""
    return generation is not None and any(
        (member.slot, member.agent, member.pod_uid) == (me.slot, me.agent, me.pod_uid)
        for member in generation.members
    )


_PHASES = {
    Stage.PREPARED: AgentPhase.PREPARED,
    Stage.FAILED: AgentPhase.FAILED,
    Stage.STARTING: AgentPhase.RUNNING,
    Stage.RUNNING: AgentPhase.RUNNING,
    Stage.STOPPING: AgentPhase.RUNNING,
    Stage.SETTLING: AgentPhase.RUNNING,
    Stage.STOPPED: AgentPhase.STOPPED,
}


def phase(held: Held, ready: bool) -> AgentPhase:
    """What to report: the generation's stage, or whether ranks could be started at once."""
    return _PHASES.get(held.stage) or (AgentPhase.IDLE if ready else AgentPhase.STARTING)


class StepTimes:
    """The median step time of one rank, from pages read now and then. Pure."""

    KEPT = 31

    def __init__(self) -> None:
        self._last: tuple[int, int] | None = None
        self._times: list[float] = []

    def sample(self, step: int, step_ns: int) -> float:
        """Take one reading of the page; the median so far in seconds, 0 before two steps were seen."""
        if step_ns > 0 and (self._last is None or step > self._last[0]):
            if self._last is not None:
                self._add((step_ns - self._last[1]) / (step - self._last[0]) / 1e9)
            self._last = (step, step_ns)
        return self.median

    @property
    def median(self) -> float:
        ordered = sorted(self._times)
        return ordered[len(ordered) // 2] if ordered else 0.0

    def _add(self, seconds: float) -> None:
        if seconds > 0 and math.isfinite(seconds):
            self._times = [*self._times, seconds][-self.KEPT :]
