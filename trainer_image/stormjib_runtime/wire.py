"""The words that coordinator, agent, ranks and operator share: plain records, no behaviour.

A leaf: imports nothing of ours but the words of health, and only the standard library, because the operator imports it and a trainer pod may
hold any image. Every record is frozen; JSON is its only outer form (`stormjib_runtime.codec`). Nothing here carries a
time of day: durations are seconds on the sender's own clock ("age"), never a point in time, because no rule may
compare the clocks of two hosts.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from enum import StrEnum
from functools import cached_property

from stormjib_health.verdict import Accusation, Rule, Verdict  # noqa: TC001  the codec reads them at run time

PROTOCOL = 1
"""Version of the messages. A peer with another one is refused by name, never guessed at. It stays 1 until the first release."""

HEARTBEAT_S = 1.0
"""An agent reports at least this often, unless its order says more; a coordinator that hears nothing for `HEARTBEATS_MISSED` of them
calls it silent."""
HEARTBEATS_MISSED = 3
UNKNOWN_GENERATION = 428
"""HTTP status (RFC 6585) for a report that names a generation without its members, where they are not known: say it again, whole."""

# --- exit codes of a rank, beside those of the user's own script ---------------------------------------------------
EXIT_STOPPED = 83
"""The rank stopped after the step that the page asked for; its state is saved. Not a failure."""
EXIT_RESUME_FAILED = 84
"""The rank could not load the resume point. The next generation starts from an older step and is not counted."""

EXIT_ROLL_BACK = 85
"""The numbers of this generation are wrong from some step on. Its first rank has left `doubts/gX.Y.json` on the
storage, which says the newest step that is trusted; whoever opens the next generation resumes there, not above, and
its ranks compare what they do again with what was recorded. No process has failed."""


@dataclass(frozen=True, order=True)
class GenerationId:
    """(incarnation, number): only ever grows. Written `2.7` in names, `g2.7` in paths."""

    incarnation: int
    number: int

    def __str__(self) -> str:
        return f"{self.incarnation}.{self.number}"

    @staticmethod
    def parse(text: str) -> GenerationId:
        """Read `2.7`. Raises ValueError on anything else."""
        incarnation, dot, number = text.partition(".")
        if not (dot and incarnation.isdecimal() and number.isdecimal()):
            raise ValueError(f"generation {text!r} is not of the form INCARNATION.NUMBER, such as 2.7")
        return GenerationId(int(incarnation), int(number))


class Cause(StrEnum):
    """Why a generation began (that is, why the one before it ended)."""

    START = "Start"
    RANK_EXIT = "RankExit"
    RANK_HANG = "RankHang"
    COMMUNICATION_HANG = "CommunicationHang"
    SLOW = "Slow"
    CORRUPTION = "Corruption"
    DESYNC = "Desync"  # ranks called different collectives
    CONTAINER_EXIT = "ContainerExit"
    AGENT_SILENT = "AgentSilent"
    LEAVE = "Leave"
    GROW = "Grow"
    SHRINK = "Shrink"
    RESUME = "Resume"  # after suspend
    RESUME_OLDER = "ResumeOlder"  # the chosen step could not be loaded
    PREPARE_FAILED = "PrepareFailed"  # storage or store could not be opened

    @property
    def counted(self) -> bool:
        """Whether the restart budget pays: faults of the job's own processes do, losses and plans of ours do not."""
        return self in _COUNTED


_COUNTED = frozenset(
    {
        Cause.RANK_EXIT,
        Cause.RANK_HANG,
        Cause.COMMUNICATION_HANG,
        Cause.CORRUPTION,
        Cause.DESYNC,
        Cause.CONTAINER_EXIT,
        Cause.PREPARE_FAILED,
    }
)


@dataclass(frozen=True)
class ResumePoint:
    """A committed step: which step, whose (generation that wrote it), and the SHA-256 of its manifest."""

    step: int
    generation: GenerationId
    digest: str


