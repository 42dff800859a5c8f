"""Lines for whoever watches: one JSON object per step and per event, from rank 0 alone, each one whole line."""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING

from stormjib_health.wire import Doubt

if TYPE_CHECKING:
    from stormjib_health.wire import Finding


@dataclass(frozen=True)
class Reporter:
    """Prints for rank 0 and keeps silent for the others."""

    rank: int

    def step(self, **facts: float | str) -> None:
        """One finished step; the key `step` comes first, and there is no `event`."""
        self._print(facts)

    def event(self, event: str, **facts: object) -> None:
        """Anything else."""
        self._print({"event": event, **facts})

    def finding(self, finding: Finding) -> None:
        """Something wrong with the numbers. Every rank finds the same."""
        said = Doubt(finding.kind).name.title().replace("_", "")
        facts = {"accused": finding.accused, "value": finding.value, "typical": finding.typical}
        self.event("finding", kind=said, step=finding.step, votes=finding.votes, **facts)

    def _print(self, facts: dict[str, object] | dict[str, float | str]) -> None:
        if self.rank == 0:
            sys.stdout.write(json.dumps(facts, separators=(",", ":")) + "\n")
            sys.stdout.flush()
