"""What the laboratory says: which fault, what the right answer is, what proves that it fired."""

from __future__ import annotations

from dataclasses import dataclass


class FaultError(Exception):
    """Root of what goes wrong here."""


class Refused(FaultError):
    """This fault cannot be injected here; the text says why and what would be needed."""


class NotFired(FaultError):
    """The fault was injected, and nothing in the world shows it."""


CRASH = "Crash"
COMMUNICATION_HANG = "CommunicationHang"
NON_COMMUNICATION_HANG = "NonCommunicationHang"
COMMUNICATION_SLOW = "CommunicationSlow"
NON_COMMUNICATION_SLOW = "NonCommunicationSlow"
CORRUPTION = "Corruption"
DESYNC = "Desync"
CONGESTION = "Congestion"
IMBALANCE = "Imbalance"
NONE = ""
"""No syndrome: whatever is said against anybody is wrong."""

RANK, LINK, NODE, JOB = "Rank", "Link", "Node", "Job"


@dataclass(frozen=True)
class Answer:
    """One answer that is right. `who` are ranks for RANK, slots for LINK (either order) and NODE, empty for JOB."""

    scope: str
    who: tuple[int, ...] = ()


@dataclass(frozen=True)
class Truth:
    """What a perfect judge would say."""

    syndrome: str
    scope: str
    culprits: tuple[int, ...] = ()
    """Ranks for RANK and LINK (sender first), slots for NODE."""
    software: bool = False
    """The program's fault: no node is to be blamed."""
    answers: tuple[Answer, ...] = ()
    """All answers that count as exact. More than one where nobody can tell them apart from outside, as a link and its end
    between two nodes alone."""
    slots: tuple[int, ...] = ()
    """Slots that hold the culprits: the only ones that may lose their node."""

    @property
    def harmless(self) -> bool:
        """Nobody may be blamed, whatever is seen."""
        return self.scope == JOB


@dataclass(frozen=True)
class Draw:
    """One fault with everything that chance decided: plain data, so that a trial can be repeated."""

    fault: str
    victim: int
    """Rank."""
    peer: int = -1
    """Rank at the other end of a link."""
    severity: float = 1.0
    """What it means is said by the fault: wanted step time over the normal one, a probability, seconds."""
    seed: int = 0
