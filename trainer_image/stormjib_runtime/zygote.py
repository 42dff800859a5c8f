"""The zygote: one process per pod that has imported torch and what a rank needs, and forks ranks from that.

Importing costs five CPU-seconds; a fork costs 15 ms. It never imports the user's script, stays single-threaded and
never touches CUDA, and proves both before it says that it is ready, because a fork copies neither other threads nor
the driver's state. It talks to its agent over a socket (SOCK_SEQPACKET, one JSON object a message):

    agent -> zygote   {"id", "command": [...], "env": {...}} with two descriptors, stdout and stderr
    zygote -> agent   {"ready": {...}} | {"unfit": why} | {"id", "forked": pid} | {"id", "failed": why} | {"exited": pid, "status"}

When the socket closes, its agent is dead: it ends what it forked, and exits.
"""

from __future__ import annotations

import ctypes
import gc
import importlib
import json
import os
import random
import select
import signal
import socket
import sys
import time
from dataclasses import dataclass
from typing import Any, NoReturn

from stormjib_health.sampler.proc import descendants
from stormjib_runtime import clock_hook, script
from stormjib_runtime.page import Page
from stormjib_runtime.processes import call_myself, kill

MAX_MESSAGE = 1 << 17

NEEDED = ("torch", "torch.distributed")
PRELOAD = (
    *NEEDED,
    "numpy",
    "torch.distributed.checkpoint",
    "torch.distributed.fsdp",
    "torch.distributed.tensor",
    "torch.distributed.tensor.parallel",
    "torch.nn.parallel",
    "torch.optim",
    "torch.utils.data",
    "stormjib_health.integrity.judge",
    "stormjib_health.probe.numbers",
    "torch._dynamo",  # else the first optimizer step imports it: a second
    "torch.utils._sympy.reference",  # likewise the first backward of FSDP2
    "stormjib_health.probe.install",
    "stormjib_checkpoint.engine",
)
_CUDA_ERROR_NOT_INITIALIZED = 3


@dataclass(frozen=True)
class Request:
    """One fork that the agent asked for."""

    id: int
    command: list[str]
    env: dict[str, str]
    descriptors: list[int]


class Zygote:
    """Forks on request and reports exits, in one thread."""

    def __init__(self, control: socket.socket) -> None:
        self._control = control
        self._children: set[int] = set()
        self._wake, wake = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        self._wake_writer = wake
        signal.signal(signal.SIGCHLD, lambda *_: None)  # a handler, because an ignored signal wakes nobody
        signal.set_wakeup_fd(wake, warn_on_full_buffer=False)

    def say(self, **message: Any) -> None:
        """One message to the agent. A dead agent is noticed by reading."""
        try:
            self._control.send(json.dumps(message).encode())
        except OSError:
            self._end()

    def serve(self) -> Request:
        """Fork ranks until the agent goes. Returns in each forked child, with what it shall become."""
        poll = select.poll()
        poll.register(self._control, select.POLLIN)
        poll.register(self._wake, select.POLLIN)
        while True:
            ready = {descriptor for descriptor, _ in poll.poll()}
            if self._wake in ready:
                self._reap()
            if self._control.fileno() in ready:
                request = self._receive()
                if self._fork(request) == 0:
                    self._forget()
                    return request

    def _receive(self) -> Request:
        try:
            data, descriptors, _, _ = socket.recv_fds(self._control, MAX_MESSAGE, 2)
        except ConnectionResetError:
            data, descriptors = b"", []
        if not data:
            self._end()
        message = json.loads(data)
        return Request(message["id"], message["command"], message["env"], descriptors)

    def _fork(self, request: Request) -> int:
        try:
            pid = os.fork()
        except OSError as error:  # a limit of processes or memory
            self.say(id=request.id, failed=f"fork: {error}")
            pid = -1
        if pid == 0:
            return 0
        for descriptor in request.descriptors:
            os.close(descriptor)
        if pid > 0:
            self._children.add(pid)
            self.say(id=request.id, forked=pid)
        return pid

    def _reap(self) -> None:
        os.read(self._wake, 4096)
        while self._children:
            pid, status = os.waitpid(-1, os.WNOHANG)
            if pid == 0:
                return
            self._children.discard(pid)
            self.say(exited=pid, status=status)

    def _end(self) -> NoReturn:
        """The agent is gone without a word: nothing it had us fork may stay."""
        while left := [stat.pid for stat in descendants(os.getpid()) if stat.state != "Z"]:
            for pid in left:
                kill(pid)
        os._exit(0)

    def _forget(self) -> None:
        """In the child: nothing of the zygote may be seen by the script."""
        signal.set_wakeup_fd(-1)
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        self._control.close()
        os.close(self._wake)
        os.close(self._wake_writer)


