"""The words of a judgement: what the engine finds, what follows from it, and what a job says of a node.

A leaf: the standard library only, nothing of ours; of health, the operator knows no more than this. Every record is frozen,
and `stormjib_runtime.codec` is its outer form.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

# --- what the engine finds ------------------------------------------------------------------------------------------


class Syndrome(StrEnum):
    """C4's four (arXiv 2406.04594), the crash, corruption, and what is nobody's hardware."""

    CRASH = "Crash"
    COMMUNICATION_HANG = "CommunicationHang"
    NON_COMMUNICATION_HANG = "NonCommunicationHang"
    COMMUNICATION_SLOW = "CommunicationSlow"
    NON_COMMUNICATION_SLOW = "NonCommunicationSlow"
    CORRUPTION = "Corruption"
    DESYNC = "Desync"  # ranks call different things: the program's fault, never a node's
    CONGESTION = "Congestion"  # slow everywhere
    IMBALANCE = "Imbalance"  # slow somewhere else each step


class Scope(StrEnum):
    """What `Verdict.culprits` are."""

    RANK = "Rank"  # culprits: ranks
    LINK = "Link"  # culprits: two ranks, sender first
    NODE = "Node"  # culprits: slots
    JOB = "Job"  # nobody: no culprits


SURE = 0.6
"""A verdict with less confidence is for reading only, and may be taken back by its own checks."""


@dataclass(frozen=True)
class Verdict:
    """One finding. Immutable; a later look at the same trouble gives a new one with the same `id`."""

    id: int
    """Of the trouble, growing within a generation."""
    syndrome: Syndrome
    scope: Scope
    culprits: tuple[int, ...] = ()
    slots: tuple[int, ...] = ()
    """Slots of the culprits; a link has two."""
    confidence: float = 0.0
    """0 to 1, records and tests of this job together; never by itself a reason to isolate a node."""
    confirmed: bool = False
    """A check, or the kernel's own word (process state), says the same."""
    software: bool = False
    """The program's fault: no node is to be blamed, whatever the rest says."""
    severity: float = 1.0
    """Slow syndromes: step time now over step time before."""
    lasted_s: float = 0.0
    """From the first sign to the verdict."""
    sentence: str = ""
    """For people: `rank 5 issued 1,204 collectives of default_pg, the others 1,205; its process is stopped`."""
    evidence: tuple[Evidence, ...] = ()
    stack: str = ""
    generation: str = ""
    """`2.7`; the coordinator writes it."""


@dataclass(frozen=True)
class Evidence:
    """One row of the table under the sentence."""

    name: str
    """Such as `issued`, `wait ms`, `backoff`."""
    who: str
    """Such as `rank 5` or `rank 2 -> rank 1`."""
    value: str
    others: str = ""
    """The same of the others, or of before."""


class Action(StrEnum):
    """What can be done about a verdict, from the mildest on."""

    NOTE = "Note"  # say it, and go on
    RESTART = "Restart"  # the next generation, same members
    REPLACE = (
        "Replace"  # without the culprit's pod: a spare takes its rank, the operator makes another elsewhere
    )
    ISOLATE = "Isolate"  # as Replace, and ask that the node be taken out for everybody
    SHRINK = "Shrink"  # without the culprit's pod, on fewer nodes; no spare is spent
    ROLL_BACK = "RollBack"  # restart from the checkpoint before the newest
    FAIL = "Fail"  # end the job


@dataclass(frozen=True)
class Rule:
    """One line of policy. Lists that are empty match anything."""

    action: Action
    syndromes: tuple[Syndrome, ...] = ()
    scopes: tuple[Scope, ...] = ()
    confirmed: bool = False
    """Only verdicts that a check, or the kernel's own word, confirmed."""
    severity: float = 0.0
    """Only where a step takes at least so many times what it took before."""
    strikes: int = 0
    """Only if at least so many verdicts have named this node in this job, this one included."""


@dataclass(frozen=True)
class Accusation:
    """A job asks that a node be isolated. The operator finds the node by its own records of slot and pod, and weighs it."""

    id: int
    """Growing within an incarnation of the coordinator."""
    generation: str
    """`2.7`: in which the verdict was found."""
    slot: int
    pod_uid: str
    verdict: Verdict
    weight: float
    """At most 0.9."""


class OnSpike(StrEnum):
    """What follows a jump of loss or gradient norm that came again, bit for bit, when its step was done again."""

    NOTIFY = "Notify"  # report it, and go on
    SKIP = "Skip"  # leave this step's batch out
    FAIL = "Fail"
    REPLAY = "Replay"  # go back to a trusted checkpoint and see whether it comes again


class OnRecurrence(StrEnum):
    """What follows a jump that came again after going back."""

    SKIP = "Skip"
    FAIL = "Fail"
