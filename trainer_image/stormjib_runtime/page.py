"""The page: 4 KiB of shared memory through which an agent and one of its ranks see each other without a call.

A file on /dev/shm, made by the agent before the rank starts, mapped by both. It holds 64-bit little-endian slots; each
is one aligned store, so a reader sees the old value or the new one and nobody waits, not even for a rank that is
stopped or holds the GIL. Ranks write slots below 32 only, the agent writes slots from 32 on only.
"""

from __future__ import annotations

import math
import mmap
import os
import struct
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from stormjib_runtime.wire import Env, GenerationId, RankPhase, Saving

if TYPE_CHECKING:
    from collections.abc import Mapping

SIZE = 4096
MAGIC = int.from_bytes(b"STJBPAGE", "little")
VERSION = 1

# Slots that the rank writes. The first four are the header, written once by whoever creates the page.
_MAGIC, _VERSION, _INCARNATION, _NUMBER = 0, 1, 2, 3
_STEP, _PHASE, _WRITTEN_NS, _SAVED, _LOSS, _LISTENS, _OWNS_CLOCK, _STEP_NS = 4, 5, 6, 7, 8, 9, 10, 11
_SAVING = 12
"""First of the nine slots of `Saving`, in the order of its fields; seconds as nanoseconds."""
# Slots that the agent writes.
_SAVE_AT, _STOP_AFTER = 32, 33

_PHASES = tuple(RankPhase)


class PageError(OSError):
    """A file is no page of this version."""


@dataclass(frozen=True)
class Reading:
    """What a rank says, read at one moment."""

    step: int
    phase: RankPhase
    written_ns: int
    """CLOCK_MONOTONIC of the last write of step or phase; 0 when there was none."""
    step_ns: int
    """CLOCK_MONOTONIC of the last write of the step; 0 when there was none."""
    saved: int
    loss: float | None
    listens: bool


