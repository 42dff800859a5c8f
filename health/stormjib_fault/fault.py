"""The form of every fault: drawn, armed, injected, proved, healed."""

from __future__ import annotations

import math
import random
import time
from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, ClassVar

from stormjib_fault import words
from stormjib_fault.words import Answer, Draw, NotFired, Truth

if TYPE_CHECKING:
    from stormjib_fault.world import Place, World

POLL_S = 0.01


class Fault(ABC):
    """One fault at one place. `arm` may be slow and must be invisible; `inject` is quick; `heal` may be called in any state."""

    name: ClassVar[str]
    row: ClassVar[str]
    """F1-F17 of the laboratory's table (docs/benchmarks/health.md)."""
    severities: ClassVar[tuple[float, float]] = (1.0, 1.0)
    """Drawn between these, evenly on a logarithmic scale."""
    least_ranks: ClassVar[int] = 2
    early: ClassVar[bool] = False
    """To be injected before the ranks start."""
    laboratory: ClassVar[bool] = False
    """Needs more than exec in a pod can do."""
    downstream: ClassVar[bool] = False
    """The peer is who gets the victim's data: Gloo's ring sends from rank r to rank r - 1."""

    def __init__(self, world: World, draw: Draw) -> None:
        self.world = world
        self.draw = draw
        self.struck_at = 0.0
        """This machine's monotonic seconds, where a fault takes its time from `inject` to the harm; else 0."""

    @classmethod
    def drawn(cls, seed: int, ranks: int) -> Draw:
        """Victim, peer and severity from a seed. The peer is the victim's neighbour: on other links of a ring nothing flows."""
        rng = random.Random(f"{cls.name}/{ranks}/{seed}")
        victim = rng.randrange(ranks)
        low, high = (math.log(each) for each in cls.severities)
        severity = round(math.exp(rng.uniform(low, high)), 4)
        side = -1 if cls.downstream else rng.choice((-1, 1))
        return Draw(cls.name, victim, (victim + side) % ranks, severity, seed)

    @property
    def victim(self) -> Place:
        """Where the victim is."""
        return self.world.place(self.draw.victim)

    @property
    def peer(self) -> Place:
        """Where the other end of the link is."""
        return self.world.place(self.draw.peer)

    @abstractmethod
    def truth(self) -> Truth:
        """What a perfect judge would say."""

    def arm(self) -> None:  # noqa: B027  most faults need no preparation
        """Prepare what takes time."""

    @abstractmethod
    def inject(self) -> None:
        """Begin."""

    @abstractmethod
    def heal(self) -> None:
        """End it, and remove what was made for it. Harmless when nothing was begun."""

    @abstractmethod
    def fired(self) -> str:
        """What in the world shows that it fired; empty where nothing does."""

    def prove(self, limit_s: float = 2.0) -> str:
        """`fired`, as soon as it says something. Raises NotFired after `limit_s`."""
        deadline = time.monotonic() + limit_s
        while not (proof := self.fired()):
            if time.monotonic() >= deadline:
                raise NotFired(f"{self.name}: nothing shows it after {limit_s:g} s")
            time.sleep(POLL_S)
        return proof

    # --- truths that many share -------------------------------------------------------------------------------------

    def rank_truth(self, syndrome: str, *, software: bool = False) -> Truth:
        """The victim rank alone."""
        rank, slot = self.draw.victim, self.victim.slot
        return Truth(syndrome, words.RANK, (rank,), software, (Answer(words.RANK, (rank,)),), (slot,))

    def node_truth(self, syndrome: str) -> Truth:
        """The victim's node. Between two nodes nobody can tell a node from its only link."""
        slot = self.victim.slot
        others = tuple(p.slot for p in self.world.ranks if p.slot != slot)
        answers = [Answer(words.NODE, (slot,))]
        if len(set(others)) == 1:
            answers.append(Answer(words.LINK, tuple(sorted((slot, others[0])))))
        return Truth(syndrome, words.NODE, (slot,), answers=tuple(answers), slots=(slot,))

    def link_truth(self, syndrome: str) -> Truth:
        """The link from victim to peer."""
        slots = (self.victim.slot, self.peer.slot)
        answer = Answer(words.LINK, tuple(sorted(slots)))
        return Truth(syndrome, words.LINK, (self.draw.victim, self.draw.peer), answers=(answer,), slots=slots)

    @staticmethod
    def nobody(syndrome: str = words.NONE) -> Truth:
        """Nobody is to be blamed."""
        return Truth(syndrome, words.JOB, answers=(Answer(words.JOB),))