@dataclass(frozen=True)
class Member:
    """One agent of a generation. `agent` grows with every restart of the container in the same pod."""

    slot: int
    agent: int
    pod_uid: str
    address: str
    processes: int
    copies: str = ""
    """`host:port` where it takes copies of what others have staged; empty where it takes none."""
    node: str = ""
    """Equal on one node; empty where nothing is copied."""


@dataclass(frozen=True)
class Generation:
    """Who trains together. `members` is in node-rank order; ranks follow from it (`first_rank`).

    On the wire `members` is empty where the other side has said that it holds this generation (`brief`): with a thousand nodes
    all of them in every heartbeat would be a hundred megabytes a second.
    """

    id: GenerationId
    parent: GenerationId | None
    members: tuple[Member, ...]
    cause: Cause
    replicate: int = 0
    """How many ranks hold the same shard, as planned for this many members; 0 where nothing was planned."""

    @property
    def world_size(self) -> int:
        return sum(m.processes for m in self.members)

    def node_rank(self, slot: int) -> int | None:
        """The node rank of a slot, or None where the slot is no member."""
        return self._node_ranks.get(slot)

    def member(self, slot: int) -> Member | None:
        """The member in this slot."""
        node_rank = self._node_ranks.get(slot)
        return None if node_rank is None else self.members[node_rank]

    @cached_property
    def _node_ranks(self) -> dict[int, int]:
        return {member.slot: i for i, member in enumerate(self.members)}

    def brief(self, *known: Generation | None) -> Generation:
        """What is sent to somebody who holds these: of a generation that is among them its id is enough."""
        held = any(one is not None and one.id == self.id for one in known)
        return replace(self, members=()) if held else self

    def whole(self, *known: Generation | None) -> Generation | None:
        """What was sent, with its members again; None where that generation is not among the known ones."""
        if self.members:
            return self
        return next((one for one in known if one is not None and one.id == self.id), None)

    def first_rank(self, node_rank: int) -> int:
        return sum(m.processes for m in self.members[:node_rank])


# --- coordinator -> agent -------------------------------------------------------------------------------------------


class Do(StrEnum):
    """What an agent shall do now. Orders are level-based: the same order twice changes nothing."""

    WAIT = "Wait"  # hold no ranks: a spare, or not enough agents yet
    PREPARE = (
        "Prepare"  # first member only: open the generation on the storage, host its store, start no rank
    )
    RUN = "Run"  # run the ranks of `generation`; end those of any older one at once
    STOP = "Stop"  # go on to `stop_after`, save, stop; scripts that do not listen get SIGTERM and half the grace period
    FINISH = "Finish"  # the job is over: end everything, exit 0


@dataclass(frozen=True)
class Order:
    """What one agent shall do. `version` grows with every change, so that an agent can wait for the next one."""

    protocol: int
    incarnation: int
    version: int
    do: Do
    generation: Generation | None = None
    store: str = ""
    """`host:port` of the generation's store; known from RUN on."""
    resume: ResumePoint | None = None
    refused: tuple[str, ...] = ()
    """PREPARE: digests of manifests that could not be loaded; choose an older step."""
    save_at: int = 0
    stop_after: int = 0
    """Step after which ranks save and stop; 0 is never."""
    end_leaving: bool = False
    """STOP: this agent is the one that leaves, and exits when its ranks have ended."""
    restarts_left: int = 0
    """RUN: what torchrun may spend by itself (`launcher.kind: Torchrun`)."""
    peers: tuple[str, ...] = ()
    """To an agent that is STARTING: measuring servers of others, for its preflight; at most two."""
    heartbeat_s: float = HEARTBEAT_S
    """Report at least this often."""


# --- agent -> coordinator -------------------------------------------------------------------------------------------


