"""One look at everything that is seen of an agent's ranks from outside: rings, sockets, /proc, cgroups. All the I/O."""

from __future__ import annotations

import time
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING

from stormjib_health.records.groups import GroupsReader, groups_path
from stormjib_health.records.layout import CallRecord
from stormjib_health.records.ring import Batch, Reader, ring_path
from stormjib_health.sampler.cgroup import Throttling
from stormjib_health.sampler.core import RankReading, Reading
from stormjib_health.sampler.owners import Owners
from stormjib_health.sampler.proc import HALTED, StatFile, ranks_below, read_wchan
from stormjib_health.sampler.sockets import Sockets, SocketsError

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping, Sequence
    from pathlib import Path

    from stormjib_health.sampler.sockets import Socket
    from stormjib_health.wire import Group

SELDOM_S = 1.0
"""How often all connections are looked at, and throttling is read: both cost more than the rest, and change slowly. In
between only connections are looked at where something happens."""


@dataclass(frozen=True)
class Target:
    """One rank as its agent knows it."""

    rank: int
    local_rank: int
    pid: int
    """0 while it is not started."""
    step: int = -1
    step_ns: int = 0
    """As in `RankReading`."""


class _Ring:
    """A rank's ring and its groups. A rank that was started without them has none."""

    def __init__(self, folder: Path, local_rank: int) -> None:
        self._reader: Reader | None = None
        with suppress(OSError):
            self._reader = Reader.open(ring_path(folder, local_rank))
        self._highest = -1
        """Index of the newest group that a call has named."""
        self._groups = GroupsReader(groups_path(folder, local_rank))

    def read(self) -> tuple[Batch, Sequence[Group | None]]:
        if self._reader is None:
            return Batch(), ()
        batch = self._reader.read()
        known = len(self._groups.groups)
        if self._names_a_group_from(known, batch):
            self._groups.read()
        return batch, self._groups.groups[known:]

    def _names_a_group_from(self, known: int, batch: Batch) -> bool:
        """Whether a call's group may be new: the file is looked at then only."""
        groups = [record.group for record in batch.records if type(record) is CallRecord]
        self._highest = max(self._highest, *groups, -1)
        return self._highest >= known

    def close(self) -> None:
        if self._reader is not None:
            self._reader.close()


class Looker:
    """Looks at the same ranks again and again."""

    def __init__(self, folder: Path, local_ranks: Mapping[int, int], store: str) -> None:
        """`local_ranks` by rank; `folder` is that of their pages. `store` is `host:port` of the generation's store, to
        which every rank is connected: no edge between ranks."""
        self.problem = ""
        """Why the kernel tells nothing about sockets; empty while it does."""
        self._rings = {rank: _Ring(folder, local) for rank, local in local_ranks.items()}
        self._store = store
        self._stats: dict[int, StatFile] = {}
        """By process."""
        self._pids: dict[int, int] = {}
        """Of the ranks, as they were found last."""
        self._kernel = Sockets()
        self._owners = Owners()
        self._known: dict[int, tuple[int, Socket]] = {}
        """By inode: rank and connection, as it was seen last."""
        self._found: dict[int, Socket] = {}
        """As it was when all were looked for last."""
        self._active: list[Socket] = []
        self._throttling = Throttling()
        self._throttled: dict[int, float] = {}
        self._seldom_at = 0.0

    def close(self) -> None:
        self._kernel.close()
        for ring in self._rings.values():
            ring.close()
        for stat in self._stats.values():
            stat.close()

    def look(self, targets: Sequence[Target], suspects: Collection[int]) -> Reading:
        """Everything now. Of `suspects` it is read too where they sleep."""
        now_ns = time.monotonic_ns()
        seldom = now_ns / 1e9 - self._seldom_at >= SELDOM_S
        if seldom:
            self._seldom_at = now_ns / 1e9
            self._pids = _processes(targets)
            self._throttled = self._throttling.read(self._pids.values())
        ranks = {target.rank: self._rank(target, target.rank in suspects) for target in targets}
        try:
            self._look_at_sockets(anew=seldom)
        except SocketsError as error:  # a sandbox may not have it; the rest is worth having
            self._known, self._active, self.problem = {}, [], str(error)
        return Reading(now_ns, ranks, list(self._known.values()))

    def _rank(self, target: Target, suspect: bool) -> RankReading:
        pid = self._pids.get(target.rank, target.pid) if target.pid else 0
        file = self._file(pid) if pid else None
        stat = file.read() if file else None
        batch, groups = self._rings[target.rank].read()
        asleep = stat is not None and (suspect or stat.state in HALTED)
        return RankReading(
            stat=stat,
            batch=batch,
            groups=groups,
            step=target.step,
            step_ns=target.step_ns,
            throttled_s=self._throttled.get(pid, 0.0),
            queued_s=file.queued_s() if file else 0.0,
            wchan=read_wchan(pid) if asleep else "",
        )

    def _file(self, pid: int) -> StatFile:
        if pid not in self._stats:
            self._stats[pid] = StatFile(pid)
        return self._stats[pid]

    def _look_at_sockets(self, *, anew: bool) -> None:
        if anew:
            self._find()
        elif self._active:
            found = {one.inode: one for one in self._kernel.look(self._active)}
            for inode in {one.inode for one in self._active} - found.keys():
                del self._known[inode]
            self._known.update((inode, (self._known[inode][0], one)) for inode, one in found.items())
            self._active = list(found.values())

    def _find(self) -> None:
        """Every connection of every rank, and which of them are worth a question before the next time."""
        before = self._found
        held = self._owners.assign(self._kernel.dump(), self._pids)
        self._known = {
            one.inode: (rank, one) for rank, one in held if self._store not in (one.local, one.remote)
        }
        self._found = {inode: one for inode, (_, one) in self._known.items()}
        self._active = [one for inode, one in self._found.items() if _alive(one, before.get(inode))]
        self.problem = ""


def _processes(targets: Sequence[Target]) -> dict[int, int]:
    """Process by rank. Where all have one, that is a launcher, and theirs are below it."""
    pids = {target.rank: target.pid for target in targets if target.pid}
    launchers = set(pids.values())
    return ranks_below(launchers.pop()) if len(launchers) == 1 < len(pids) else pids


def _alive(one: Socket, before: Socket | None) -> bool:
    """Whether anything happened to a connection, or is still to happen."""
    moved = before is None or (one.sent, one.received) != (before.sent, before.received)
    return moved or bool(one.unread or one.unsent or one.unacked or one.backoff)
