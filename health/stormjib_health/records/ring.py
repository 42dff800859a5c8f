"""The ring: a file on /dev/shm beside the rank's page, into which a rank appends and from which its agent reads.

No locks: the writer fills a slot, then stores the count. The reader takes the count, copies, takes the count again and
drops what may have been overwritten meanwhile. So a rank that is stopped, dead or holds the GIL is read like any other.
The reader never maps the file: a rank that truncates it would end its agent with SIGBUS. It reads at offsets instead.
"""

from __future__ import annotations

import itertools
import mmap
import os
import struct
import sys
import time
from collections import deque
from dataclasses import dataclass
from typing import TYPE_CHECKING

from stormjib_health.records import layout
from stormjib_health.records.layout import CallRecord, Record, RingError
from stormjib_health.wire import Finding, Kind, Phase

if TYPE_CHECKING:
    from pathlib import Path

MAX_READ = 4096
"""Records that one `read` gives at most, the newest ones: more is a flood, and counts as lost."""
MAX_PENDING = 256
"""Calls whose end a reader waits for at most."""
MAX_LOST = 1 << 31
_MARGIN = 8
"""Slots before the overwritten ones that may be half overwritten: one per thread that records just now."""


_now = time.monotonic_ns  # of the hot path: one look-up less


def ring_path(folder: Path, local_rank: int) -> Path:
    """Where the ring of a local rank is, in the folder of the pages (`STORMJIB_PAGE_DIR`)."""
    return folder / f"{local_rank}.ring"


class Lane:
    """One group's calls. Belongs to a `Recorder`."""

    __slots__ = ("_base", "_index", "_pairs", "_recorder", "number", "position", "step")

    def __init__(self, recorder: Recorder, index: int) -> None:
        self._recorder = recorder
        self._index = index
        self.number = 0
        self._pairs: dict[tuple[int, int], int] = {}
        """(kind, peer) -> sends to it, or receives from it."""
        self.step = recorder.step
        """The step clock at its newest call."""
        self.position = 0
        """Calls of this group since the last step."""
        self._base = self._word()

    def turn(self) -> int:
        """Whoever sees that `Recorder.clock` is not at `step` calls this, before the next call. Returns the calls of this
        group in the step that is over."""
        calls, self.position = self.position, 0
        self.step = self._recorder.clock[0]
        self._base = self._word()
        self._recorder.turn(self.step)
        return calls

    def _word(self) -> int:
        return layout.LIGHT | self._index << 16 | (self.step & 0xFFFF_FFFF) << 32

    def light(self, kind: int) -> None:
        """Record a collective, issued now, of which nothing was read. The hot path: it touches as little as it can."""
        recorder = self._recorder
        index = next(recorder.indices)
        words = recorder.records
        at = (index & recorder.mask) << 3
        self.number = number = self.number + 1
        words[at] = self._base | kind << 8
        words[at + 1] = self.position
        words[at + 2] = number
        words[at + 3] = _now()
        words[at + 7] = ((index + 1) & 0xFFFF_FFFF) << 32
        recorder.words[8] = index + 1
        self.position += 1

    def call(
        self, kind: int, peer: int = -1, size: int = 0, signature: int = 0, started: int = 0, done: int = 0
    ) -> int:
        """Record one call of `wire.Kind`, issued now. Returns its index, for `Recorder.started` and `done` where these
        are `layout.PENDING`."""
        recorder = self._recorder
        index = next(recorder.indices)
        recorder.write(
            index, layout.CALL, kind, group=self._index, step=self.step, position=self.position, peer=peer,
            number=self._next(kind, peer), issued=_now(), started=started, done=done, size=size, signature=signature,
        )  # fmt: skip
        self.position += 1
        return index

    def _next(self, kind: int, peer: int) -> int:
        if kind >= Kind.SEND:
            count = self._pairs[kind, peer] = self._pairs.get((kind, peer), 0) + 1
            return count
        self.number += 1
        return self.number


