"""Faults that a rank does to itself, because an order in its control file says so (`rank.Obedient`)."""

from __future__ import annotations

import random
import signal
from typing import Any, ClassVar

from stormjib_fault import proc, words
from stormjib_fault.fault import Fault
from stormjib_fault.processes import STOPPED, control
from stormjib_fault.rank import ANY
from stormjib_fault.words import Truth

FOREVER_S = 3600.0


class Inside(Fault):
    """One order to the victim."""

    do: ClassVar[str]

    def arm(self) -> None:
        self._control = control(self)
        self._pid = self.victim.pid
        self._before = len(self._control.done(self.draw.victim))

    def inject(self) -> None:
        self._control.order(self.draw.victim, self._pid, self.do, **self.how())

    def heal(self) -> None:
        if hasattr(self, "_control"):
            self._control.cancel(self.draw.victim)

    def fired(self) -> str:
        done = self._control.done(self.draw.victim)[self._before :]
        return "" if not done else f"rank {self.draw.victim} said: {done[0]}"

    def how(self) -> dict[str, Any]:
        """What the order says beside `do`."""
        return {}

    @property
    def extra_s(self) -> float:
        """What a step must last longer for the drawn severity."""
        return (self.draw.severity - 1) * self.world.traffic.step_s


class Raise(Inside):
    """A Python exception in one rank."""

    name, row, do = "raise", "F2", "raise"

    def truth(self) -> Truth:
        return self.rank_truth(words.CRASH)

    def fired(self) -> str:
        said = super().fired()
        return said if said and not proc.alive(self._pid) else ""


class StopBetween(Inside):
    """SIGSTOP between two collectives."""

    name, row, do = "stop-between", "F3", "stop"

    def truth(self) -> Truth:
        return self.rank_truth(words.NON_COMMUNICATION_HANG)

    def heal(self) -> None:
        super().heal()
        if hasattr(self, "_pid"):
            proc.send(self._pid, signal.SIGCONT)

    def fired(self) -> str:
        said = super().fired()
        return said if said and proc.state(self._pid) in STOPPED else ""


class StopInside(StopBetween):
    """SIGSTOP in the middle of a collective: issued like everybody's, and not finished by anybody."""

    name, do = "stop-inside", "stop-inside"


class Sleep(Inside):
    """A data loader that never answers."""

    name, row, do = "loader-hang", "F4", "sleep"

    def truth(self) -> Truth:
        return self.rank_truth(words.NON_COMMUNICATION_HANG)

    def how(self) -> dict[str, Any]:
        return {"seconds": FOREVER_S}

    def heal(self) -> None:
        """It sleeps for an hour: only its end frees the others."""
        super().heal()
        if hasattr(self, "_pid") and super().fired():
            for pid in (*proc.below(self._pid), self._pid):
                proc.send(pid, signal.SIGKILL)


class HoldGil(Sleep):
    """A C call that never returns and keeps the interpreter's lock."""

    name, do = "hold-gil", "gil"


class DeviceWait(Sleep):
    """Waiting in the kernel, state D."""

    name, do = "device-wait", "device"

    def fired(self) -> str:
        said = super().fired()
        return said if said and proc.state(self._pid) == "D" else ""

    def heal(self) -> None:
        """The rank goes on when its vfork ends; killing that child is gentler than killing the rank."""
        self._control_cancel()
        if hasattr(self, "_pid"):
            for pid in proc.below(self._pid):
                proc.send(pid, signal.SIGKILL)

    def _control_cancel(self) -> None:
        if hasattr(self, "_control"):
            self._control.cancel(self.draw.victim)


class Skip(Inside):
    """One rank leaves a collective out."""

    name, row, do = "skip", "F5", "skip"

    def truth(self) -> Truth:
        return desync(self)


class Resize(Inside):
    """One rank calls a collective with another number of elements."""

    name, row, do = "resize", "F5", "resize"

    def truth(self) -> Truth:
        return desync(self)


def desync(fault: Fault) -> Truth:
    """The program's fault; of two ranks nobody can say which is wrong."""
    base = fault.rank_truth(words.DESYNC, software=True)
    alone = len(fault.world.ranks) == 2
    others = tuple(words.Answer(words.RANK, (p.rank,)) for p in fault.world.ranks) if alone else ()
    job = words.Answer(words.JOB)
    return Truth(base.syndrome, base.scope, base.culprits, True, (*base.answers, *others, job), ())


