"""Faults done to a rank's process from outside: signals, freezer, processor quota, memory limit."""

from __future__ import annotations

import signal
import threading
import time
from typing import ClassVar

from stormjib_fault import proc, words
from stormjib_fault.cgroups import Cgroup
from stormjib_fault.fault import Fault
from stormjib_fault.rank import Control
from stormjib_fault.words import Refused, Truth

STOPPED = ("T", "t")


class Kill(Fault):
    """SIGKILL, as the kernel's memory killer sends it."""

    name, row = "kill", "F1"
    number: ClassVar[signal.Signals] = signal.SIGKILL

    def truth(self) -> Truth:
        return self.rank_truth(words.CRASH)

    def arm(self) -> None:
        self._pid = self.victim.pid

    def inject(self) -> None:
        if not proc.send(self._pid, self.number):
            raise Refused(f"rank {self.draw.victim} (pid {self._pid}) is already gone")

    def heal(self) -> None:
        """Nothing can be done for it."""

    def fired(self) -> str:
        return "" if proc.alive(self._pid) else f"pid {self._pid} is dead"


class Abort(Kill):
    """SIGABRT, as a failed assertion of a library raises it."""

    name = "abort"
    number = signal.SIGABRT


class Segfault(Kill):
    """SIGSEGV, as a bad pointer does."""

    name = "segfault"
    number = signal.SIGSEGV


class OutOfMemory(Fault):
    """The rank's memory is limited, and it asks for more: the kernel kills it."""

    name, row, laboratory = "out-of-memory", "F1", True
    LIMIT: ClassVar[int] = 96 << 20
    FILLED_S: ClassVar[float] = 2.0
    """By then it has asked for all of it."""

    def truth(self) -> Truth:
        return self.rank_truth(words.CRASH)

    def arm(self) -> None:
        self._pid = self.victim.pid
        self._control = control(self)
        self._group = Cgroup("memory", f"{self.world.lab(self.name).prefix}-memory-{self.draw.victim}")
        second = self._group.version == 2
        self._group.write("memory.max" if second else "memory.limit_in_bytes", str(self.LIMIT))
        self._group.take(self._pid)

    def inject(self) -> None:
        self._control.order(self.draw.victim, self._pid, "allocate", mebibytes=3 * (self.LIMIT >> 20))
        end = time.monotonic() + self.FILLED_S
        while proc.alive(self._pid) and time.monotonic() < end:
            time.sleep(0.002)
        self.struck_at = time.monotonic()

    def heal(self) -> None:
        if hasattr(self, "_group"):
            self._control.cancel(self.draw.victim)
            self._group.remove()

    def fired(self) -> str:
        file = "memory.events" if self._group.version == 2 else "memory.oom_control"
        kills = self._group.stat(file, "oom_kill")
        return f"{file} counts {kills} oom_kill" if kills and not proc.alive(self._pid) else ""


class Stop(Fault):
    """SIGSTOP at any moment."""

    name, row = "stop", "F3"

    def truth(self) -> Truth:
        return self.rank_truth(words.NON_COMMUNICATION_HANG)

    def arm(self) -> None:
        self._pid = self.victim.pid

    def inject(self) -> None:
        if not proc.send(self._pid, signal.SIGSTOP):
            raise Refused(f"rank {self.draw.victim} (pid {self._pid}) is already gone")

    def heal(self) -> None:
        if hasattr(self, "_pid"):
            proc.send(self._pid, signal.SIGCONT)

    def fired(self) -> str:
        state = proc.state(self._pid)
        return f"pid {self._pid} is in state {state}" if state in STOPPED else ""


class Freeze(Fault):
    """The freezer: the process is in no signal's reach, not even SIGKILL's on version 1."""

    name, row, laboratory = "freeze", "F3", True

    def truth(self) -> Truth:
        return self.rank_truth(words.NON_COMMUNICATION_HANG)

    def arm(self) -> None:
        self._group = Cgroup("freezer", f"{self.world.lab(self.name).prefix}-freezer-{self.draw.victim}")
        self._group.take(self.victim.pid)

    def inject(self) -> None:
        freeze(self._group, frozen=True)

    def heal(self) -> None:
        if hasattr(self, "_group") and self._group.path.exists():
            freeze(self._group, frozen=False)
            self._group.remove()

    def fired(self) -> str:
        return is_frozen(self._group)