class AgentPhase(StrEnum):
    STARTING = "Starting"  # the zygote is still importing
    IDLE = "Idle"  # ready, no ranks
    PREPARED = "Prepared"  # `generation` is open on the storage, its store listens
    RUNNING = "Running"  # ranks of `generation` are alive or have exited by themselves
    STOPPED = "Stopped"  # ranks of `generation` have ended as asked, pending commits are done
    FAILED = "Failed"  # `generation` could not be prepared; see `error`


class RankPhase(StrEnum):
    """What a rank says it is doing (`stormjib_runtime.page`). UNKNOWN for a script that says nothing."""

    UNKNOWN = "Unknown"
    START = "Start"
    STEP = "Step"
    DATA = "Data"
    EVALUATION = "Evaluation"
    CHECKPOINT = "Checkpoint"
    END = "End"


@dataclass(frozen=True)
class RankState:
    """One rank as its agent sees it, from outside: page, /proc, exit status."""

    rank: int
    exit: int | None = None
    """None while it runs; else the exit code, negative for a signal, as in `subprocess`."""
    step: int = -1
    """Last finished step; -1 until the step clock was written."""
    step_age_s: float = 0.0
    """Seconds since the step clock last moved, on the agent's clock."""
    median_step_s: float = 0.0
    phase: RankPhase = RankPhase.UNKNOWN
    listens: bool = False
    """The script reads save_at and stop_after from the page."""
    process: str = "R"
    """State letter of /proc/PID/stat; T is stopped, Z is a zombie."""
    process_age_s: float = 0.0
    """Seconds the state has been T, t, Z or D."""
    idle_s: float = 0.0
    """Seconds in which the whole process used no CPU time worth the name (< 5 % of a core)."""
    loss: float | None = None
    last_lines: str = ""
    """Last output lines, at most 1 KiB; filled when it exited."""


@dataclass(frozen=True)
class Saving:
    """What saves have cost in this generation, for metrics only. Of several ranks the slowest counts, and bytes and failures are added."""

    saves: int = 0
    """Steps that are durable."""
    failures: int = 0
    in_flight: int = 0
    bytes: int = 0
    lost_s: float = 0.0
    """That training waited, in all calls and before all optimizers."""
    call_s: float = 0.0
    """Of the newest durable save, as those that follow; from its call on."""
    wait_s: float = 0.0
    staged_s: float = 0.0
    durable_s: float = 0.0


@dataclass(frozen=True)
class StorageFinding:
    """The highest generation found on the storage, and the job that wrote it."""

    generation: GenerationId
    job_uid: str


@dataclass(frozen=True)
class Report:
    """All that an agent knows, whole each time, so that a lost report costs nothing."""

    protocol: int
    job_uid: str
    incarnation: int
    """Highest incarnation of a coordinator that this agent has obeyed; 0 at first."""
    slot: int
    agent: int
    pod_uid: str
    address: str
    processes: int
    phase: AgentPhase
    order_version: int = 0
    generation: Generation | None = None
    """The generation that `phase` speaks of."""
    store: str = ""
    resume: ResumePoint | None = None
    """PREPARED: what the storage offers to resume from; RUNNING: what the ranks were told."""
    ranks: tuple[RankState, ...] = ()
    committed: ResumePoint | None = None
    """First member: the newest step committed by this generation."""
    saving: Saving | None = None
    """None before the first save of this generation, and of scripts that do not tell."""
    storage: StorageFinding | None = None
    leaving: bool = False
    """SIGTERM came: a planned leave."""
    preflight: str = ""
    """What the preflight found wrong with the node: such an agent stays STARTING, and is not to be used."""
    measures: str = ""
    """`host:port` of this agent's measuring server; empty where it has none."""
    copies: str = ""
    node: str = ""
    """As in `Member`, of the generation that is begun next."""
    copied: int = -1
    """Newest step of this generation of which a copy lies on another node; -1 where none does. For metrics only."""
    error: str = ""
    events: tuple[str, ...] = ()
    """Short facts for a human, such as `ZygoteUnfit: ...`; the operator turns new ones into Events."""

    @cached_property
    def ended(self) -> tuple[RankState, ...]:
        """The ranks that have exited."""
        return tuple(rank for rank in self.ranks if rank.exit is not None)

    @cached_property
    def halted(self) -> tuple[RankState, ...]:
        """The living ranks of which the kernel says that they are stopped or zombies."""
        return tuple(rank for rank in self.ranks if rank.exit is None and rank.process in ("T", "Z"))


