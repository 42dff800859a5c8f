"""What the coordinator knows, as frozen records: the plain data that the rules of `engine` take and give.

Times are the coordinator's own monotonic clock, handed in as `now`; nothing here reads a clock.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING

from stormjib_runtime.wire import (
    HEARTBEAT_S,
    HEARTBEATS_MISSED,
    AgentPhase,
    Bounds,
    Cause,
    Fault,
    Generation,
    GenerationId,
    HistoryEntry,
    Member,
    Report,
    ResumePoint,
    StorageFinding,
)

if TYPE_CHECKING:
    from collections.abc import Mapping

    from stormjib_health.verdict import Accusation, Verdict

PER_AGENT_S = 0.003
"""With many agents heartbeats come so much rarer: 1,250 of them send 333 a second together."""


class Refused(Exception):
    """A message that changes nothing: HTTP status and why. Root of the engine's errors."""

    def __init__(self, status: int, text: str) -> None:
        super().__init__(text)
        self.status = status


class StandDown(Refused):
    """A coordinator of a higher incarnation exists: this one has nothing more to say."""


@dataclass(frozen=True)
class Agent:
    """One registered agent: its newest report, and how well we hear it."""

    report: Report
    heard: float
    lost_at: float | None = None
    """When its last connection broke; None again as soon as it says anything."""
    since: float = -math.inf
    """Its first word after its last silence; before any time where it was never silent."""
    heartbeat_s: float = HEARTBEAT_S
    """How soon it was asked to report again."""

    def silent(self, now: float) -> bool:
        return now - self.heard > HEARTBEATS_MISSED * self.heartbeat_s

    def runs(self, generation: Generation) -> bool:
        """Whether its report speaks of this generation."""
        said = self.report.generation
        return said is generation or (said is not None and said.id == generation.id)


# --- stages: what the job is in; each carries what only it needs ----------------------------------------------------


@dataclass(frozen=True)
class Adopting:
    """A coordinator that was not there a moment ago listens to who runs what, and lets them."""

    since: float | None = None
    """When the first bounds came: before that no agent can register."""
    cause: Cause = Cause.START
    fault: Fault | None = None
    """Why the next generation was about to begin, where the predecessor had decided that."""


@dataclass(frozen=True)
class Idle:
    """No generation is alive; the next begins as soon as the rules allow."""

    since: float
    cause: Cause = Cause.START
    fault: Fault | None = None
    not_before: float = 0.0
    """Backoff."""
    final: bool = False
    """The rules say that the job has failed: nothing follows."""
    fresh: bool = True
    """Nobody is being replaced: take the lowest slots, and wait a while until all are there."""
    enough_since: float | None = None
    """fresh: when the smallest allowed number of agents was first ready."""


@dataclass(frozen=True)
class Preparing:
    """The first member opens the generation on the storage and hosts its store, once all are at rest."""

    since: float
    at_rest: bool = False
    """Nobody holds an older generation: what its ranks had staged is on the storage, where the opener will find it."""


@dataclass(frozen=True)
class Stop:
    """A planned end of the running generation."""

    cause: Cause
    stop_after: int
    deadline: float


@dataclass(frozen=True)
class Running:
    """The ranks of the generation are to be alive; with `stop`, until the step it names."""

    since: float
    store: str
    resume: ResumePoint | None
    stop: Stop | None = None
    adopted: bool = False
    """Begun by a coordinator before this one, which may have asked it to stop."""


@dataclass(frozen=True)
class Suspended:
    """No ranks, by the user's will."""

    then: Idle | None = None
    """What was waiting when the job was suspended."""


@dataclass(frozen=True)
class Complete:
    """Every rank exited 0."""

    running: Running


Stage = Adopting | Idle | Preparing | Running | Suspended | Complete


@dataclass(frozen=True)
class State:
    """All of it. `engine` makes new ones; nobody changes one."""

    job_uid: str
    incarnation: int
    started: float
    stage: Stage
    number: int = 0
    """Number of the last generation begun under this incarnation."""
    bounds: Bounds | None = None
    generation: Generation | None = None
    """The newest one, alive or not."""
    history: tuple[HistoryEntry, ...] = ()
    agents: Mapping[int, Agent] = field(default_factory=dict)
    version: int = 0
    """Grows with every change of somebody's order."""
    revision: int = 0
    """Grows with every change that the operator may want to see at once."""
    progressed: bool = False
    """The generation has finished a step."""
    barren: int = 0
    """Generations in a row that ended, at the job's own fault, without a step."""
    refused: tuple[str, ...] = ()
    step: int = -1
    loss: float | None = None
    committed: ResumePoint | None = None
    last_fault: Fault | None = None
    events: tuple[str, ...] = ()
    verdicts: tuple[Verdict, ...] = ()
    """Of the health engine, newest last."""
    strikes: Mapping[str, int] = field(default_factory=dict)
    """Pod uid -> verdicts that named it."""
    unwanted: tuple[str, ...] = ()
    """Pods that the rules want out."""
    most: int | None = None
    """Nodes that the rules still allow; None for what the bounds say."""
    accusations: tuple[Accusation, ...] = ()
    operator_heard: float = -math.inf
    """When the operator last asked or ordered anything; see `witness`."""

    @property
    def heartbeat_s(self) -> float:
        """Between two reports of one agent."""
        return max(HEARTBEAT_S, PER_AGENT_S * len(self.agents))

    def agent(self, member: Member) -> Agent | None:
        """The agent that the generation means: the same container, not its successor."""
        agent = self.agents.get(member.slot)
        return agent if agent is not None and agent.report.agent == member.agent else None

    @property
    def order_version(self) -> int:
        """Grows with every change and with every coordinator, so that an agent never waits for a number long passed."""
        return (self.incarnation << 40) + self.version

    @property
    def members(self) -> tuple[Member, ...]:
        return self.generation.members if self.generation else ()

    @cached_property
    def seated(self) -> list[tuple[Member, Agent | None]]:
        """Each member of the generation with its agent, where that is registered here."""
        return [(member, self.agent(member)) for member in self.members]

    @cached_property
    def speaking(self) -> list[tuple[Member, Agent]]:
        """Members whose report is about the generation."""
        found = self.generation
        if found is None:
            return []
        return [(member, agent) for member, agent in self.seated if agent is not None and agent.runs(found)]

    @property
    def current(self) -> GenerationId:
        return self.generation.id if self.generation else GenerationId(0, 0)

    @property
    def storage(self) -> StorageFinding | None:
        """The highest generation that any agent found on the storage when it started."""
        found = (agent.report.storage for agent in self.agents.values())
        return max((one for one in found if one), key=lambda one: one.generation, default=None)


def is_ready(agent: Agent) -> bool:
    """Ready to fork ranks: its zygote has imported what they need, and its node was not found unfit."""
    return agent.report.phase is not AgentPhase.STARTING and not agent.report.preflight


def is_urgent(state: State, now: float) -> bool:
    """Whether a decision only waits for its moment: a backoff that ends, a lost connection that may be made again."""
    if isinstance(state.stage, Idle):
        return now < state.stage.not_before
    return any(agent.lost_at is not None for _, agent in state.seated if agent is not None)
