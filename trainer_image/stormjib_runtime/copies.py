"""Copies of what is staged on one node in the memory of another: who gives to whom, and the process that does it.

The process is neither a rank nor this agent: it may wait for a network, hash gigabytes and be out of memory without either noticing.
"""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stormjib_health.confirm.transfer import AddressError, parse_address
from stormjib_runtime.checkpoint_child import start_with_lines, with_library
from stormjib_runtime.environment import join_address
from stormjib_runtime.output import LastLines
from stormjib_runtime.processes import kill

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from stormjib_runtime.children import Children
    from stormjib_runtime.output import Outputs
    from stormjib_runtime.settings import Settings
    from stormjib_runtime.wire import Generation, Member

LISTEN_S = 20.0
"""How long registering waits for the address: the members of a generation are told with it."""
AGAIN_S = 5.0
"""Between two lives of the process."""
TURNS = 64
"""At most so many members further on is another node looked for: no node has more slots."""


def keepers(generation: Generation) -> dict[int, Member]:
    """Who keeps the copies of each slot: the same number of members further on for all, so that each keeps one, and the smallest
    number with which the most copies are on another node. Pure."""
    members = [member for member in generation.members if member.copies]
    count = len(members)
    if count < 2:
        return {}
    turn = _turn([member.node for member in members])
    return {member.slot: members[(i + turn) % count] for i, member in enumerate(members)}


def _turn(nodes: Sequence[str]) -> int:
    best, most = 1, -1
    for turn in range(1, min(len(nodes), TURNS + 1)):
        apart = sum(node != nodes[(i + turn) % len(nodes)] for i, node in enumerate(nodes))
        if apart > most:
            best, most = turn, apart
        if most == len(nodes):
            break
    return best


def copying_token(secret: str) -> str:
    """The token of a job's copies, from the token of its agents: that one itself never goes to a process that ranks may look into."""
    return hmac.new(secret.encode(), b"stormjib copies", hashlib.sha256).hexdigest()


def this_node() -> str:
    """Something that is equal for all pods of one node, and for them only: which start of which kernel this is."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return ""


class Copies:
    """The process that gives and keeps copies, started again when it dies."""

    def __init__(
        self,
        children: Children,
        settings: Settings,
        env: Mapping[str, str],
        outputs: Outputs,
        event: Callable[[str], None],
    ) -> None:
        self.pid = 0
        self.copied = -1
        """Newest step of this generation of which a part lies with its keeper; -1 before the first."""
        self._children, self._settings, self._outputs, self._event = children, settings, outputs, event
        self._env = with_library(env)
        self._port = 0
        self._writer: asyncio.WriteTransport | None = None
        self._wanted: dict[str, Any] = {}
        self._task: asyncio.Task[None] | None = None
        self._tried = asyncio.Event()
        """It listens, or has ended: waiting for its address is over."""

    @property
    def address(self) -> str:
        """`host:port` where copies are taken; empty before it listens."""
        return join_address(self._settings.address, self._port) if self._port else ""

    async def start(self) -> None:
        """Start it, and wait until it listens. Where it does not, this agent takes no copies, and says so."""
        self._task = asyncio.get_running_loop().create_task(self._run())
        self._task.add_done_callback(lambda done: done.cancelled() or done.result())  # a bug there is shown
        try:
            async with asyncio.timeout(LISTEN_S):
                await self._tried.wait()
        except TimeoutError:
            self._event(f"CopiesFailed: not listening after {LISTEN_S:.0f} s")

    def begin(self, generation: Generation) -> None:
        """Copies are given and kept as in this generation from now on."""
        self.copied = -1
        mine, pairs = self._settings.slot, keepers(generation)
        host, port = self._address_of(pairs.get(mine))
        self._wanted = {
            "generation": str(generation.id),
            "slot": mine,
            "host": host,
            "port": port,
            "givers": [slot for slot, member in pairs.items() if member.slot == mine],
            "processes": self._settings.processes,
        }
        self._write(self._wanted)

    def _address_of(self, keeper: Member | None) -> tuple[str, int]:
        """Its IP address and port; an empty one where there is nobody to give to. The address is its own word."""
        if keeper is None:
            return "", 0
        try:
            return parse_address(keeper.copies)
        except AddressError as error:
            self._event(
                f"CopiesFailed: slot {keeper.slot} keeps no copies of slot {self._settings.slot}: {error}"
            )
            return "", 0

    def close(self) -> None:
        """End it."""
        if self._task is not None:
            self._task.cancel()
        if self.pid:
            kill(self.pid)

    async def _run(self) -> None:
        while True:
            code = await self._live()
            self._event(f"CopiesFailed: the process that gives and keeps copies exited with {code}")
            await asyncio.sleep(AGAIN_S)

    async def _live(self) -> int:
        """One life of the process; its exit code."""
        settings = self._settings
        ended: asyncio.Future[int] = asyncio.get_running_loop().create_future()
        argv = [
            sys.executable,
            "-m",
            "stormjib_checkpoint.peers",
            str(settings.memory),
            str(settings.copies),
        ]
        tap = self._outputs.pipe("[copies] ", LastLines(), error=True)
        started = start_with_lines(self._children, argv, self._env, tap, lambda code: self._gone(ended, code))
        self.pid = started.pid
        reader, self._writer = await started.connect()
        self._write({"token": copying_token(settings.token), "port": self._port})
        if self._wanted:
            self._write(self._wanted)
        while line := await reader.readline():
            self._said(json.loads(line))
        return await ended

    def _said(self, answer: Mapping[str, Any]) -> None:
        if "port" in answer:
            self._port = answer["port"]
            self._tried.set()
        elif answer["generation"] == self._wanted.get("generation"):
            self.copied = max(self.copied, answer["copied"])

    def _gone(self, ended: asyncio.Future[int], code: int) -> None:
        self.pid = 0
        self._tried.set()
        if self._writer is not None:
            self._writer.close()
        self._writer = None
        if not ended.done():
            ended.set_result(code)

    def _write(self, line: Mapping[str, Any]) -> None:
        if self._writer is not None:
            self._writer.write(json.dumps(line).encode() + b"\n")