# --- operator -> coordinator ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Hang:
    """Backstop for a rank that stops stepping: age > max(factor_percent / 100 * median step, floor_s)."""

    factor_percent: int = 500
    floor_s: float = 60.0
    restart: bool = True


@dataclass(frozen=True)
class Bounds:
    """What the coordinator may do on its own. It acts only inside the newest one that it holds."""

    version: int
    incarnation: int
    spec_generation: int
    replicas: int
    min_replicas: int
    processes: int
    slots: dict[str, str] = field(default_factory=dict)
    """slot (decimal) -> uid of the pod that may register for it."""
    excluded: tuple[str, ...] = ()
    """Pod uids that may be no member, although registered."""
    restarts_left: int = 0
    counted_above: GenerationId = GenerationId(0, 0)
    """`restarts_left` is already less by every counted history entry up to this generation."""
    backoff_initial_s: float = 1.0
    backoff_max_s: float = 60.0
    shrink_after_s: float = 5.0
    """A member whose container died (not silent) may take this long to come back before the job shrinks."""
    hang: Hang = Hang()
    rules: tuple[Rule, ...] = ()
    """What to do about verdicts, before the defaults; the first match wins."""
    interval_steps: int = 0
    keep_last: int = 3
    suspend: bool = False
    finish: bool = False
    """The operator has recorded Complete or Failed: agents may exit."""
    sizes: tuple[int, ...] = ()
    """How many members a generation may have; empty: any number from `min_replicas` to `replicas`."""
    replicate: dict[str, int] = field(default_factory=dict)
    """members (decimal) -> how many ranks hold the same shard in a generation of that many; empty where nothing was planned."""

    def fitting(self, count: int) -> int:
        """The largest number of members that may be had of `count`; 0 where `sizes` know none so small."""
        most = min(count, self.replicas)
        return max((size for size in self.sizes if size <= most), default=0) if self.sizes else most


# --- coordinator -> operator ----------------------------------------------------------------------------------------


class JobPhase(StrEnum):
    WAITING = "Waiting"  # too few agents, or no bounds yet
    STARTING = "Starting"  # a generation is being prepared, or has not finished its first step
    RUNNING = "Running"
    STOPPING = "Stopping"  # planned
    BACKOFF = "Backoff"
    SUSPENDED = "Suspended"
    COMPLETE = "Complete"
    EXHAUSTED = "Exhausted"  # the restart budget is spent


@dataclass(frozen=True)
class Fault:
    """What ended a generation: evidence for people. `message` is at most 1 KiB."""

    cause: Cause
    slot: int | None = None
    rank: int | None = None
    message: str = ""
    verdict: Verdict | None = None
    """Of the health engine, where that is why."""


@dataclass(frozen=True)
class HistoryEntry:
    """One generation as it began. Append-only, in growing order of id."""

    generation: Generation
    resume: ResumePoint | None
    counted: bool
    fault: Fault | None = None


@dataclass(frozen=True)
class AgentView:
    """One registered agent as the coordinator sees it."""

    slot: int
    agent: int
    pod_uid: str
    phase: AgentPhase
    member: bool
    silent_s: float = 0.0
    leaving: bool = False


