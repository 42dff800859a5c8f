"""What of the state outlives the coordinator's process: one small JSON file, replaced whole, on disk before it is used.

A container that restarts in its pod goes on from it, above all with the generation number: an agent that got an order
for 1.7 must never get another 1.7.
"""

from __future__ import annotations

import os
from contextlib import suppress
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from stormjib_health.verdict import Accusation  # noqa: TC001  the codec reads it at run time
from stormjib_runtime.codec import DecodeError, decode, encode
from stormjib_runtime.state import Adopting, Complete, Idle, Refused, Running, State, Suspended
from stormjib_runtime.wire import Bounds, Cause, Fault, Generation, GenerationId, HistoryEntry

if TYPE_CHECKING:
    from pathlib import Path

    from stormjib_runtime.state import Stage

FILE = "coordinator.json"
MAX_FILE = 64 << 20
_STARTS_BITS = 20


class Unreadable(Refused):
    """The file is there and cannot be read: without the number in it, nothing may be begun."""


@dataclass(frozen=True)
class Kept:
    """The lasting part of a `State`."""

    job_uid: str
    incarnation: int
    number: int = 0
    starts: int = 0
    """How often a process began from this file: orders of each have higher versions than those before."""
    complete: bool = False
    bounds: Bounds | None = None
    generation: Generation | None = None
    history: tuple[HistoryEntry, ...] = ()
    cause: Cause = Cause.START
    fault: Fault | None = None
    """Why the next generation is about to begin, where that is already decided."""
    last_fault: Fault | None = None
    barren: int = 0
    refused: tuple[str, ...] = ()
    final: bool = False
    strikes: dict[str, int] = field(default_factory=dict)
    unwanted: tuple[str, ...] = ()
    most: int | None = None
    accusations: tuple[Accusation, ...] = ()


def keep(state: State, starts: int) -> Kept:
    """What of `state` has to be on disk before anybody acts on it."""
    waiting = _waiting(state.stage)
    return Kept(
        job_uid=state.job_uid,
        incarnation=state.incarnation,
        number=state.number,
        starts=starts,
        complete=isinstance(state.stage, Complete),
        bounds=state.bounds,
        generation=state.generation,
        history=state.history,
        cause=waiting.cause if waiting else Cause.START,
        fault=waiting.fault if waiting else None,
        last_fault=state.last_fault,
        barren=state.barren,
        refused=state.refused,
        final=isinstance(waiting, Idle) and waiting.final,
        strikes=dict(state.strikes),
        unwanted=state.unwanted,
        most=state.most,
        accusations=state.accusations,
    )


def _waiting(stage: Stage) -> Idle | Adopting | None:
    if isinstance(stage, Suspended):
        return stage.then
    return stage if isinstance(stage, Idle | Adopting) else None


def fresh(job_uid: str, incarnation: int, now: float) -> State:
    """A coordinator in a new pod. The first incarnation has nobody before it to take over from."""
    stage = Idle(now) if incarnation <= 1 else Adopting()
    return State(job_uid, incarnation, now, stage)


def revive(kept: Kept, now: float) -> State:
    """A coordinator whose container restarted."""
    stage: Stage = Adopting(now if kept.bounds else None, kept.cause, kept.fault)
    if kept.complete:
        stage = Complete(Running(now, "", None))
    elif kept.final:
        stage = Idle(now, kept.cause, kept.fault, final=True, fresh=False)
    elif kept.incarnation <= 1 and kept.generation is None:
        stage = Idle(now)
    return State(
        job_uid=kept.job_uid,
        incarnation=kept.incarnation,
        started=now,
        stage=stage,
        number=kept.number,
        bounds=kept.bounds,
        generation=kept.generation,
        history=kept.history,
        version=kept.starts << _STARTS_BITS,
        revision=kept.starts << _STARTS_BITS,
        barren=kept.barren,
        refused=kept.refused,
        last_fault=kept.last_fault,
        strikes=kept.strikes,
        unwanted=kept.unwanted,
        most=kept.most,
        accusations=kept.accusations,
    )


def begin(folder: Path, job_uid: str, incarnation: int, now: float) -> tuple[State, int]:
    """The state to start with, and how many processes started before from this file."""
    kept = load(folder)
    newest = GenerationId(incarnation, 0)
    if kept is None or kept.job_uid != job_uid or GenerationId(kept.incarnation, 0) < newest:
        return fresh(job_uid, incarnation, now), 0
    return revive(kept, now), kept.starts


def load(folder: Path) -> Kept | None:
    """The file in `folder`, or None where there is none. Raises Unreadable."""
    try:
        return decode(Kept, (folder / FILE).read_bytes(), limit=MAX_FILE)
    except FileNotFoundError:
        return None
    except (OSError, DecodeError) as error:
        raise Unreadable(500, f"{folder / FILE} cannot be read: {error}") from error


def save(folder: Path, kept: Kept) -> None:
    """Replace the file; when this returns, it is on the disk."""
    temporary = folder / f"{FILE}.tmp"
    with suppress(FileNotFoundError):
        temporary.unlink()
    with open(temporary, "xb") as file:
        file.write(encode(kept))
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(folder / FILE)
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
