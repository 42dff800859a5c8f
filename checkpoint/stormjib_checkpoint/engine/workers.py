"""Threads that outlive a call: starting one in the hot path would cost milliseconds, because the new thread takes the GIL at once."""

from __future__ import annotations

import contextlib
import os
import queue
import threading
from concurrent.futures import Future
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from stormjib_checkpoint.errors import SaveError

if TYPE_CHECKING:
    from collections.abc import Callable

IDLE = 19
T = TypeVar("T")


class Job(Generic[T]):
    """Something to do once, by whoever comes first. How it ends is in `future`."""

    def __init__(self, work: Callable[[], T], future: Future[T] | None = None) -> None:
        self.future: Future[T] = future if future is not None else Future()
        self.future.set_running_or_notify_cancel()  # what is asked is done: a future that a caller cancels could not be set
        self._work: Callable[[], T] | None = work
        self._lock = threading.Lock()

    def do(self) -> None:
        """Do it, unless somebody has begun."""
        with self._lock:
            work, self._work = self._work, None
        if work is None:
            return
        try:
            result = work()
        except BaseException as error:  # whoever asks the future gets it
            self.future.set_exception(spoiled_by(error))
            if is_interrupt(error):
                raise
        else:
            self.future.set_result(result)


class Workers:
    """A few threads that take jobs in order. They do not keep the interpreter alive: whoever has them waits for its jobs."""

    def __init__(self, name: str, threads: int = 1, nice: int = 0) -> None:
        """`nice` is as for processes; `IDLE`: only while no other thread wants the processor."""
        self.threads, self._nice = threads, nice
        self._jobs: queue.SimpleQueue[Job[Any] | None] = queue.SimpleQueue()
        self._threads = [threading.Thread(target=self._run, name=name, daemon=True) for _ in range(threads)]
        for thread in self._threads:
            thread.start()

    def put(self, job: Job[T]) -> Job[T]:
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
        _give_way(self._nice)
        while (job := self._jobs.get()) is not None:
            job.do()
            del job  # or it would keep a whole model alive until the next one


def _give_way(nice: int) -> None:
    me = threading.get_native_id()
    if nice == IDLE:
        with contextlib.suppress(OSError):  # where it is forbidden, being as nice as can be is what is left
            os.sched_setscheduler(me, os.SCHED_IDLE, os.sched_param(0))
            return
    if nice:
        os.setpriority(os.PRIO_PROCESS, me, nice)


def is_interrupt(error: BaseException) -> bool:
    """Whether it is Ctrl-C, or what a handler of a signal has raised: that comes to the main thread only, and is meant for it, whatever
    job it does at that moment."""
    return not isinstance(error, Exception) and threading.current_thread() is threading.main_thread()


def spoiled_by(error: BaseException) -> BaseException:
    """What others hear of a job that has ended so."""
    return SaveError("the thread that saved it was interrupted") if is_interrupt(error) else error


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