@dataclass(frozen=True)
class JobState:
    """What the operator derives status, budgets and the replacing of pods from."""

    protocol: int
    job_uid: str
    incarnation: int
    version: int
    phase: JobPhase
    bounds_version: int = 0
    generation: Generation | None = None
    history: tuple[HistoryEntry, ...] = ()
    agents: tuple[AgentView, ...] = ()
    step: int = -1
    loss: float | None = None
    committed: ResumePoint | None = None
    storage: StorageFinding | None = None
    last_fault: Fault | None = None
    events: tuple[str, ...] = ()
    verdicts: tuple[Verdict, ...] = ()
    """Of the health engine about the newest generations, newest last; at most 16."""
    unwanted: tuple[str, ...] = ()
    """Pods (uid) that the rules want replaced by pods on other nodes; at most 64."""
    accusations: tuple[Accusation, ...] = ()
    """Nodes that the rules ask to isolate; at most 16, kept until the incarnation ends."""


# --- names ----------------------------------------------------------------------------------------------------------


INTERVAL_AUTO = "auto"


class Env(StrEnum):
    """Environment names. The operator writes the first group into pods; the agent writes the second for ranks."""

    COORDINATOR = "STORMJIB_COORDINATOR"  # http://host:port
    TOKEN = "STORMJIB_TOKEN"  # HMAC(key, uid/agent), from the job's Secret
    OPERATOR_TOKEN = "STORMJIB_OPERATOR_TOKEN"  # coordinator only: HMAC(key, uid/operator)
    JOB_UID = "STORMJIB_JOB_UID"
    NAMESPACE = "STORMJIB_NAMESPACE"
    JOB = "STORMJIB_JOB"
    INCARNATION = "STORMJIB_INCARNATION"  # coordinator only
    SLOT = "STORMJIB_SLOT"
    POD_UID = "STORMJIB_POD_UID"
    POD_IP = "STORMJIB_POD_IP"
    PROCESSES = "STORMJIB_PROCESSES"
    LAUNCHER = "STORMJIB_LAUNCHER"  # Stormjib | Torchrun
    COMMAND = "STORMJIB_COMMAND"  # JSON list: what follows `torchrun`
    RUN_DIR = "STORMJIB_RUN_DIR"  # emptyDir that outlives a container restart
    GRACE_S = "STORMJIB_GRACE_S"  # terminationGracePeriodSeconds
    PREFLIGHT = "STORMJIB_PREFLIGHT"  # On | Off: check the node before the slot first joins
    CHECKPOINT_ROOT = "STORMJIB_CHECKPOINT_ROOT"  # <folder or URL>/<namespace>/<job>; also for ranks
    CHECKPOINT_KEY_FILE = "STORMJIB_CHECKPOINT_KEY_FILE"  # what records are signed with; also for ranks
    CHECKPOINT_INTERVAL = "STORMJIB_CHECKPOINT_INTERVAL"  # steps, or INTERVAL_AUTO; also for ranks
    CHECKPOINT_KEEP = "STORMJIB_CHECKPOINT_KEEP"  # also for ranks
    CHECKPOINT_PEERS = (
        "STORMJIB_CHECKPOINT_PEERS"  # 0 | 1: nodes that hold copies of what is staged on this one
    )
    INTEGRITY_NORMS = "STORMJIB_INTEGRITY_NORMS"  # On | Off; for ranks
    INTEGRITY_DIGESTS = "STORMJIB_INTEGRITY_DIGESTS"  # On | Off; for ranks
    INTEGRITY_ON_SPIKE = "STORMJIB_INTEGRITY_ON_SPIKE"  # stormjib_health.verdict.OnSpike; for ranks
    INTEGRITY_ON_RECURRENCE = "STORMJIB_INTEGRITY_ON_RECURRENCE"  # OnRecurrence; for ranks

    GENERATION = "STORMJIB_GENERATION"  # 2.7
    REPLICATE = "STORMJIB_REPLICATE"  # how many ranks hold the same shard; 0: nothing was planned
    RESUME = "STORMJIB_RESUME"  # JSON of a ResumePoint, or empty
    PAGE_DIR = "STORMJIB_PAGE_DIR"  # pages are PAGE_DIR/<local rank>
    MEMORY_DIR = "STORMJIB_MEMORY_DIR"  # where ranks stage what they save, so that it outlives them
