"""How a ring lies in its file: a page of header, then a power of two of 64-byte records, all little-endian.

Only this module knows offsets. What a rank writes is hostile to its reader, so `decode` gives None for whatever a correct
rank cannot have written, and every number it gives is inside the bounds that its field states.
"""

from __future__ import annotations

import math
import struct
from typing import NamedTuple

from stormjib_health.wire import Doubt, Finding, Kind, Phase

MAGIC = int.from_bytes(b"STJBRING", "little")
VERSION = 1
HEADER = 4096
RECORD = 64
SLOTS = 1 << 14
"""Records of a new ring: 1 MiB, three seconds of a rank that calls 5,000 times a second."""
MIN_SLOTS, MAX_SLOTS = 1 << 4, 1 << 20

# 64-bit words of the header. The count has a cache line of its own: it is the only word that is written often.
WORD_MAGIC, WORD_VERSION, WORD_SLOTS, WORD_COUNT = 0, 1, 2, 8
WORD_PHASE, WORD_PHASE_NS, WORD_STEP, WORD_STEP_NS = 16, 17, 18, 19
HEADER_WORDS = struct.Struct("<20q")

# type, kind, group, step, position, peer | number, issued, started, done, bytes | signature, stamp
FIELDS = struct.Struct("<BBHiIiQQQQQII")
FLOATS = struct.Struct("<dd")
STARTED_AT, DONE_AT = 32, 40
"""Byte offsets of the two times that may be filled in later, each by one aligned store."""
PENDING = 1
"""In `started` and `done`: will be filled in. 0: never known."""

CALL, PHASE, STEP, FINDING, LIGHT = 1, 2, 3, 4, 5
"""Types of records. LIGHT is a CALL, a collective, of which nothing was read: its fields from `peer` to `signature` less the
number and the time are not written, and hold what was there before."""

MAX_GROUPS = 1024
"""Groups of one rank; calls of later ones are not recorded."""
MAX_RANK = 1 << 20
_TIME = 1 << 63
_STAMP = 0xFFFF_FFFF

_KINDS = {int(kind): kind for kind in Kind}
_PHASES = {int(phase): phase for phase in Phase}
_DOUBTS = frozenset(map(int, Doubt))


class RingError(OSError):
    """A file is no ring of this version."""


class CallRecord(NamedTuple):
    """One call on one process group. Times are CLOCK_MONOTONIC of this host in nanoseconds."""

    group: int
    """Index in the rank's groups file, below `MAX_GROUPS`."""
    kind: Kind
    number: int
    """Which collective of its group, from 1; which send to its peer, or receive from it."""
    step: int
    """Last finished step when it was issued; -1 before the first."""
    position: int
    """Which call of its group since then, from 0."""
    peer: int
    """Global rank of a send's or receive's other side; -1 for none, or not read."""
    issued_ns: int
    started_ns: int
    """0: not known."""
    done_ns: int
    """0: not known, or not yet."""
    bytes: int
    """0 where `signature` is 0."""
    signature: int
    """CRC-32 of kind, dtype and elements; 0: not read at this call."""
    pending: bool
    """`done_ns` will be filled in: `Batch.ended` has this record when it is."""


class PhaseRecord(NamedTuple):
    """The rank is in `phase` from `at_ns` on."""

    phase: Phase
    step: int
    at_ns: int


class StepRecord(NamedTuple):
    """The rank has finished `step`."""

    step: int
    at_ns: int
    duration_ns: int
    """Since the step before; 0 for the first."""
    calls: int
    """Recorded since the step before, of all groups."""


Record = CallRecord | PhaseRecord | StepRecord | Finding


def stamp(index: int) -> int:
    """What the record at `index` (from 0) carries, so that a half-written or overwritten one is known."""
    return (index + 1) & _STAMP


def decode(data: bytes, index: int) -> Record | None:
    """The record at `index` of the stream, from its 64 bytes. None where no correct rank has written it."""
    fields = FIELDS.unpack(data)
    decoder = _DECODERS.get(fields[0])
    return decoder(fields, data) if decoder is not None and fields[12] == stamp(index) else None


def decode_all(data: bytes, first: int) -> list[Record | None]:
    """`decode` of all records that lie in `data`, the index of the first of which is given; for a reader that has many."""
    found: list[Record | None] = []
    for index, fields in enumerate(FIELDS.iter_unpack(data), first):
        if fields[0] == CALL:
            found.append(_call(fields, b"") if fields[12] == (index + 1) & _STAMP else None)
        else:
            at = (index - first) * RECORD
            found.append(decode(data[at : at + RECORD], index))
    return found


def _call(fields: tuple[int, ...], data: bytes) -> CallRecord | None:
    _, code, group, step, position, peer, number, issued, started, done, size, signature, _ = fields
    kind = _KINDS.get(code)
    if kind is None or group >= MAX_GROUPS or step < -1 or not -1 <= peer < MAX_RANK:
        return None
    if not 1 <= number < _TIME or not issued < _TIME or not size < _TIME:
        return None
    return CallRecord(
        group, kind, number, step, position, peer, issued, started and _later(started, issued),
        done and _later(done, issued), size, signature, done == PENDING,
    )  # fmt: skip


def _light(fields: tuple[int, ...], data: bytes) -> CallRecord | None:
    return _call((*fields[:5], -1, *fields[6:8], 0, 0, 0, 0, 0), data)


def _later(time_ns: int, issued_ns: int) -> int:
    return time_ns if issued_ns <= time_ns < _TIME else 0


def _phase(fields: tuple[int, ...], data: bytes) -> PhaseRecord | None:
    phase, step, at_ns = _PHASES.get(fields[1]), fields[3], fields[7]
    return None if phase is None or step < -1 or at_ns >= _TIME else PhaseRecord(phase, step, at_ns)


def _step(fields: tuple[int, ...], data: bytes) -> StepRecord | None:
    step, calls, at_ns, duration = fields[3], fields[4], fields[7], fields[8]
    return (
        None if step < 0 or at_ns >= _TIME or duration > at_ns else StepRecord(step, at_ns, duration, calls)
    )


def _finding(fields: tuple[int, ...], data: bytes) -> Finding | None:
    _, kind, votes, step, _, accused, rank, *_ = fields
    if kind not in _DOUBTS or step < 0 or not -1 <= accused < MAX_RANK or rank >= MAX_RANK:
        return None
    value, typical = (
        number if math.isfinite(number) else 0.0 for number in FLOATS.unpack_from(data, STARTED_AT)
    )
    return Finding(rank, kind, step, accused, value, typical, votes)


_DECODERS = {CALL: _call, LIGHT: _light, PHASE: _phase, STEP: _step, FINDING: _finding}
