"""The recorder of this process, where the probe is installed. Without it every function here does nothing."""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING

from stormjib_health.wire import Phase

if TYPE_CHECKING:
    from collections.abc import Iterator

    from stormjib_health.records.ring import Recorder
    from stormjib_health.wire import Finding

_recorder: Recorder | None = None


def use(recorder: Recorder | None) -> None:
    """What is said here goes to `recorder` from now on."""
    global _recorder
    _recorder = recorder


def enter(phase: Phase) -> Phase:
    """This rank does `phase` from now on. Returns what it did before."""
    if _recorder is None:
        return Phase.UNKNOWN
    before, _recorder.phase = _recorder.phase, phase
    return before


@contextmanager
def phase(which: Phase) -> Iterator[None]:
    """This rank does `which` inside the block, and after it what it did before."""
    before = enter(which)
    try:
        yield
    finally:
        enter(before)


def tell(finding: Finding) -> None:
    """This rank has found something out about the numbers."""
    if _recorder is not None:
        _recorder.finding(finding)
