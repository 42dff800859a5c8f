"""A group goes on together or not at all: where one member has failed, all raise, and errors of one kind. Pure.

Whoever would raise alone would leave the others waiting for it in the next thing that all do together.
"""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING

from stormjib_checkpoint.errors import (
    CheckpointError,
    DamagedCheckpoint,
    HistoryError,
    MissingCheckpoint,
    StateMismatch,
    StorageError,
)

if TYPE_CHECKING:
    from collections.abc import Iterator

    from stormjib_checkpoint.proof import Group


@contextlib.contextmanager
def agreed(group: Group) -> Iterator[None]:
    """What is done inside every member has done afterwards, or every member raises: who has failed its own error, the others what that
    says, and of several kinds all raise the worst. Every member calls it."""
    problem: CheckpointError | None = None
    try:
        yield
    except CheckpointError as error:
        problem = error
    own = _gravity(problem)
    worst = group.highest([own])[0]
    if not worst:
        return
    told = group.gathered([own, *str(problem or "").encode(errors="backslashreplace")])
    if problem is not None and own == worst:
        raise problem
    member = next(number for number, row in enumerate(told) if row[0] == worst)
    raise _elsewhere(worst, f"rank {member}", bytes(told[member][1:]).decode()) from problem


def _gravity(problem: CheckpointError | None) -> int:
    """Of a step there is another one to take; of a state, a history or a storage there is not."""
    if problem is None:
        return 0
    if isinstance(problem, (DamagedCheckpoint, MissingCheckpoint)):
        return 1
    kinds = (HistoryError, StorageError)
    return next((3 + number for number, kind in enumerate(kinds) if isinstance(problem, kind)), 2)


def _elsewhere(gravity: int, who: str, text: str) -> CheckpointError:
    """What those raise who have nothing of their own to say."""
    if gravity == 4:
        return StorageError(who, text, "Mend it there, and try again.")
    return (DamagedCheckpoint, StateMismatch, HistoryError)[gravity - 1](f"{who}: {text}")