def freeze(group: Cgroup, *, frozen: bool) -> None:
    """Freeze or thaw everything in a group."""
    if group.version == 2:
        group.write("cgroup.freeze", "1" if frozen else "0")
    else:
        group.write("freezer.state", "FROZEN" if frozen else "THAWED")


def is_frozen(group: Cgroup) -> str:
    """What the kernel says when it is frozen, else empty."""
    if group.version == 2:
        return "cgroup.events says frozen 1" if group.stat("cgroup.events", "frozen") else ""
    return "freezer.state is FROZEN" if group.read("freezer.state").strip() == "FROZEN" else ""


class DutyCycle(Fault):
    """Stopped for a share of the time, so that it needs `severity` times as long for everything."""

    name, row, severities = "duty-cycle", "F6", (1.3, 3.0)
    PERIOD_S: ClassVar[float] = 0.04

    def truth(self) -> Truth:
        return self.rank_truth(words.NON_COMMUNICATION_SLOW)

    def arm(self) -> None:
        self._pid = self.victim.pid
        self._over = threading.Event()
        self._stops = 0
        self._thread = threading.Thread(target=self._drive, daemon=True)

    def inject(self) -> None:
        self._thread.start()

    def heal(self) -> None:
        if hasattr(self, "_thread") and self._thread.ident is not None:
            self._over.set()
            self._thread.join()

    def fired(self) -> str:
        return f"stopped {self._stops} times" if self._stops >= 3 else ""

    def _drive(self) -> None:
        stopped_s = self.PERIOD_S * (1 - 1 / self.draw.severity)
        while not self._over.is_set() and proc.send(self._pid, signal.SIGSTOP):
            self._over.wait(stopped_s)
            self._stops += proc.state(self._pid) in STOPPED
            proc.send(self._pid, signal.SIGCONT)
            self._over.wait(self.PERIOD_S - stopped_s)


class Quota(Fault):
    """A processor quota so small that the rank needs about `severity` times as long."""

    name, row, severities, laboratory = "cpu-quota", "F6", (1.5, 4.0), True
    MEASURE_S: ClassVar[float] = 1.0
    PERIOD_US: ClassVar[int] = 50_000

    def truth(self) -> Truth:
        return self.rank_truth(words.NON_COMMUNICATION_SLOW)

    def arm(self) -> None:
        self._group = Cgroup("cpu", f"{self.world.lab(self.name).prefix}-cpu-{self.draw.victim}")
        pid = self.victim.pid
        began, used = time.monotonic(), proc.cpu_s(pid)
        time.sleep(self.MEASURE_S)
        self._need = (proc.cpu_s(pid) - used) / (time.monotonic() - began)
        self._group.take(pid)

    def inject(self) -> None:
        quota = max(1000, int(self.PERIOD_US * self._need / self.draw.severity))
        if self._group.version == 2:
            self._group.write("cpu.max", f"{quota} {self.PERIOD_US}")
            return
        self._group.write("cpu.cfs_period_us", str(self.PERIOD_US))
        self._group.write("cpu.cfs_quota_us", str(quota))

    def heal(self) -> None:
        if hasattr(self, "_group") and self._group.path.exists():
            if self._group.version == 2:
                self._group.write("cpu.max", "max")
            else:
                self._group.write("cpu.cfs_quota_us", "-1")
            self._group.remove()

    def fired(self) -> str:
        times = self._group.stat("cpu.stat", "nr_throttled")
        return f"cpu.stat counts {times} throttled periods" if times else ""


def control(fault: Fault) -> Control:
    """The control folder of the ranks. Raises Refused where the script obeys none."""
    if fault.world.control is None:
        raise Refused(
            f"{fault.name} is done by the rank itself: its script must obey stormjib_fault.rank, "
            "and STORMJIB_FAULT_DIR must name the folder of the orders"
        )
    return Control(fault.world.control)
