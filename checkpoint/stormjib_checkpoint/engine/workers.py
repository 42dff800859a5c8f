"""Threads that outlive a call: starting one in the hot path would cost milliseconds, because the new thread takes the GIL at once."""

from __future__ import annotations

import queue
import threading
from concurrent.futures import Future
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable

Job = tuple["Future[None]", "Callable[[], None]"]


class Workers:
    """A few threads that take jobs in order. They do not keep the interpreter alive: whoever has them waits for its jobs."""

    def __init__(self, name: str, threads: int = 1) -> None:
        self._jobs: queue.SimpleQueue[Job | None] = queue.SimpleQueue()
        self._threads = [threading.Thread(target=self._run, name=name, daemon=True) for _ in range(threads)]
        for thread in self._threads:
            thread.start()

    def do(self, future: Future[None], job: Callable[[], None]) -> None:
        """Some time; how it ends is in `future`."""
        self._jobs.put((future, job))

    def close(self) -> None:
        """Wait for all that was asked, and end."""
        for _ in self._threads:
            self._jobs.put(None)
        for thread in self._threads:
            thread.join()

    def _run(self) -> None:
        while (job := self._jobs.get()) is not None:
            run(*job)
            del job  # or it would keep a whole model alive until the next one


def run(future: Future[None], job: Callable[[], None]) -> None:
    """Do a job, and leave in `future` how it ended."""
    try:
        job()
    except BaseException as error:  # noqa: BLE001  whoever asks the future gets it
        future.set_exception(error)
    else:
        future.set_result(None)


def together(threads: int, job: Callable[[], None]) -> None:
    """The same job in several threads, this one among them; all have ended on return. Raises what one of them raised."""
    others = Workers("stormjib-write", threads - 1)
    futures: list[Future[None]] = [Future() for _ in range(threads - 1)]
    for future in futures:
        others.do(future, job)
    try:
        job()
    finally:
        others.close()
    for future in futures:
        future.result()
