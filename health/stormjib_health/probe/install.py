"""Puts the probe into this process. Imports torch: a zygote has done that before it forks."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from stormjib_health.probe import current, groups, hooks, phases, wrapper
from stormjib_health.records import stack
from stormjib_health.records.groups import GroupsWriter, groups_path
from stormjib_health.records.ring import Recorder, ring_path
from stormjib_health.wire import Phase

if TYPE_CHECKING:
    from pathlib import Path


def install(folder: Path, local_rank: int, clock: tuple[memoryview, memoryview] | None = None) -> Recorder:
    """Record this rank into the ring that its agent made in `folder`, from now on. `clock` is two 64-bit words: the last
    finished step and when that was; without it the caller tells steps with `Recorder.finished`.

    Raises RingError or OSError where there is no ring.
    """
    recorder = Recorder.open(ring_path(folder, local_rank))
    if clock is not None:
        recorder.follow(*clock)
    os.register_at_fork(after_in_child=recorder.detach)
    stack.install(stack.stack_path(folder, local_rank))
    watch = groups.Watch(recorder, GroupsWriter(groups_path(folder, local_rank)))
    (hooks if hooks.available() else wrapper).install(watch)
    phases.install(recorder)
    recorder.phase = Phase.START
    current.use(recorder)
    return recorder
