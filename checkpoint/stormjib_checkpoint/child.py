"""The checkpoint child of an agent: `python -m stormjib_checkpoint.child ROOT`, JSON lines in, JSON lines out.

    {"id":1,"do":"scan"}                                   -> {"id":1,"storage":{"generation":"1.3","job_uid":"..."}|null}
    {"id":2,"do":"open","generation":"1.4","parent":"1.3","job_uid":"...","refused":["..."]}
                                                           -> {"id":2,"resume":{...}|null,"notes":[...]}
    {"id":3,"do":"commit","generation":"1.4","world":4,"step":120,"keep_last":3}
                                                           -> {"id":3,"committed":{...}}
    {"id":4,"do":"adopt","memory":"/dev/shm/..."}          -> {"id":4,"adopted":[[step,rank],...],"notes":[...]}
    {"id":5,"do":"adopt_copies","copies":"/dev/shm/..."}   -> the same

Every request gets one answer, `{"id":...,"error":"...","kind":"Superseded"}` where it fails. A commit waits for the
ranks without holding up anything else, so answers may change places. After it old steps are deleted and new ones proved, piece by piece
between requests. Ends when its input ends. Standard library only, but for a store's client, and where hashes are compared: with what the
ranks have hashed with.
"""

from __future__ import annotations

import contextlib
import json
import os
import selectors
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from stormjib_checkpoint.commit import POLL_S, WAIT_S, Pending, commit_step
from stormjib_checkpoint.errors import BadKey, CheckpointError, FormatError, StorageError
from stormjib_checkpoint.history import highest
from stormjib_checkpoint.layout import GenerationId  # noqa: TC001 - records are built from their annotations
from stormjib_checkpoint.node_memory import staged
from stormjib_checkpoint.opening import open_generation
from stormjib_checkpoint.records import Json, build, parse, plain
from stormjib_checkpoint.retention import Retention
from stormjib_checkpoint.stores.urls import open_storage

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

    from stormjib_checkpoint.adopting import Adopted
    from stormjib_checkpoint.format import ResumePoint
    from stormjib_checkpoint.storage import Storage

NICE = 10
"""It shares its pod's processors with ranks, and each of its commits would slow down the step in progress for all of them."""
MAX_REQUEST = 1 << 20
"""A longer line is no request of an agent; it is answered with an error and skipped."""

Answer = dict[str, Json]


@dataclass(frozen=True)
class Open:
    """Open a generation. `parent` is what the coordinator takes for it; the storage's highest one decides."""

    generation: GenerationId
    job_uid: str
    parent: GenerationId | None = None
    refused: tuple[str, ...] = ()


@dataclass(frozen=True)
class Commit:
    """Commit a step once all ranks have left it, then delete what retention allows."""

    generation: GenerationId
    world: int
    step: int
    keep_last: int

    def __post_init__(self) -> None:
        if not 0 < self.world <= 1_000_000:
            raise ValueError(f"a world of {self.world} ranks")


@dataclass(frozen=True)
class Adopt:
    """Finish what ranks of this node, all dead, had staged in its memory."""

    memory: str


@dataclass(frozen=True)
class AdoptCopies:
    """Finish what is kept in this node's memory for other nodes that are dead."""

    copies: str


class _Waiting(NamedTuple):
    identity: Json
    request: Commit
    pending: Pending
    deadline: float


