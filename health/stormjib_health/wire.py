"""The messages of health: what a rank leaves behind, what an agent says of it, what the coordinator wants of the agent.

A leaf: the standard library only, nothing of ours; `verdict` has what is made of them. Every record is frozen, and
`stormjib_runtime.codec` is its outer form. Nothing here is a time of day or a point on somebody's clock: all times are
ages and durations, measured on the clock of whoever saw both ends, because no rule may compare the clocks of two hosts.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum, StrEnum
from functools import cached_property
from itertools import chain, repeat
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

# --- what a rank records --------------------------------------------------------------------------------------------


class Kind(IntEnum):
    """What was called on a process group. Names as torch's hooks give them; values are stored, so they never change."""

    OTHER = 0
    ALL_REDUCE = 1
    ALL_GATHER = 2
    REDUCE_SCATTER = 3
    BROADCAST = 4
    REDUCE = 5
    GATHER = 6
    SCATTER = 7
    ALL_TO_ALL = 8
    BARRIER = 9
    SEND = 10
    RECV = 11

    @property
    def point_to_point(self) -> bool:
        """Between two ranks: counted apart from collectives, because healthy ranks differ in it."""
        return self in (Kind.SEND, Kind.RECV)


class Phase(IntEnum):
    """What a rank is doing, beside its collectives. Values are stored, so they never change."""

    UNKNOWN = 0
    START = 1
    STEP = 2
    DATA = 3
    FORWARD = 4
    BACKWARD = 5
    OPTIMIZER = 6
    CHECKPOINT = 7
    EVALUATION = 8
    COMPILE = 9
    END = 10

    @property
    def may_last(self) -> bool:
        """Legally longer than any step: silence in it is no evidence."""
        return self in (
            Phase.START,
            Phase.DATA,
            Phase.CHECKPOINT,
            Phase.EVALUATION,
            Phase.COMPILE,
            Phase.END,
        )


@dataclass(frozen=True)
class Span:
    """Ranks at equal distance. Groups are rows and columns of a mesh, so one span tells of nearly every group all its ranks."""

    first: int
    count: int = 1
    step: int = 1

    @property
    def ranks(self) -> Iterable[int]:
        """Each of them."""
        if not self.step:
            return repeat(self.first, self.count)
        return range(self.first, self.first + self.count * self.step, self.step)


@dataclass(frozen=True)
class Group:
    """One process group. `key` is equal on all its ranks, and of no other group of the same generation."""

    key: int
    """48 bits of a hash of name, ranks and how many groups of that name and these ranks came before it."""
    name: str
    spans: tuple[Span, ...]

    @classmethod
    def of(cls, key: int, name: str, ranks: Sequence[int]) -> Group:
        """The group of these ranks; the same spans for the same ranks."""
        return cls(key, name, tuple(_spans(ranks)))

    @property
    def size(self) -> int:
        """How many ranks there are, without making a list of them."""
        return sum(span.count for span in self.spans)

    @cached_property
    def ranks(self) -> tuple[int, ...]:
        """Global ranks, in the order of the group. What somebody else says may be so long that `size` should be asked first."""
        return tuple(chain.from_iterable(span.ranks for span in self.spans))


def _spans(ranks: Sequence[int]) -> Iterable[Span]:
    """The first span as long as it can be, then the next."""
    start = 0
    while start < len(ranks):
        end = start + 1
        step = ranks[end] - ranks[start] if end < len(ranks) else 1
        while end < len(ranks) and ranks[end] - ranks[end - 1] == step:
            end += 1
        yield Span(ranks[start], end - start, step)
        start = end


# --- agent -> coordinator -------------------------------------------------------------------------------------------


PAIRS = 8
"""Of one rank in one group. A pipeline has two; of more the newest are told."""


@dataclass(frozen=True)
class Pair:
    """Point-to-point calls of one rank with one other, issued so far in one group."""

    peer: int
    """Global rank."""
    sent: int
    received: int


