"""Threads that outlive a call: starting one in the hot path would cost milliseconds, because the new thread takes the GIL at once."""

from __future__ import annotations

import queue
import threading
from concurrent.futures import Future
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable


class Job:
    """Something to do once, by whoever comes first. How it ends is in `future`."""

    def __init__(self, work: Callable[[], None], future: Future[None] | None = None) -> None:
        self.future: Future[None] = future if future is not None else Future()
        self.future.set_running_or_notify_cancel()  # what is asked is done: a future that a caller cancels could not be set
        self._work: Callable[[], None] | None = work
        self._lock = threading.Lock()

    def do(self) -> None:
        """Do it, unless somebody has begun."""
        with self._lock:
            work, self._work = self._work, None
        if work is None:
            return
        try:
            work()
        except BaseException as error:  # noqa: BLE001  whoever asks the future gets it
            self.future.set_exception(error)
        else:
            self.future.set_result(None)


class Workers:
    """A few threads that take jobs in order. They do not keep the interpreter alive: whoever has them waits for its jobs."""

    def __init__(self, name: str, threads: int = 1) -> None:
        self._jobs: queue.SimpleQueue[Job | None] = queue.SimpleQueue()
        self._threads = [threading.Thread(target=self._run, name=name, daemon=True) for _ in range(threads)]
        for thread in self._threads:
            thread.start()

    def put(self, job: Job) -> Job:
        """Have it done some time."""
        self._jobs.put(job)
        return job

    def close(self) -> None:
        """Wait for all that was asked, and end."""
        for _ in self._threads:
            self._jobs.put(None)
        for thread in self._threads:
            thread.join()

    def _run(self) -> None:
        while (job := self._jobs.get()) is not None:
            job.do()
            del job  # or it would keep a whole model alive until the next one


def together(threads: int, work: Callable[[], None]) -> None:
    """The same work in several threads, this one among them; all have ended on return. Raises what one of them raised."""
    others = Workers("stormjib-write", threads - 1)
    jobs = [others.put(Job(work)) for _ in range(threads - 1)]
    try:
        work()
    finally:
        others.close()
    for job in jobs:
        job.future.result()
