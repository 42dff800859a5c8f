"""Deleting old steps and proving new ones beside training: one thread, which only runs while no other wants the processor."""

from __future__ import annotations

import logging
import threading
from typing import TYPE_CHECKING

from stormjib_checkpoint.engine.workers import IDLE, Job, Workers
from stormjib_checkpoint.errors import CheckpointError
from stormjib_checkpoint.retention import Retention

if TYPE_CHECKING:
    from stormjib_checkpoint.storage import Storage

_log = logging.getLogger(__name__)


class Tidier:
    """Retention of one storage, slice after slice: a slice puts the next one at the end of the line, so that whoever asks comes between."""

    def __init__(self, storage: Storage) -> None:
        self._retention = Retention(storage, _log.warning)
        self._workers = Workers("stormjib-tidy", nice=IDLE)
        self._going = False
        self._closing = False
        self._wake = threading.Event()

    def ask(self, generation: str, keep_last: int) -> None:
        """`generation` has committed a step: keep its last `keep_last`."""
        self._put(Job(lambda: self._begin(generation, keep_last)))

    def settled(self) -> None:
        """Until what could be deleted at once is deleted; proving goes on."""
        self._put(Job(lambda: None)).future.result()

    def close(self) -> None:
        """Delete what can be deleted at once, and end. What is half proved is proved by whoever saves next."""
        self._closing = True
        self._wake.set()
        self._workers.close()

    def _put(self, job: Job[None]) -> Job[None]:
        self._workers.put(job)
        self._wake.set()
        return job

    def _begin(self, generation: str, keep_last: int) -> None:
        self._retention.ask(generation, keep_last)
        if not self._going:
            self._go_on()

    def _go_on(self) -> None:
        try:
            self._retention.work()
        except CheckpointError as error:
            _log.warning("old steps are not deleted: %s", error)
        self._going = self._retention.busy and not self._closing
        if self._going:
            self._wake.wait(self._retention.rest_s)
            self._wake.clear()
            self._workers.put(Job(self._go_on))