@dataclass(frozen=True)
class Call:
    """Where one rank stands in one group."""

    group: int
    """`Group.key`."""
    issued: int
    """Collectives issued so far, the newest included; 0 for none."""
    kind: int = 0
    """`Kind` of the newest one."""
    age_s: float = 0.0
    """Since the newest one was issued."""
    started: bool = True
    """False where the device is known not to have started it (NCCL); Gloo starts at once."""
    done: bool = False
    """Known to be over: its end was taken, or its rank has gone on. False is "not known to be"."""
    signature: int = 0
    """CRC-32 of kind, dtype and elements of call number `signed`; 0 where none was read yet."""
    signed: int = 0
    peer: int = -1
    """Global rank of the newest point-to-point call's other side; -1 for none."""
    pairs: tuple[Pair, ...] = ()
    """The ranks that it last sent to or received from, at most `PAIRS`."""


@dataclass(frozen=True)
class Timing:
    """One call whose end was taken: the calls with which lateness is told."""

    group: int
    number: int
    """Which collective of the group, counted from 1."""
    wait_s: float
    """From issue to end. Whoever comes last waits least."""


@dataclass(frozen=True)
class RankSample:
    """One rank as its agent sees it now. Lists hold what is new or notable since the last accepted sample."""

    rank: int
    step: int = -1
    """Last finished step; -1 before the first."""
    step_age_s: float = 0.0
    steps_s: tuple[float, ...] = ()
    """Durations of the steps finished since the last sample, at most 8, the newest last."""
    own_s: tuple[float, ...] = ()
    """Of the same steps, the rank's own work as far as it is known: from an end that was taken to the next call. Nobody
    else has a part in it, as in a wait."""
    steps_to: int = -1
    """Number of the newest of these steps: the rank's records tell of a step with the first call of the next."""
    phase: int = 0
    """`Phase`."""
    phase_age_s: float = 0.0
    process: str = "R"
    """State letter of /proc/PID/stat; T is stopped, Z a zombie, D waits for a device, X is gone."""
    process_age_s: float = 0.0
    """Since when the letter is T, Z or D; 0 in any other state."""
    idle_s: float = 0.0
    """Since when the whole process has used less than 5 % of a core."""
    wchan: str = ""
    """Where in the kernel its main thread sleeps, as far as /proc tells."""
    unread: int = 0
    """Sockets whose received bytes it has not taken over the last three samples: it does not run."""
    throttled_s: float = 0.0
    """Time that its cgroup was refused the processor since the last sample."""
    queued_s: float = 0.0
    """Time that its main thread was ready to run and waited for a processor since then."""
    calls: tuple[Call, ...] = ()
    timings: tuple[Timing, ...] = ()
    lost: int = 0
    """Records that were overwritten before they were read."""


@dataclass(frozen=True)
class Edge:
    """One TCP connection of a rank, from the kernel's own books. Counts are since it was last told, `over_s` ago: healthy
    ones of a large agent are told in turn."""

    rank: int
    """Who holds this end."""
    local: str
    """`address:port`, IPv6 in brackets; the other end reports the same pair the other way round."""
    remote: str
    sent: int = 0
    """Bytes sent, repeated ones included."""
    received: int = 0
    retransmitted: int = 0
    busy_s: float = 0.0
    """Time with unacknowledged data in flight or waiting to be sent."""
    rtt_s: float = 0.0
    rto_s: float = 0.0
    backoff: int = 0
    """How often in a row the retransmission timer has expired."""
    unacked: int = 0
    """Segments in flight; 1 where there should be some, and they cannot even leave this node."""
    last_ack_s: float = 0.0
    unread: int = 0
    """Bytes received that the rank has not taken."""
    unsent: int = 0
    """Bytes that the rank has written and the peer has not acknowledged."""
    over_s: float = 0.0
    """Time that the counts cover."""


@dataclass(frozen=True)
class Stack:
    """Where a rank's threads are, as faulthandler wrote it; at most 4 KiB. For a stopped process: state and wchan."""

    rank: int
    text: str


