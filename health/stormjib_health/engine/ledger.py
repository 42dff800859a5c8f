"""Troubles and their numbers: one trouble keeps its id from its first sign to its end, and is told again only on a change."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from stormjib_health.verdict import Verdict


@dataclass
class Trouble:
    """One trouble that is going on."""

    id: int
    verdict: Verdict
    grave: bool
    """Whether it has ever been so bad that an action may hang on it."""


class Ledger:
    """Gives out ids. One trouble of each family (crash, hang, slow) at a time."""

    def __init__(self) -> None:
        self._next = 1
        self._open: dict[str, Trouble] = {}

    def tell(self, family: str, draft: Verdict, act_ratio: float) -> Verdict | None:
        """The verdict with its id; None where it says nothing new."""
        trouble, grave = self._open.get(family), draft.severity >= act_ratio
        if trouble is None:
            trouble = self._open[family] = Trouble(self._next, draft, grave)
            self._next += 1
        elif _told(trouble.verdict) == _told(draft) and trouble.grave >= grave:
            return None  # on a noisy machine a slowdown crosses the ratio again and again: only the first time is news
        trouble.verdict, trouble.grave = replace(draft, id=trouble.id), trouble.grave or grave
        return trouble.verdict

    def close(self, family: str) -> None:
        """It is over: the next of its family is another one."""
        self._open.pop(family, None)

    def standing(self, family: str) -> Verdict | None:
        """The newest verdict of the trouble that is going on."""
        trouble = self._open.get(family)
        return trouble.verdict if trouble else None


def _told(verdict: Verdict) -> tuple[object, ...]:
    """What a reader would call another finding: not times and counts that run on."""
    return (
        verdict.syndrome,
        verdict.scope,
        verdict.culprits,
        verdict.confirmed,
        verdict.software,
        round(verdict.confidence, 1),
        bool(verdict.stack),
    )