class Recorder:
    """The rank's side. May be called from any of its threads; never blocks."""

    def __init__(self, memory: mmap.mmap, slots: int) -> None:
        self.mask = slots - 1
        self._attach(memory)
        self.clock = self.words[layout.WORD_STEP : layout.WORD_STEP + 1]
        """One word: the last finished step; -1 before the first."""
        self._clock_ns = self.words[layout.WORD_STEP_NS : layout.WORD_STEP_NS + 1]
        self.indices = itertools.count(self.words[layout.WORD_COUNT])
        self.step: int = self.clock[0]
        """Last step that was recorded."""
        self._step_ns = 0
        self._last: int = self.words[layout.WORD_COUNT]
        self._phase = Phase.UNKNOWN

    def _attach(self, memory: mmap.mmap) -> None:
        self.memory = memory
        self.words = memoryview(memory).cast("q")
        self.records = memoryview(memory)[layout.HEADER :].cast("Q")

    @classmethod
    def create(cls, path: Path, slots: int = layout.SLOTS) -> Recorder:
        """A fresh ring in a fresh file, made by the agent before the rank starts. `slots` is a power of two."""
        if sys.byteorder != "little":
            raise RingError("a ring is little-endian, and this machine is not")
        _check_slots(slots, path)
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        try:
            size = layout.HEADER + slots * layout.RECORD
            os.ftruncate(descriptor, size)
            words = [0] * 20
            words[layout.WORD_MAGIC], words[layout.WORD_VERSION] = layout.MAGIC, layout.VERSION
            words[layout.WORD_SLOTS], words[layout.WORD_STEP] = slots, -1
            os.pwrite(descriptor, layout.HEADER_WORDS.pack(*words), 0)
            return cls(mmap.mmap(descriptor, size), slots)
        finally:
            os.close(descriptor)

    @classmethod
    def open(cls, path: Path) -> Recorder:
        """Map the ring that the agent made. Raises RingError where it is something else."""
        descriptor = os.open(path, os.O_RDWR | os.O_CLOEXEC)
        try:
            slots = _slots(descriptor, path)
            size = layout.HEADER + slots * layout.RECORD
            return cls(mmap.mmap(descriptor, size), slots)
        finally:
            os.close(descriptor)

    def close(self) -> None:
        """Unmap. The file stays; its agent removes it."""
        for view in (self.clock, self._clock_ns, self.words, self.records):
            view.release()
        self.memory.close()

    def detach(self) -> None:
        """In a forked child (a loader's worker): it is not the rank, and what it records goes nowhere."""
        self._attach(mmap.mmap(-1, layout.HEADER + (self.mask + 1) * layout.RECORD))

    def follow(self, step: memoryview, step_ns: memoryview) -> None:
        """Take the step from two words that another writes: the last finished step, and when it was."""
        self.clock, self._clock_ns = step, step_ns

    def lane(self, group: int) -> Lane:
        """Where calls of the group with this index (`GroupsWriter.add`) are recorded."""
        if not 0 <= group < layout.MAX_GROUPS:
            raise ValueError(f"group {group} is not in 0..{layout.MAX_GROUPS - 1}")
        return Lane(self, group)

    def started(self, index: int, time_ns: int) -> None:
        """The device has started the call at `index`."""
        self._fill(index, layout.STARTED_AT, time_ns)

    def done(self, index: int, time_ns: int) -> None:
        """The call at `index`, recorded as pending, has ended."""
        self._fill(index, layout.DONE_AT, time_ns)

    def _fill(self, index: int, offset: int, time_ns: int) -> None:
        """One aligned store, unless the slot may belong to a later record by now."""
        if self.words[layout.WORD_COUNT] - index < self.mask >> 1:
            self.words[(layout.HEADER + (index & self.mask) * layout.RECORD + offset) >> 3] = time_ns

    def finished(self, step: int) -> None:
        """`step` is finished; for a rank whose clock nobody else writes."""
        self._clock_ns[0] = time.monotonic_ns()
        self.clock[0] = step

    def turn(self, step: int) -> None:
        """Record a step, unless that was done."""
        if step == self.step or step < 0:
            return
        at_ns: int = self._clock_ns[0]
        index = next(self.indices)
        self.write(
            index, layout.STEP, 0, step=step, position=max(0, index - self._last), issued=at_ns,
            started=max(0, at_ns - self._step_ns) if self._step_ns else 0,
        )  # fmt: skip
        self._last, self._step_ns, self.step = index + 1, at_ns, step
        self.words[layout.WORD_STEP], self.words[layout.WORD_STEP_NS] = step, at_ns
        if self._phase in (Phase.UNKNOWN, Phase.START):
            self.phase = Phase.STEP

    @property
    def phase(self) -> Phase:
        """The newest phase that was recorded."""
        return self._phase

    @phase.setter
    def phase(self, phase: Phase) -> None:
        if phase is self._phase:
            return
        now = time.monotonic_ns()
        self._phase = phase
        self.words[layout.WORD_PHASE], self.words[layout.WORD_PHASE_NS] = phase, now
        self._last += 1  # no call
        self.write(next(self.indices), layout.PHASE, phase, step=self.step, issued=now)

    def finding(self, finding: Finding) -> None:
        """What this rank found out about the numbers. Values that are not finite are read as 0."""
        value, typical = struct.unpack("<QQ", layout.FLOATS.pack(finding.value, finding.typical))
        self._last += 1
        self.write(
            next(self.indices), layout.FINDING, finding.kind, group=min(finding.votes, 0xFFFF), step=finding.step,
            peer=finding.accused, number=finding.rank, started=value, done=typical,
        )  # fmt: skip

    def write(
        self, index: int, type_: int, kind: int, *, group: int = 0, step: int = -1, position: int = 0, peer: int = -1,
        number: int = 0, issued: int = 0, started: int = 0, done: int = 0, size: int = 0, signature: int = 0,
    ) -> None:  # fmt: skip
        """Fill the slot of `index`, which was taken from `indices`, and store the count."""
        layout.FIELDS.pack_into(
            self.memory, layout.HEADER + (index & self.mask) * layout.RECORD,
            type_, kind, group, step, position, peer, number, issued, started, done, size, signature, layout.stamp(index),
        )  # fmt: skip
        self.words[layout.WORD_COUNT] = index + 1


