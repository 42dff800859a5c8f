"""The agent's side of the zygote: start it, ask it for forks, hear of exits."""

from __future__ import annotations

import asyncio
import itertools
import json
import os
import socket
import sys
from typing import TYPE_CHECKING, Any

from stormjib_health.sampler.proc import read_stat
from stormjib_runtime.children import Streams
from stormjib_runtime.errors import ZygoteError
from stormjib_runtime.processes import exit_code
from stormjib_runtime.zygote import MAX_MESSAGE

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from stormjib_runtime.children import Children, Exited

KILLED = -9


class Zygote:
    """One running zygote. Wait for `ready` first; it raises ZygoteError when this job cannot have one."""

    def __init__(self, loop: asyncio.AbstractEventLoop, gone: Callable[[], None]) -> None:
        self.pid = 0
        self.ready: asyncio.Future[None] = loop.create_future()
        self._loop = loop
        self._gone = gone
        self._socket, self._theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._socket.setblocking(False)
        self._ids = itertools.count(1)
        self._asked: dict[int, tuple[asyncio.Future[int], Exited]] = {}
        self._forked: dict[int, Exited] = {}

    def start(self, children: Children, env: Mapping[str, str], stderr: int) -> None:
        """Start the process. It imports for seconds; meanwhile the agent goes on."""
        argv = [sys.executable, "-m", "stormjib_runtime.zygote", str(self._theirs.fileno())]
        # One thread at import, whatever ranks shall have: each fork sets its own number.
        env = {**env, "OMP_NUM_THREADS": "1"}
        streams = Streams(stdout=stderr, stderr=stderr)
        self.pid = children.start(
            argv, env, streams, self._exited, keep=(self._theirs.fileno(),), outlive=True
        )
        self._theirs.close()
        self._loop.add_reader(self._socket, self._read)

    async def fork(
        self, command: Sequence[str], env: Mapping[str, str], stdout: int, stderr: int, exited: Exited
    ) -> int:
        """A fork that runs `command`; its pid. `exited` gets its exit code, perhaps before this returns."""
        number = next(self._ids)
        message = {"id": number, "command": list(command), "env": dict(env)}
        data = json.dumps(message).encode()
        if len(data) > MAX_MESSAGE:
            raise ZygoteError(
                f"command and environment of a rank take {len(data)} bytes; the limit is {MAX_MESSAGE}"
            )
        answer: asyncio.Future[int] = self._loop.create_future()
        self._asked[number] = (answer, exited)
        try:
            socket.send_fds(self._socket, [data], [stdout, stderr])
        except OSError as error:
            del self._asked[number]
            raise ZygoteError(f"the zygote has gone: {error}") from error
        # Shielded: a cancelled start still hears of its fork, see `quiet`.
        return await asyncio.shield(answer)

    async def quiet(self) -> None:
        """Wait until every fork that was asked for is there or has failed: then it can be found and ended."""
        if self._asked:
            await asyncio.wait([answer for answer, _ in self._asked.values()])

    def orphaned(self, pid: int, status: int) -> bool:
        """Tell of a fork that fell to the agent because the zygote died; whether it was one of ours."""
        exited = self._forked.pop(pid, None)
        if exited is not None:
            exited(exit_code(status))
        return exited is not None

    def close(self) -> None:
        """Hang up: the zygote ends what it forked, and exits."""
        self._loop.remove_reader(self._socket)
        self._socket.close()

    def _read(self) -> None:
        while True:
            try:
                data = self._socket.recv(MAX_MESSAGE)
            except BlockingIOError:
                return
            except OSError:
                data = b""
            if not data:
                self._loop.remove_reader(self._socket)
                return  # `_exited` says the rest
            self._take(json.loads(data))

    def _take(self, message: dict[str, Any]) -> None:
        if "exited" in message:
            exited = self._forked.pop(message["exited"], None)
            if exited is not None:
                exited(exit_code(message["status"]))
        elif "ready" in message:
            self.ready.set_result(None)
        elif "unfit" in message:
            self.ready.set_exception(ZygoteError(message["unfit"]))
        else:
            self._answer(message)

    def _answer(self, message: dict[str, Any]) -> None:
        answer, exited = self._asked.pop(message["id"])
        if "forked" in message:
            self._forked[message["forked"]] = exited
        if "forked" in message:
            answer.set_result(message["forked"])
        else:
            answer.set_exception(ZygoteError(message["failed"]))
            answer.exception()  # seen: whoever asked may have been cancelled

    def _exited(self, code: int) -> None:
        self._read_rest()
        error = ZygoteError(f"the zygote exited with {code}")
        if not self.ready.done():
            self.ready.set_exception(error)
        for answer, _ in self._asked.values():
            answer.set_exception(error)
            answer.exception()  # seen: whoever asked may have been cancelled
        self._asked.clear()
        # Its forks are the agent's children now, and reaped there, except those it reaped and could not tell about.
        for pid in [pid for pid in self._forked if not _is_child(pid)]:
            self._forked.pop(pid)(KILLED)
        self._gone()

    def _read_rest(self) -> None:
        if self._socket.fileno() >= 0:
            self._read()


def _is_child(pid: int) -> bool:
    stat = read_stat(pid)
    return stat is not None and stat.parent == os.getpid()