class Doubt(IntEnum):
    """What made a rank doubt a result. Values are stored, so they never change."""

    NORM = 1  # one rank's gradient norm before mixing is far from the others'
    NOT_FINITE = 2  # NaN or infinity in one rank's gradient before mixing
    DIGEST = 3  # replicas of one shard differ; the minority is accused
    SPIKE = 4  # loss or norm of all jumped; nobody is accused yet
    REPLAY_DIFFERS = 5  # the same step gave other bits the second time: hardware
    REPLAY_AGREES = 6  # the same step gave the same bits: data or program


@dataclass(frozen=True)
class Finding:
    """What one rank found out about the numbers. Every rank of a vote says the same of the same step."""

    rank: int
    """Who says it."""
    kind: int
    """`Doubt`."""
    step: int
    accused: int = -1
    """Global rank; -1 for nobody."""
    value: float = 0.0
    typical: float = 0.0
    """Of the others, or of before."""
    votes: int = 0
    """DIGEST: replicas that agreed with each other against the accused."""


@dataclass(frozen=True)
class Sample:
    """What one agent says of its ranks."""

    protocol: int
    job_uid: str
    slot: int
    agent: int
    generation: str
    """`2.7`; what is sampled of another generation is refused."""
    number: int
    """Of this agent's samples, growing."""
    over_s: float
    """Since the last accepted sample."""
    ranks: tuple[RankSample, ...] = ()
    edges: tuple[Edge, ...] = ()
    """Connections of ranks, as far as they moved or are in trouble; at most 64, the worst first."""
    groups: tuple[Group, ...] = ()
    """Those that the coordinator has not acknowledged."""
    stacks: tuple[Stack, ...] = ()
    findings: tuple[Finding, ...] = ()
    answers: tuple[Answer, ...] = ()
    measures: str = ""
    """`host:port` of this agent's measuring server; empty where it has none."""


# --- coordinator -> agent -------------------------------------------------------------------------------------------


class CheckKind(StrEnum):
    """What an agent can measure when it is asked to."""

    TRANSFER = "Transfer"  # bursts and pings from this slot to `peer`
    COMPUTE = "Compute"  # a fixed matrix product with a hash of its result, in a child of the zygote


@dataclass(frozen=True)
class Check:
    """One measurement that confirms or clears a suspicion."""

    id: int
    kind: CheckKind
    peer: str = ""
    """TRANSFER: `host:port` of the other agent's measuring server."""
    rank: int = -1
    """COMPUTE: whose device."""
    limit_s: float = 1.0


@dataclass(frozen=True)
class Answer:
    """What a check found. `ok` is False where it could not be done, and `text` says why."""

    id: int
    ok: bool
    seconds: float = 0.0
    """TRANSFER: for the bursts, all like the median one, less what the ends waited for a processor; COMPUTE: for the product,
    by the clock."""
    cpu_s: float = 0.0
    """COMPUTE on a CPU: processor time of the product, which neighbours on a shared core lengthen less."""
    bytes: int = 0
    again: int = 0
    """TRANSFER: segments that were sent more than once."""
    rtt_s: float = 0.0
    """The shortest of the pings."""
    digest: str = ""
    """COMPUTE: of the result's bits."""
    versions: str = ""
    """COMPUTE: device and libraries; digests are compared between equal ones only."""
    text: str = ""
    turned_away: bool = False
    """TRANSFER: the peer took the connection and hung up before the first byte: it is of another version, too busy, or ending. So
    this says nothing of the path."""
    queued_s: float = 0.0
    """TRANSFER: what both ends waited for a processor, in all bursts together. Where that is more than `seconds`, these are a guess."""


@dataclass(frozen=True)
class Wish:
    """The answer to a sample: what the coordinator wants of this agent."""

    interval_s: float = 0.2
    """Between two samples while nothing is suspicious."""
    groups: bool = False
    """Send all groups again: this coordinator does not know them."""
    stacks: tuple[int, ...] = ()
    """Ranks whose stacks are wanted."""
    checks: tuple[Check, ...] = ()