@dataclass(frozen=True)
class State:
    """Where the rank is now, without the history: right even where records were lost."""

    phase: Phase = Phase.UNKNOWN
    phase_ns: int = 0
    """CLOCK_MONOTONIC of its begin; 0 for never."""
    step: int = -1
    step_ns: int = 0
    count: int = 0
    """Records written so far."""


@dataclass(frozen=True)
class Batch:
    """What one `read` gave."""

    records: tuple[Record, ...] = ()
    """In the order in which they were written."""
    ended: tuple[CallRecord, ...] = ()
    """Calls whose end has become known since the last read, whether they are new or were given before as pending."""
    lost: int = 0
    """At most `MAX_LOST`. Records that were overwritten before they were read, or that no correct rank has written."""
    state: State = State()


class Reader:
    """The agent's side: gives each record once."""

    def __init__(self, descriptor: int, slots: int) -> None:
        self._descriptor = descriptor
        self._slots = slots
        self._next = 0
        self._pending: deque[int] = deque(maxlen=MAX_PENDING)

    @classmethod
    def open(cls, path: Path) -> Reader:
        """Raises RingError where the file is no ring of this version."""
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            return cls(descriptor, _slots(descriptor, path))
        except RingError:
            os.close(descriptor)
            raise

    def close(self) -> None:
        os.close(self._descriptor)

    def read(self) -> Batch:
        """What is new since the last read, at most `MAX_READ` records. Never raises for what the rank has written."""
        state = self._state()
        if state is None or state.count < self._next:  # truncated, or turned back: no correct rank does that
            return Batch()
        first = max(self._next, state.count - min(MAX_READ, self._slots - _MARGIN))
        data = self._copy(first, state.count)
        after = self._state() or state
        kept = max(first, min(state.count, after.count - self._slots + _MARGIN))
        lost = kept - self._next
        records = layout.decode_all(data[(kept - first) * layout.RECORD :], kept)
        self._next = state.count
        ended = self._ended(after.count - self._slots + _MARGIN)
        self._pending.extend(kept + at for at, record in enumerate(records) if _is_pending(record))
        good = tuple(record for record in records if record is not None)
        ended += tuple(record for record in good if isinstance(record, CallRecord) and record.done_ns)
        return Batch(good, ended, min(MAX_LOST, lost + len(records) - len(good)), after)

    def _ended(self, oldest: int) -> tuple[CallRecord, ...]:
        """Look again at every call whose end was not known. What is older than `oldest` is forgotten."""
        ended = []
        for _ in range(len(self._pending)):
            index = self._pending.popleft()
            record = layout.decode(self._at(index, index + 1), index) if index >= oldest else None
            if _is_pending(record):
                self._pending.append(index)
            elif isinstance(record, CallRecord) and record.done_ns:
                ended.append(record)
        return tuple(ended)

    def _copy(self, first: int, end: int) -> bytes:
        """The records of the stream from `first` up to `end`, as bytes."""
        turn = min(end, (first // self._slots + 1) * self._slots)
        return self._at(first, turn) + self._at(turn, end)

    def _at(self, first: int, end: int) -> bytes:
        """Bytes of records that lie beside each other; zeros where the file is too short."""
        size = (end - first) * layout.RECORD
        if not size:
            return b""
        offset = layout.HEADER + (first % self._slots) * layout.RECORD
        return os.pread(self._descriptor, size, offset).ljust(size, b"\0")

    def _state(self) -> State | None:
        data = os.pread(self._descriptor, layout.HEADER_WORDS.size, 0)
        if len(data) < layout.HEADER_WORDS.size:
            return None
        words = layout.HEADER_WORDS.unpack(data)
        phase = words[layout.WORD_PHASE]
        return State(
            phase=Phase(phase) if phase in Phase._value2member_map_ else Phase.UNKNOWN,
            phase_ns=max(0, words[layout.WORD_PHASE_NS]),
            step=max(-1, words[layout.WORD_STEP]),
            step_ns=max(0, words[layout.WORD_STEP_NS]),
            count=max(0, words[layout.WORD_COUNT]),
        )


def _is_pending(record: Record | None) -> bool:
    return isinstance(record, CallRecord) and record.pending


def _slots(descriptor: int, path: Path) -> int:
    data = os.pread(descriptor, layout.HEADER_WORDS.size, 0)
    size = os.fstat(descriptor).st_size
    if len(data) < layout.HEADER_WORDS.size:
        raise RingError(f"{path} is no ring: {size} bytes")
    words = layout.HEADER_WORDS.unpack(data)
    if words[layout.WORD_MAGIC] != layout.MAGIC or words[layout.WORD_VERSION] != layout.VERSION:
        raise RingError(f"{path} is no ring of version {layout.VERSION}")
    slots: int = words[layout.WORD_SLOTS]
    _check_slots(slots, path)
    if size != layout.HEADER + slots * layout.RECORD:
        raise RingError(f"{path} has {size} bytes, wanted {layout.HEADER + slots * layout.RECORD}")
    return slots


def _check_slots(slots: int, path: Path) -> None:
    if not layout.MIN_SLOTS <= slots <= layout.MAX_SLOTS or slots & (slots - 1):
        raise RingError(
            f"{path}: {slots} slots; use a power of two in {layout.MIN_SLOTS}..{layout.MAX_SLOTS}"
        )