class Delay(Inside):
    """The rank needs `severity` times as long for its own work in a step."""

    name, row, do, severities = "delay", "F6", "delay", (1.15, 5.0)

    def truth(self) -> Truth:
        return self.rank_truth(words.NON_COMMUNICATION_SLOW)

    def how(self) -> dict[str, Any]:
        return {"seconds": self.extra_s}


class SlowData(Delay):
    """The same, in its data loader, which says so: row 33, to be blamed on the storage, not on the node."""

    name = "slow-data"

    def how(self) -> dict[str, Any]:
        return {"seconds": self.extra_s, "phase": "Data"}


class Everywhere(Inside):
    """One order to all ranks; nobody is to be blamed."""

    def arm(self) -> None:
        self._control = control(self)
        self._were = {p.rank: len(self._control.done(p.rank)) for p in self.world.ranks}

    def inject(self) -> None:
        for place in self.world.ranks:
            self._control.order(place.rank, place.pid, self.do, **self.how())

    def heal(self) -> None:
        if hasattr(self, "_control"):
            for place in self.world.ranks:
                self._control.cancel(place.rank)

    def fired(self) -> str:
        said = [r for r, old in self._were.items() if len(self._control.done(r)) > old]
        return f"ranks {said} obeyed {self.do}" if said else ""


class Rotating(Everywhere):
    """Another rank is slow in each step."""

    name, row, do, severities = "rotating", "F14", "rotate", (1.3, 3.0)

    def truth(self) -> Truth:
        return self.nobody(words.IMBALANCE)

    def how(self) -> dict[str, Any]:
        return {"seconds": self.extra_s, "ranks": len(self.world.ranks), "seed": self.draw.seed}


class Varying(Rotating):
    """Every rank takes another time in each step, as with sequences of unequal length."""

    name, do = "varying", "vary"


class LongPhase(Everywhere):
    """All ranks do something that legally takes `severity` seconds."""

    name, row, do, severities = "checkpoint", "F15", "phase", (2.0, 6.0)
    phase: ClassVar[str] = "Checkpoint"
    busy: ClassVar[float] = 0.0
    """Share of a core that it uses: a compiler works, a disk lets wait."""

    def truth(self) -> Truth:
        return self.nobody()

    def how(self) -> dict[str, Any]:
        return {"seconds": self.draw.severity, "phase": self.phase, "busy": self.busy}


class Evaluation(LongPhase):
    """All ranks evaluate."""

    name, phase = "evaluation", "Evaluation"


class OneSaves(LongPhase):
    """One rank writes a checkpoint, and the others wait for it in their next collective."""

    name = "one-saves"

    def inject(self) -> None:
        place = self.victim
        self._control.order(place.rank, place.pid, self.do, **self.how())


class Compile(LongPhase):
    """Every rank compiles anew, which it announces."""

    name, phase, busy = "compile", "Compile", 0.2


class FirstStep(LongPhase):
    """The first step takes ten times as long as the others, or more, and nobody announces anything."""

    name, phase, early, busy = "first-step", "", True, 0.2

    def arm(self) -> None:
        self._control = control(self)
        self._were = dict.fromkeys(range(len(self.world.ranks)), 0)

    def inject(self) -> None:
        for rank in self._were:
            self._control.order(rank, ANY, self.do, step=1, **self.how())


class Flip(Inside):
    """One bit of one parameter is flipped, on one rank, once."""

    name, row, do, least_ranks = "flip-parameter", "F16", "flip", 3
    tensor: ClassVar[str] = "parameter"

    def truth(self) -> Truth:
        return self.rank_truth(words.CORRUPTION)

    def how(self) -> dict[str, Any]:
        rng = random.Random(f"{self.name}/{self.draw.seed}")
        # From the high half of the mantissa up to the sign: lower bits drown in rounding.
        return {"tensor": self.tensor, "element": rng.randrange(1 << 20), "bit": rng.randrange(12, 32)}


class FlipGradient(Flip):
    """One high bit of one gradient, before it is mixed with the others'."""

    name, tensor = "flip-gradient", "gradient"

    def how(self) -> dict[str, Any]:
        return {**super().how(), "bit": 30}


class NotFinite(Flip):
    """A NaN in one rank's gradient, before it is mixed."""

    name, do, tensor = "nan-gradient", "nan", "gradient"


class StuckColumn(Flip):
    """One column of a product always comes out as one, in every step."""

    name, do, tensor = "stuck-column", "stuck", "gradient"