class Child:
    """The requests and the commits that still wait. No threads: whoever owns it calls `handle` and `poll`.

    `tell` gets what a person should know although the request is answered: a damaged step that was passed over.
    """

    def __init__(
        self, storage: Storage, tell: Callable[[str], None], clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._storage = storage
        self._tell = tell
        self._clock = clock
        self._waiting: list[_Waiting] = []
        self._retention = Retention(storage, tell, clock)
        self._tidy_at = 0.0

    @property
    def busy(self) -> bool:
        """Whether `poll` has something to do: commits wait for ranks, or old steps to be deleted and new ones to be proved."""
        return bool(self._waiting) or self._retention.busy

    def handle(self, line: bytes) -> list[Answer]:
        """Answers that are due after one request."""
        identity: Json = None
        try:
            request = parse(line, "request")
            identity = build(int, request.get("id"), "request: id")
            answer = self._do(identity, request)
            return [] if answer is None else [{"id": identity, **answer}]
        except (CheckpointError, OSError) as error:
            return [_failed(identity, error)]

    def poll(self) -> list[Answer]:
        """Answers of commits whose ranks have all come, or whose time is up; oldest step first."""
        answers = []
        for waiting in sorted(self._waiting, key=lambda w: (w.request.generation, w.request.step)):
            answer = self._try(waiting)
            if answer is not None:
                self._waiting.remove(waiting)
                answers.append({"id": waiting.identity, **answer})
        if not answers and self._clock() >= self._tidy_at:
            self._tidy()
        return answers

    def _do(self, identity: Json, request: Mapping[str, Json]) -> Answer | None:
        match request.get("do"):
            case "scan":
                return self._scan()
            case "open":
                return self._open(build(Open, dict(request), "open"))
            case "commit":
                self._commit(identity, build(Commit, dict(request), "commit"))
                return None
            case "adopt":
                return self._adopt(build(Adopt, dict(request), "adopt"))
            case "adopt_copies":
                return self._adopt_copies(build(AdoptCopies, dict(request), "adopt_copies"))
            case other:
                raise FormatError(
                    f"request: do is {str(other)[:40]!r}; wanted scan, open, commit, adopt or adopt_copies"
                )

    def _scan(self) -> Answer:
        record = highest(self._storage)
        if record is None:
            return {"storage": None}
        return {"storage": {"generation": str(record.generation), "job_uid": record.job_uid}}

    def _open(self, request: Open) -> Answer:
        opening = open_generation(self._storage, str(request.generation), request.job_uid, request.refused)
        for note in opening.notes:
            self._tell(note)
        return {"resume": _plain_point(opening.resume), "notes": list(opening.notes)}

    def _adopt(self, request: Adopt) -> Answer:
        if next(staged(Path(request.memory), self._storage.key), None) is None:
            return {"adopted": [], "notes": []}
        from stormjib_checkpoint.adopting import (
            adopt,  # here: where ranks have staged, there is what they hash with
        )

        return _plain_adopted(adopt(self._storage, Path(request.memory)))

    def _adopt_copies(self, request: AdoptCopies) -> Answer:
        from stormjib_checkpoint.adopting import adopt_copies  # here: as above, and where copies are kept

        return _plain_adopted(adopt_copies(self._storage, Path(request.copies)))

    def _commit(self, identity: Json, request: Commit) -> None:
        pending = Pending(self._storage, request.step, str(request.generation), request.world)
        self._waiting.append(_Waiting(identity, request, pending, self._clock() + WAIT_S))

    def _try(self, waiting: _Waiting) -> Answer | None:
        request = waiting.request
        try:
            if not waiting.pending.ready():
                if self._clock() < waiting.deadline:
                    return None
                raise waiting.pending.incomplete()
            point = commit_step(self._storage, str(request.generation), request.world, request.step)
        except (CheckpointError, OSError) as error:
            return _error(error)
        self._retention.ask(str(request.generation), request.keep_last)
        return {"committed": _plain_point(point)}

    def _tidy(self) -> None:
        """One slice. The step is committed whatever becomes of the old ones."""
        try:
            self._retention.work()
        except (CheckpointError, OSError) as error:
            self._tell(f"old steps are not deleted: {error}")
        self._tidy_at = self._clock() + self._retention.rest_s


def _plain_adopted(adopted: Adopted) -> Answer:
    return {"adopted": [list(part) for part in adopted.parts], "notes": list(adopted.notes)}


def _plain_point(point: ResumePoint | None) -> Json:
    return None if point is None else plain(point)


def _failed(identity: Json, error: Exception) -> Answer:
    return {"id": identity, **_error(error)}


def _error(error: Exception) -> Answer:
    kind = type(error).__name__ if isinstance(error, CheckpointError) else StorageError.__name__
    return {"error": str(error), "kind": kind}


class Lines:
    """Whole lines out of a stream of bytes; one that is too long comes out cut, as what it is: no request."""

    def __init__(self) -> None:
        self._rest = b""
        self._skipping = False

    def feed(self, data: bytes) -> Iterator[bytes]:
        """The lines that are complete now."""
        self._rest += data
        while b"\n" in self._rest:
            line, _, self._rest = self._rest.partition(b"\n")
            if not self._skipping and line.strip():
                yield line
            self._skipping = False
        if len(self._rest) > MAX_REQUEST:
            if not self._skipping:
                yield self._rest[:64]
            self._skipping, self._rest = True, b""


def serve(child: Child, requests: int, answers: int) -> None:
    """Answer until the input ends. A commit that waits then is left to the next generation, which finishes it."""
    lines = Lines()
    with selectors.DefaultSelector() as selector:
        selector.register(requests, selectors.EVENT_READ)
        while True:
            if selector.select(POLL_S if child.busy else None):
                data = os.read(requests, 65536)
                if not data:
                    return
                for line in lines.feed(data):
                    _send(answers, child.handle(line))
            _send(answers, child.poll())


def _send(descriptor: int, answers: list[dict[str, Any]]) -> None:
    for answer in answers:
        data = memoryview(json.dumps(answer, separators=(",", ":")).encode() + b"\n")
        while data:
            data = data[os.write(descriptor, data) :]


def _to_log(note: str) -> None:
    print(note, file=sys.stderr, flush=True)


def main() -> None:
    """Entry point: the root of the job's checkpoints, a folder or a URL, is the only argument."""
    if len(sys.argv) != 2:
        sys.exit("usage: python -m stormjib_checkpoint.child ROOT")
    try:
        storage = open_storage(sys.argv[1])
    except (StorageError, BadKey) as error:
        sys.exit(str(error))
    os.setpriority(os.PRIO_PROCESS, 0, NICE)
    with contextlib.suppress(BrokenPipeError):  # the agent is gone, and with it everybody who could ask
        serve(Child(storage, _to_log), sys.stdin.fileno(), sys.stdout.fileno())


if __name__ == "__main__":
    main()
