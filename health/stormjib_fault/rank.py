"""Faults from inside a rank: an order in a file, and a script that obeys it.

Outside, `Control` writes `rank-K.json`, one order at a time. Inside, `Obedient` looks before every step and operation (one `stat`),
and writes a line to `rank-K.did` before it does what it was told: that line proves that the fault fired. An order names the
process that it is for, so that the rank's next life is healthy.
"""

from __future__ import annotations

import ctypes
import json
import math
import os
import random
import signal
import struct
import time
from contextlib import suppress
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

ANY = 0
"""In place of a pid: whoever reads it."""
BEAT_S = 0.1
_CLONE_VFORK = 0x00004000
_MUTEX_BYTES = 64
"""More than a pthread_mutex_t has anywhere."""
_SYS_CLONE = {"x86_64": 56, "aarch64": 220}


class InjectedError(RuntimeError):
    """What `raise` raises."""


class Control:
    """The outside: gives orders, reads proofs."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def order(self, rank: int, pid: int, do: str, **how: Any) -> None:
        """Give an order, whole or not at all. A former one is replaced."""
        path = self._folder / f"rank-{rank}.json"
        fresh = path.with_suffix(".new")
        fresh.write_text(json.dumps({"pid": pid, "do": do, **how}))
        os.replace(fresh, path)

    def cancel(self, rank: int) -> None:
        """No order."""
        (self._folder / f"rank-{rank}.json").unlink(missing_ok=True)

    def done(self, rank: int) -> list[dict[str, Any]]:
        """What the rank says it did, oldest first. A torn or foreign line is left out: the rank may be dying."""
        try:
            lines = (self._folder / f"rank-{rank}.did").read_text().splitlines()
        except FileNotFoundError:
            return []
        found = []
        for line in lines:
            with suppress(ValueError):
                found.append(json.loads(line))
        return [each for each in found if isinstance(each, dict)]

    def clear(self) -> None:
        """Forget all orders and proofs."""
        for path in self._folder.glob("rank-*"):
            path.unlink(missing_ok=True)


class Obedient:
    """The inside. Call `step` before each step, `before` and `after` around each collective, `change` with a tensor's memory."""

    def __init__(self, folder: Path, rank: int, phase: Callable[[str], None] = lambda name: None) -> None:
        self._path = folder / f"rank-{rank}.json"
        self._proof = folder / f"rank-{rank}.did"
        self._rank = rank
        self._phase = phase
        self._seen: tuple[int, int] | None = None
        self._order: dict[str, Any] = {}
        self._step = 0

    def step(self, step: int) -> None:
        """Before a step: do what an order says of whole steps."""
        self._step = step
        self._look()
        act = getattr(self, f"_do_{self._order.get('do', '')}".replace("-", "_"), None)
        if act is not None:
            act(self._order)

    def before(self, index: int) -> str:
        """Before collective number `index` of the step: `skip`, `resize`, or nothing to do."""
        do = str(self._order.get("do", ""))
        if do in ("skip", "resize") and index == self._order.get("index", 0):
            self._did(index=index)
            self._forget()
            return do
        return ""

    def stops_inside(self) -> bool:
        """Whether the next collective shall be issued without waiting, because the process stops in it."""
        return self._order.get("do") == "stop-inside"

    def after(self, index: int) -> None:
        """Right after a collective was issued, before it is waited for."""
        if self._order.get("do") == "stop-inside":
            self._did(index=index)
            self._forget()
            os.kill(os.getpid(), signal.SIGSTOP)

    def change(self, name: str, address: int, size: int) -> None:
        """Corrupt float32 numbers at `address`, `size` bytes of them, if an order says so of this tensor."""
        order = self._order
        if order.get("do") not in ("flip", "nan", "stuck") or order.get("tensor") != name:
            return
        count = size // 4
        place = int(order.get("element", 0)) % count
        if order["do"] == "stuck":  # one output column that never changes, in every step
            for row in range(place % 64, count, 64):
                _poke(address + 4 * row, struct.pack("<f", 1.0))
            self._did(element=place, once=True)
            return
        raw = ctypes.string_at(address + 4 * place, 4)
        bad = struct.pack("<f", math.nan) if order["do"] == "nan" else _flip(raw, int(order.get("bit", 30)))
        _poke(address + 4 * place, bad)
        self._did(element=place, was=struct.unpack("<f", raw)[0], bytes=bad.hex())
        self._forget()

    # --- orders about whole steps -------------------------------------------------------------------------------------

    def _do_raise(self, order: dict[str, Any]) -> None:
        self._did()
        raise InjectedError("fault laboratory: a program error in one rank")

    def _do_sleep(self, order: dict[str, Any]) -> None:
        """A data loader that never answers."""
        self._did()
        time.sleep(float(order["seconds"]))
        self._forget()

    def _do_gil(self, order: dict[str, Any]) -> None:
        """Wait in C without giving the interpreter's lock back: no other thread of this process runs Python.

        For a lock that is taken, because a signal (the one that asks for stacks, too) ends a sleep before its time.
        """
        self._did()
        c, lock = ctypes.PyDLL(None), ctypes.create_string_buffer(_MUTEX_BYTES)  # zeros: unlocked
        seconds, part = divmod(time.time() + float(order["seconds"]), 1)
        c.pthread_mutex_lock(lock)
        c.pthread_mutex_timedlock(lock, struct.pack("@ll", int(seconds), int(part * 1e9)))
        self._forget()

    def _do_device(self, order: dict[str, Any]) -> None:
        """Wait in the kernel, state D, as for a disk that does not answer: the parent of a vfork does until its child ends."""
        self._did()
        self._forget()
        libc = ctypes.CDLL(None, use_errno=True)
        flags = ctypes.c_long(_CLONE_VFORK | signal.SIGCHLD)
        zero = ctypes.c_long(0)
        child = libc.syscall(ctypes.c_long(_SYS_CLONE[os.uname().machine]), flags, zero, zero, zero, zero)
        if child == 0:  # a copy of this process with one thread: it must touch nothing
            time.sleep(float(order["seconds"]))
            os._exit(0)
        os.waitpid(child, 0)

    def _do_stop(self, order: dict[str, Any]) -> None:
        self._did()
        self._forget()
        os.kill(os.getpid(), signal.SIGSTOP)

    def _do_delay(self, order: dict[str, Any]) -> None:
        """So many seconds in every step, in the phase that the order names."""
        self._did(once=True)
        self._in_phase(str(order.get("phase", "")), float(order["seconds"]))

    def _do_rotate(self, order: dict[str, Any]) -> None:
        """Another rank is slow each step; every rank draws the same one."""
        slow = random.Random(f"{order['seed']}:{self._step}").randrange(int(order["ranks"]))
        if slow == self._rank:
            self._did(once=True)
            time.sleep(float(order["seconds"]))

    def _do_vary(self, order: dict[str, Any]) -> None:
        """Every rank and step takes another time, as with sequences of unequal length."""
        self._did(once=True)
        share = random.Random(f"{order['seed']}:{self._rank}:{self._step}").random()
        time.sleep(2 * share * float(order["seconds"]))

    def _do_phase(self, order: dict[str, Any]) -> None:
        """One long piece of work that is no step."""
        if self._step >= int(order.get("step", 0)):
            self._did()
            self._forget()
            self._in_phase(str(order["phase"]), float(order["seconds"]), float(order.get("busy", 0.0)))

    def _do_allocate(self, order: dict[str, Any]) -> None:
        """Use memory until somebody objects."""
        self._did()
        hoard = [bytearray(b"x") * (1 << 20) for _ in range(int(order["mebibytes"]))]
        self._forget()
        del hoard

    # --- small ones ---------------------------------------------------------------------------------------------------

    def _in_phase(self, phase: str, seconds: float, busy: float = 0.0) -> None:
        """Take so long, using a core for the share `busy` of it."""
        if phase:
            self._phase(phase)
        end = time.monotonic() + seconds
        while busy and (left := end - time.monotonic()) > 0:
            pause = time.monotonic() + min(BEAT_S * busy, left)
            while time.monotonic() < pause:
                pass
            time.sleep(min(BEAT_S * (1 - busy), left))
        time.sleep(max(0.0, end - time.monotonic()))
        if phase:
            self._phase("Step")

    def _look(self) -> None:
        try:
            stat = os.stat(self._path)
        except FileNotFoundError:
            self._order, self._seen = {}, None
            return
        now = (stat.st_ino, stat.st_mtime_ns)
        if now == self._seen:
            return
        self._seen = now
        with suppress(FileNotFoundError, ValueError):
            order = json.loads(self._path.read_text())
            self._order = order if order.get("pid") in (ANY, os.getpid()) else {}

    def _forget(self) -> None:
        self._order = {}

    def _did(self, *, once: bool = False, **what: Any) -> None:
        """Say so before it is done: afterwards there may be nobody to say it."""
        if once and self._order.get("said"):
            return
        self._order["said"] = True
        line = {"do": self._order.get("do"), "pid": os.getpid(), "step": self._step, **what}
        descriptor = os.open(self._proof, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)
        try:
            os.write(descriptor, json.dumps(line).encode() + b"\n")
        finally:
            os.close(descriptor)


def _flip(raw: bytes, bit: int) -> bytes:
    return (int.from_bytes(raw, "little") ^ (1 << bit)).to_bytes(4, "little")


def _poke(address: int, data: bytes) -> None:
    ctypes.memmove(address, data, len(data))
