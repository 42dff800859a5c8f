"""Faults of the watchers: agents and the coordinator. Collectives go on, so nobody may be blamed for anything."""

from __future__ import annotations

import signal
import threading
from pathlib import Path

from stormjib_fault import proc, words
from stormjib_fault.cgroups import Cgroup
from stormjib_fault.fault import Fault
from stormjib_fault.network import Rules
from stormjib_fault.processes import STOPPED, freeze, is_frozen
from stormjib_fault.words import Answer, Truth


class Watcher(Fault):
    """Something that watches is disturbed."""

    row, laboratory = "F17", True

    def truth(self) -> Truth:
        return self.nobody()

    def arm(self) -> None:
        self._lab = self.world.lab(self.name)
        self._pid = self._lab.agents[self.victim.slot]


class AgentStopped(Watcher):
    """An agent is stopped while its ranks go on."""

    name = "agent-stop"

    def inject(self) -> None:
        proc.send(self._pid, signal.SIGSTOP)

    def heal(self) -> None:
        if hasattr(self, "_pid"):
            proc.send(self._pid, signal.SIGCONT)

    def fired(self) -> str:
        state = proc.state(self._pid)
        return f"agent {self._pid} is in state {state}" if state in STOPPED else ""


class AgentKilled(Watcher):
    """An agent is killed: its zygote ends the ranks, as when a container dies. That is a crash of the slot."""

    name = "agent-kill"

    def truth(self) -> Truth:
        slot = self.victim.slot
        ranks = tuple(p.rank for p in self.world.ranks if p.slot == slot)
        answers = (Answer(words.NODE, (slot,)), Answer(words.RANK, ranks))
        return Truth(words.CRASH, words.NODE, (slot,), answers=answers, slots=(slot,))

    def inject(self) -> None:
        proc.send(self._pid, signal.SIGKILL)

    def heal(self) -> None:
        if hasattr(self, "_pid") and not proc.alive(self._pid):
            self._lab.revive("agent", self.victim.slot)

    def fired(self) -> str:
        return "" if proc.alive(self._pid) else f"agent {self._pid} is dead"


class AgentCut(Rules):
    """An agent cannot reach the coordinator, while its ranks reach each other (row 19)."""

    name, row = "agent-cut", "F17"

    def truth(self) -> Truth:
        return self.nobody()

    def rules(self) -> list[tuple[str, tuple[str, ...]]]:
        address = self.world.lab(self.name).coordinator_address
        return [(self.victim.netns, ("OUTPUT", "-d", address)), (self.victim.netns, ("INPUT", "-s", address))]


class CoordinatorKilled(Watcher):
    """The coordinator is killed, and comes back as a restarted container does."""

    name = "coordinator-kill"

    def inject(self) -> None:
        proc.send(self._lab.coordinator, signal.SIGKILL)
        self._lab.revive("coordinator", -1)

    def heal(self) -> None:
        """It has come back by itself."""

    def fired(self) -> str:
        pid = self._lab.coordinator
        return "" if proc.alive(pid) else f"coordinator {pid} is dead"


class Pause(Watcher):
    """Everything stands still for `severity` seconds, as in a virtual machine that is moved (row 47)."""

    name, severities = "pause", (90.0, 90.0)

    def arm(self) -> None:
        super().arm()
        self._group = Cgroup("freezer", f"{self._lab.prefix}-pause")
        self._over = threading.Event()
        self._proof = ""
        roots = [*self._lab.agents.values(), self._lab.coordinator]
        for pid in [each for root in roots for each in (root, *proc.below(root))]:
            self._group.take(pid)

    def inject(self) -> None:
        """Freeze, wait, thaw: returns when it is over."""
        freeze(self._group, frozen=True)
        self._over.wait(0.1)
        self._proof = is_frozen(self._group)
        self._over.wait(self.draw.severity)
        freeze(self._group, frozen=False)

    def heal(self) -> None:
        if hasattr(self, "_group") and self._group.path.exists():
            freeze(self._group, frozen=False)
            self._group.remove()

    def fired(self) -> str:
        return self._proof


class SkewedClocks(Watcher):
    """Agents and ranks of some nodes live an hour ahead (row 47). The laboratory starts them so."""

    name, early = "skewed-clocks", True

    def inject(self) -> None:
        """It has been so from the beginning."""

    def heal(self) -> None:
        """It stays so."""

    def fired(self) -> str:
        found = {slot: _offset(pid) for slot, pid in self._lab.agents.items()}
        ahead = {slot: seconds for slot, seconds in found.items() if seconds}
        return f"offsets of CLOCK_MONOTONIC by slot: {ahead}" if ahead and len(ahead) < len(found) else ""


def _offset(pid: int) -> int:
    for line in Path(f"/proc/{pid}/timens_offsets").read_text().splitlines():
        clock, seconds, _ = line.split()
        if clock == "monotonic":
            return int(seconds)
    return 0