def become(request: Request) -> NoReturn:
    """In a forked child: session, descriptors, environment and seeds as in a process started by itself; then the script."""
    os.setsid()
    call_myself(f"rank{request.env['RANK']}" if "RANK" in request.env else request.command[-1].split(".")[-1])
    _take_descriptors(request.descriptors)
    os.environ.update(request.env)
    _reseed()
    if "torch" in sys.modules:
        _set_threads(os.environ.get("OMP_NUM_THREADS", ""))
        page = Page.from_env()
        if page is not None:
            clock_hook.install(page)
            _watch(page)
    script.run(script.parse_command(request.command))


def _watch(page: Page) -> None:
    """Record what this rank calls, into the files beside its page. Training goes on without, and says so."""
    from stormjib_health.probe.install import install  # here: it holds torch

    try:
        install(page.path.parent, int(page.path.name), page.clock)
    except (OSError, ValueError, RuntimeError) as error:
        print(f"stormjib: calls are not recorded: {error}", file=sys.stderr)


def _take_descriptors(descriptors: list[int]) -> None:
    for source, target in zip(descriptors, (1, 2), strict=True):
        os.dup2(source, target)
        os.close(source)
    # Lines leave when they end, although stdout is a pipe: a log that lags tells nothing about a hang.
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(line_buffering=True)  # type: ignore[union-attr]


def _reseed() -> None:
    """What a fresh process draws from the system's entropy, and forks would share. torch's seed is a constant anyway."""
    random.seed()
    if "numpy" in sys.modules:
        import numpy

        numpy.random.seed()
    if "multiprocessing.process" in sys.modules:
        import multiprocessing

        multiprocessing.current_process().authkey = os.urandom(32)


def _set_threads(wanted: str) -> None:
    """torch read OMP_NUM_THREADS when the zygote imported it, and the zygote must have one thread."""
    import torch

    first = wanted.split(",")[0].strip()
    if first.isdecimal() and int(first) not in (0, torch.get_num_threads()):
        torch.set_num_threads(int(first))


def preload() -> None:
    """Import what ranks need. Raises ImportError where torch is not there."""
    for name in PRELOAD:
        try:
            importlib.import_module(name)
        except (
            ImportError
        ) as error:  # another release may lack a module: then the rank that needs it imports it
            if name in NEEDED:
                raise
            print(f"not imported: {error}", file=sys.stderr, flush=True)


def unfit() -> str:
    """Why this process must not fork ranks; empty when it may."""
    threads = len(os.listdir("/proc/self/task"))
    if threads != 1:
        return f"it has {threads} threads after the imports; a fork copies only one"
    if _cuda_is_initialised():
        return "CUDA is initialised after the imports; a fork cannot use it"
    return ""


def _cuda_is_initialised() -> bool:
    with open("/proc/self/maps") as maps:
        loaded = any("libcuda.so" in line for line in maps)
    if not loaded:
        return False
    count = ctypes.c_int()
    answer = ctypes.CDLL("libcuda.so.1").cuDeviceGetCount(ctypes.byref(count))
    return bool(answer != _CUDA_ERROR_NOT_INITIALIZED)


def main() -> None:
    """`python -m stormjib_runtime.zygote FD`: preload, prove, serve; in a forked child, be the rank."""
    if not sys.flags.safe_path:
        sys.path.pop(0)  # the agent's folder, put there by `-m`; each rank puts its script's
    call_myself("zygote")
    zygote = Zygote(socket.socket(fileno=int(sys.argv[1])))
    start = time.monotonic()
    try:
        preload()
        why = unfit()
    except ImportError as error:
        why = f"{type(error).__name__}: {error}"
    if why:
        zygote.say(unfit=why)
        return
    gc.collect()
    gc.freeze()  # collections in ranks look at their own objects only: the imports made a million
    zygote.say(ready={"seconds": round(time.monotonic() - start, 3)})
    request = zygote.serve()
    del zygote
    become(request)


if __name__ == "__main__":
    main()
