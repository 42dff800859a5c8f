"""Client of the checkpoint child, the only process of an agent that touches the storage (its protocol: JSON lines).

The child runs `stormjib_checkpoint` with dependencies of its own; here only plain records go back and forth.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import os
import sys
from typing import TYPE_CHECKING, Any, NamedTuple

from stormjib_runtime.children import Streams
from stormjib_runtime.errors import CheckpointError
from stormjib_runtime.output import LastLines
from stormjib_runtime.processes import kill
from stormjib_runtime.wire import GenerationId, ResumePoint, StorageFinding

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from stormjib_runtime.children import Children, Exited
    from stormjib_runtime.output import Outputs, Tap

LIBRARY = "/opt/stormjib/checkpoint"
"""Where the init container puts the library; where it is missing, it is installed beside the runtime."""
LIMIT = 1 << 20


class Started(NamedTuple):
    """A process that reads lines and answers in lines, and our ends of its pipes."""

    pid: int
    answers: int
    requests: int

    async def connect(self) -> tuple[asyncio.StreamReader, asyncio.WriteTransport]:
        """Its answers, and where requests are written."""
        loop, reader = asyncio.get_running_loop(), asyncio.StreamReader(limit=LIMIT)
        pipes = os.fdopen(self.answers, "rb", 0), os.fdopen(self.requests, "wb", 0)
        await loop.connect_read_pipe(lambda: asyncio.StreamReaderProtocol(reader), pipes[0])
        writer, _ = await loop.connect_write_pipe(asyncio.BaseProtocol, pipes[1])
        return reader, writer


def start_with_lines(
    children: Children, argv: Sequence[str], env: Mapping[str, str], tap: Tap, exited: Exited
) -> Started:
    """Start it; what it says on stderr goes to `tap`."""
    (their_in, our_out), (our_in, their_out) = os.pipe2(os.O_CLOEXEC), os.pipe2(os.O_CLOEXEC)
    pid = children.start(argv, env, Streams(their_in, their_out, tap.writer), exited)
    tap.started()
    os.close(their_in)
    os.close(their_out)
    return Started(pid, our_in, our_out)


class CheckpointChild:
    """Starts the child when it is first asked, and again after it died."""

    def __init__(self, children: Children, root: str, env: Mapping[str, str], outputs: Outputs) -> None:
        self.pid = 0
        self._root = root
        self._children = children
        self._env = with_library(env)
        self._outputs = outputs
        self._ids = itertools.count(1)
        self._asked: dict[int, asyncio.Future[dict[str, Any]]] = {}
        self._writer: asyncio.WriteTransport | None = None
        self._reading: asyncio.Task[None] | None = None

    async def scan(self) -> StorageFinding | None:
        """The highest generation on the storage."""
        found = (await self._ask(do="scan")).get("storage")
        return None if found is None else StorageFinding(_generation(found["generation"]), found["job_uid"])

    async def open(
        self, generation: GenerationId, parent: GenerationId | None, job_uid: str, refused: tuple[str, ...]
    ) -> ResumePoint | None:
        """Write the generation's own file; the step to resume from."""
        answer = await self._ask(
            do="open",
            generation=str(generation),
            parent=None if parent is None else str(parent),
            job_uid=job_uid,
            refused=list(refused),
        )
        return _point(answer.get("resume"))

    async def commit(self, generation: GenerationId, world: int, step: int, keep_last: int) -> ResumePoint:
        """Make `step` count. Waits until every rank's file is there."""
        answer = await self._ask(
            do="commit", generation=str(generation), world=world, step=step, keep_last=keep_last
        )
        point = _point(answer.get("committed"))
        if point is None:
            raise CheckpointError(f"commit of step {step}: the child answered nothing")
        return point

    async def adopt(self, memory: str) -> tuple[dict[int, list[int]], list[str]]:
        """Finish what dead ranks had staged in this folder: step -> ranks that are on the storage now, and what was lost, and why."""
        return _adopted(await self._ask(do="adopt", memory=memory))

    async def adopt_copies(self, copies: str) -> tuple[dict[int, list[int]], list[str]]:
        """As `adopt`, of what this node keeps in this folder for other nodes that are dead."""
        return _adopted(await self._ask(do="adopt_copies", copies=copies))

    def close(self) -> None:
        """End the child. A commit that is cut off is finished by the next generation."""
        if self.pid:
            kill(self.pid)

    async def _ask(self, **request: Any) -> dict[str, Any]:
        await self._start()
        number = next(self._ids)
        answer: asyncio.Future[dict[str, Any]] = asyncio.get_running_loop().create_future()
        self._asked[number] = answer
        if self._writer is not None:
            self._writer.write(json.dumps({"id": number, **request}).encode() + b"\n")
        try:
            reply = await answer
        finally:
            self._asked.pop(number, None)
        if "error" in reply:
            raise CheckpointError(f"{request['do']}: {reply['error']}")
        return reply

    async def _start(self) -> None:
        if self.pid:
            return
        argv = [sys.executable, "-m", "stormjib_checkpoint.child", self._root]
        lines = LastLines()
        tap = self._outputs.pipe("[checkpoint] ", lines, error=True)
        started = start_with_lines(
            self._children, argv, self._env, tap, lambda code: self._exited(code, tap, lines)
        )
        self.pid = started.pid
        reader, self._writer = await started.connect()
        self._reading = asyncio.get_running_loop().create_task(self._read(reader))

    async def _read(self, reader: asyncio.StreamReader) -> None:
        with contextlib.suppress(
            ValueError
        ):  # a line that is too long or no JSON: the child is broken, and ends
            while line := await reader.readline():
                reply = json.loads(line)
                answer = self._asked.get(reply["id"])
                if answer is not None and not answer.done():
                    answer.set_result(reply)
        self.close()

    def _exited(self, code: int, tap: Tap, lines: LastLines) -> None:
        """Whoever asked hears its last words: a storage that refuses it is named there, with the fix."""
        self.pid = 0
        if self._writer is not None:
            self._writer.close()
        tap.read()
        said = f": {lines.text}" if lines.text else ""
        for answer in self._asked.values():
            if not answer.done():
                answer.set_result({"error": f"the checkpoint child exited with {code}{said}"})


def with_library(env: Mapping[str, str]) -> dict[str, str]:
    """`env` with the library's folder before all others, where there is one."""
    if not os.path.isdir(LIBRARY):
        return dict(env)
    rest = env.get("PYTHONPATH", "")
    return {**env, "PYTHONPATH": f"{LIBRARY}{os.pathsep}{rest}" if rest else LIBRARY}


def _adopted(answer: Mapping[str, Any]) -> tuple[dict[int, list[int]], list[str]]:
    steps: dict[int, list[int]] = {}
    for step, rank in answer.get("adopted", []):
        steps.setdefault(int(step), []).append(int(rank))
    return steps, [str(note) for note in answer.get("notes", [])]


def _generation(text: Any) -> GenerationId:
    try:
        return GenerationId.parse(text)
    except (ValueError, AttributeError) as error:
        raise CheckpointError(f"the child answered generation {text!r}: {error}") from error


def _point(plain: Any) -> ResumePoint | None:
    """The child's {step, generation as text, digest}; `ResumePoint` on the wire spells its generation out."""
    if plain is None:
        return None
    try:
        return ResumePoint(int(plain["step"]), _generation(plain["generation"]), str(plain["digest"]))
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"the child answered {plain!r}, which is no resume point") from error
