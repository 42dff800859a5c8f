"""Readings as a sampler's core takes them, made by hand."""

from __future__ import annotations

from stormjib_health.records.layout import CallRecord, PhaseRecord, Record, StepRecord
from stormjib_health.records.ring import Batch, State
from stormjib_health.sampler.proc import Stat
from stormjib_health.sampler.sockets import Socket
from stormjib_health.wire import Kind, Phase

MS = 1_000_000


def call(
    number: int,
    at_ms: float,
    *,
    group: int = 0,
    kind: Kind = Kind.ALL_REDUCE,
    done_ms: float = 0,
    pending: bool = False,
    step: int = -1,
    peer: int = -1,
    signature: int = 0,
) -> CallRecord:
    """One call, issued `at_ms` after the boot."""
    return CallRecord(
        group=group,
        kind=kind,
        number=number,
        step=step,
        position=0,
        peer=peer,
        issued_ns=round(at_ms * MS),
        started_ns=0,
        done_ns=round(done_ms * MS),
        bytes=0,
        signature=signature,
        pending=pending,
    )


def step(number: int, at_ms: float, duration_ms: float = 100) -> StepRecord:
    """One finished step."""
    return StepRecord(number, round(at_ms * MS), round(duration_ms * MS), 0)


def phase(which: Phase, at_ms: float) -> PhaseRecord:
    """The rank enters a phase."""
    return PhaseRecord(which, -1, round(at_ms * MS))


def batch(
    *records: Record, ended: tuple[CallRecord, ...] = (), lost: int = 0, state: State | None = None
) -> Batch:
    """One read of a ring. `ended`: calls of earlier reads."""
    now = tuple(record for record in records if isinstance(record, CallRecord) and record.done_ns)
    return Batch(records, (*ended, *now), lost, state or State(count=1))


def stat(state: str = "S", ticks: int = 0) -> Stat:
    """One line of /proc/PID/stat."""
    return Stat(100, state, 1, ticks)


def connection(inode: int, **fields: int) -> Socket:
    """One healthy connection at 10.0.0.1:INODE, with some numbers changed."""
    identity = inode.to_bytes(2, "big") + (5000).to_bytes(2, "big") + bytes([10, 0, 0, 1]) + bytes(12)
    identity += bytes([10, 0, 0, 2]) + bytes(12) + bytes(4) + inode.to_bytes(8, "little")
    plain = {"rto_us": 204_000, "last_ack_ms": 3, "rtt_us": 150}
    numbers = dict.fromkeys(Socket._fields[3:], 0) | plain | fields
    return Socket(inode, 2, identity, *numbers.values())