class Page:
    """One mapped page. Every property is one slot: reading never blocks, and so does writing."""

    def __init__(self, path: Path, memory: mmap.mmap) -> None:
        self.path = path
        self._memory = memory
        self._slots = memoryview(memory).cast("q")

    @classmethod
    def create(cls, path: Path, generation: GenerationId) -> Page:
        """A fresh page in a fresh file. Its folder must exist."""
        if sys.byteorder != "little":
            raise PageError("a page is little-endian, and this machine is not")
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        try:
            os.ftruncate(descriptor, SIZE)
            page = cls(path, mmap.mmap(descriptor, SIZE))
        finally:
            os.close(descriptor)
        page._slots[_INCARNATION], page._slots[_NUMBER] = generation.incarnation, generation.number
        page._slots[_STEP] = page._slots[_SAVED] = -1
        page._slots[_LOSS] = _bits(math.nan)
        page._slots[_VERSION] = VERSION
        page._slots[_MAGIC] = MAGIC  # last: a page with it is whole
        return page

    @classmethod
    def open(cls, path: Path) -> Page:
        """Map a page that an agent made. Raises PageError where the file is something else."""
        descriptor = os.open(path, os.O_RDWR | os.O_CLOEXEC)
        try:
            if os.fstat(descriptor).st_size != SIZE:
                raise PageError(f"{path} is no page: {os.fstat(descriptor).st_size} bytes, wanted {SIZE}")
            page = cls(path, mmap.mmap(descriptor, SIZE))
        finally:
            os.close(descriptor)
        if page._slots[_MAGIC] != MAGIC or page._slots[_VERSION] != VERSION:
            raise PageError(f"{path} is no page of version {VERSION}")
        return page

    @classmethod
    def from_env(cls, environ: Mapping[str, str] = os.environ) -> Page | None:
        """The page of this rank, or None where no agent runs it."""
        folder, local_rank = environ.get(Env.PAGE_DIR), environ.get("LOCAL_RANK")
        return cls.open(Path(folder) / local_rank) if folder and local_rank else None

    def close(self) -> None:
        """Unmap. The file stays; its agent removes it."""
        self._slots.release()
        self._memory.close()

    @property
    def generation(self) -> GenerationId:
        return GenerationId(self._slots[_INCARNATION], self._slots[_NUMBER])

    @property
    def step(self) -> int:
        """Last finished step, counted from 1; -1 until the first."""
        return self._slots[_STEP]

    @step.setter
    def step(self, value: int) -> None:
        now = time.monotonic_ns()
        self._slots[_STEP] = value
        self._slots[_STEP_NS] = now
        self._slots[_WRITTEN_NS] = now

    @property
    def clock(self) -> tuple[memoryview, memoryview]:
        """The words of `step` and of when it was written, to be watched without a call."""
        return self._slots[_STEP : _STEP + 1], self._slots[_STEP_NS : _STEP_NS + 1]

    @property
    def phase(self) -> RankPhase:
        index = self._slots[_PHASE]
        return _PHASES[index] if 0 <= index < len(_PHASES) else RankPhase.UNKNOWN

    @phase.setter
    def phase(self, value: RankPhase) -> None:
        self._slots[_PHASE] = _PHASES.index(value)
        self._slots[_WRITTEN_NS] = time.monotonic_ns()

    @property
    def saved(self) -> int:
        """Last step whose rank file is written; -1 until the first."""
        return self._slots[_SAVED]

    @saved.setter
    def saved(self, value: int) -> None:
        self._slots[_SAVED] = value

    @property
    def saving(self) -> Saving:
        """What this rank's saves have cost: all zero until the first."""
        kept = [max(slot, 0) for slot in self._slots[_SAVING : _SAVING + 9].tolist()]
        saves, failures, in_flight, size = kept[:4]
        lost, call, wait, staged, durable = (slot / 1e9 for slot in kept[4:])
        return Saving(saves, failures, in_flight, size, lost, call, wait, staged, durable)

    @saving.setter
    def saving(self, value: Saving) -> None:
        seconds = (value.lost_s, value.call_s, value.wait_s, value.staged_s, value.durable_s)
        counts = (value.saves, value.failures, value.in_flight, value.bytes)
        for slot, number in enumerate((*counts, *(int(time_s * 1e9) for time_s in seconds)), start=_SAVING):
            self._slots[slot] = number

    @property
    def loss(self) -> float | None:
        value = _value(self._slots[_LOSS])
        return value if math.isfinite(value) else None

    @loss.setter
    def loss(self, value: float) -> None:
        self._slots[_LOSS] = _bits(value)

    @property
    def listens(self) -> bool:
        """The script obeys save_at and stop_after."""
        return bool(self._slots[_LISTENS])

    @listens.setter
    def listens(self, value: bool) -> None:
        self._slots[_LISTENS] = int(value)

    @property
    def owns_clock(self) -> bool:
        """The script writes `step` itself, so the optimizer hook leaves it alone."""
        return bool(self._slots[_OWNS_CLOCK])

    @owns_clock.setter
    def owns_clock(self, value: bool) -> None:
        self._slots[_OWNS_CLOCK] = int(value)

    @property
    def save_at(self) -> int:
        """Step after which every rank saves; 0 is never. Written by the agent."""
        return self._slots[_SAVE_AT]

    @save_at.setter
    def save_at(self, value: int) -> None:
        self._slots[_SAVE_AT] = value

    @property
    def stop_after(self) -> int:
        """Step after which every rank saves and stops; 0 is never. Written by the agent."""
        return self._slots[_STOP_AFTER]

    @stop_after.setter
    def stop_after(self, value: int) -> None:
        self._slots[_STOP_AFTER] = value

    def read(self) -> Reading:
        """All that the rank says. A rank may write anything: only the types are trusted."""
        slots = self._slots
        return Reading(
            step=slots[_STEP],
            phase=self.phase,
            written_ns=slots[_WRITTEN_NS],
            step_ns=slots[_STEP_NS],
            saved=slots[_SAVED],
            loss=self.loss,
            listens=self.listens,
        )


def _bits(value: float) -> int:
    return int(struct.unpack("<q", struct.pack("<d", value))[0])


def _value(bits: int) -> float:
    return float(struct.unpack("<d", struct.pack("<q", bits))[0])
