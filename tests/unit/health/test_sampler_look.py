"""One look at real things: a ring, a socket and who holds it, a process; all in this process or a child of it."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from contextlib import closing
from typing import TYPE_CHECKING

import pytest

from stormjib_health.records.groups import GroupsWriter, groups_path
from stormjib_health.records.ring import Recorder, ring_path
from stormjib_health.sampler import look as module
from stormjib_health.sampler.look import Looker, Target
from stormjib_health.sampler.owners import Owners
from stormjib_health.sampler.proc import descendants, open_sockets, ranks_below
from stormjib_health.sampler.sockets import Sockets, SocketsError
from stormjib_health.wire import Kind

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path

    from stormjib_health.sampler.sockets import Socket

ME = Target(rank=3, local_rank=0, pid=os.getpid(), step=7, step_ns=5)


@pytest.fixture
def recorder(tmp_path: Path) -> Iterator[Recorder]:
    Recorder.create(ring_path(tmp_path, 0)).close()
    with closing(Recorder.open(ring_path(tmp_path, 0))) as one:
        yield one


@pytest.fixture
def looker(recorder: Recorder, tmp_path: Path) -> Iterator[Looker]:
    with closing(Looker(tmp_path, {3: 0}, "127.0.0.1:1")) as one:
        yield one


def test_records_come_with_the_groups_that_they_name(
    looker: Looker, recorder: Recorder, tmp_path: Path
) -> None:
    groups = GroupsWriter(groups_path(tmp_path, 0))
    for name in ("default_pg", "dp"):
        index = groups.add(name, (3, 4))
        assert index is not None
        recorder.lane(index).call(Kind.ALL_REDUCE)
        one = looker.look([ME], ()).ranks[3]
        assert [record.group for record in one.batch.records] == [index]  # type: ignore[union-attr]
        assert [(group.name, group.ranks) for group in one.groups if group is not None] == [(name, (3, 4))]
    assert (one.step, one.step_ns) == (7, 5)
    assert one.stat is not None
    assert one.stat.pid == os.getpid()
    after = looker.look([ME], ()).ranks[3]
    assert (after.batch.records, after.groups) == ((), [])


def test_a_rank_without_a_ring_is_looked_at_all_the_same(tmp_path: Path) -> None:
    with closing(Looker(tmp_path, {3: 0}, "")) as looker:
        one = looker.look([ME], ()).ranks[3]
        assert one.stat is not None
        assert (one.batch.records, one.batch.state.count) == ((), 0)
        gone = looker.look([Target(3, 0, 0)], ()).ranks[3]
        assert gone.stat is None


def test_where_a_suspect_sleeps_is_read(looker: Looker) -> None:
    with subprocess.Popen([sys.executable, "-c", "print(flush=True); input()"], stdin=-1, stdout=-1) as child:
        assert child.stdout is not None
        child.stdout.readline()
        target = Target(3, 0, child.pid)
        end = time.monotonic() + 10
        while "pipe" not in looker.look([target], {3}).ranks[3].wchan:
            assert time.monotonic() < end
        assert looker.look([target], ()).ranks[3].wchan == ""
        child.communicate(b"\n")
    assert looker.look([target], {3}).ranks[3].stat is None


def test_connections_are_found_now_and_then_and_followed_always(
    looker: Looker, monkeypatch: pytest.MonkeyPatch
) -> None:
    with (
        socket.create_server(("127.0.0.1", 0)) as server,
        socket.create_connection(server.getsockname()) as one,
    ):
        inode = os.fstat(one.fileno()).st_ino
        held = {found.inode: (rank, found) for rank, found in looker.look([ME], ()).sockets}
        assert held[inode][0] == 3
        one.sendall(b"x" * 10)
        held = {found.inode: (rank, found) for rank, found in looker.look([ME], ()).sockets}
        assert held[inode][1].sent == 10
        with socket.create_connection(server.getsockname()) as other:
            new = os.fstat(other.fileno()).st_ino
            assert new not in {found.inode for _, found in looker.look([ME], ()).sockets}
            monkeypatch.setattr(module, "SELDOM_S", 0.0)
            assert new in {found.inode for _, found in looker.look([ME], ()).sockets}
            monkeypatch.undo()
        assert new not in {found.inode for _, found in looker.look([ME], ()).sockets}


def test_the_connection_to_the_store_is_no_edge(recorder: Recorder, tmp_path: Path) -> None:
    with (
        socket.create_server(("127.0.0.1", 0)) as server,
        socket.create_connection(server.getsockname()) as one,
    ):
        inode = os.fstat(one.fileno()).st_ino
        store = f"127.0.0.1:{server.getsockname()[1]}"
        with closing(Looker(tmp_path, {3: 0}, store)) as looker:
            assert inode not in {found.inode for _, found in looker.look([ME], ()).sockets}


def test_a_sandbox_without_netlink_costs_the_sockets_only(
    looker: Looker, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(_: Sockets) -> None:
        raise SocketsError(1, "not in this sandbox")

    monkeypatch.setattr(Sockets, "dump", refuse)
    reading = looker.look([ME], ())
    assert reading.sockets == []
    assert reading.ranks[3].stat is not None
    assert "not in this sandbox" in looker.problem
    monkeypatch.undo()
    monkeypatch.setattr(module, "SELDOM_S", 0.0)
    looker.look([ME], ())
    assert looker.problem == ""


HOLDS = """
import os, sys
if os.fork() == 0:
    sys.stdin.read()
    os._exit(0)
os.close(int(sys.argv[1]))
sys.stdin.read()
os.wait()
"""


def test_a_connection_belongs_to_the_rank_in_whose_tree_it_is_held(monkeypatch: pytest.MonkeyPatch) -> None:
    """A child of the rank's holds it: found at the second look, and from then on without any."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        one = socket.create_connection(server.getsockname())
        inode, number = os.fstat(one.fileno()).st_ino, one.fileno()
        child = subprocess.Popen([sys.executable, "-c", HOLDS, str(number)], stdin=-1, pass_fds=[number])
        one.close()
        with child, closing(Sockets()) as kernel:
            end = time.monotonic() + 10
            while inode in open_sockets(child.pid) or not descendants(child.pid):
                assert time.monotonic() < end
            owners = Owners()
            assert inode not in {found.inode for _, found in owners.assign(kernel.dump(), {6: child.pid})}
            held = owners.assign(kernel.dump(), {6: child.pid})
            assert [rank for rank, found in held if found.inode == inode] == [6]
            looked: list[int] = []

            def look(pid: int) -> set[int]:
                looked.append(pid)
                return set()

            monkeypatch.setattr("stormjib_health.sampler.owners.open_sockets", look)
            everything = kernel.dump()
            for _ in range(3):
                held = owners.assign(everything, {6: child.pid})
                assert [rank for rank, found in held if found.inode == inode] == [6], "remembered"
            looked.clear()
            owners.assign(everything, {6: child.pid})
            assert looked == [], "what nobody holds is not looked up for ever"
            assert child.stdin is not None
            child.stdin.close()


def test_a_connection_at_rest_is_asked_about_seldom(looker: Looker, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []
    ask = Sockets.look

    def watched(kernel: Sockets, known: Sequence[Socket]) -> list[Socket]:
        asked.extend(seen.inode for seen in known)
        return ask(kernel, known)

    monkeypatch.setattr(Sockets, "look", watched)
    with (
        socket.create_server(("127.0.0.1", 0)) as server,
        socket.create_connection(server.getsockname()) as one,
    ):
        inode = os.fstat(one.fileno()).st_ino

        def found() -> int:
            asked.clear()
            return {seen.inode: seen.sent for _, seen in looker.look([ME], ()).sockets}[inode]

        def anew() -> int:
            with monkeypatch.context() as patch:
                patch.setattr(module, "SELDOM_S", 0.0)
                return found()

        assert (anew(), found()) == (0, 0)
        assert inode in asked, "new ones are lively"
        assert (anew(), found()) == (0, 0)
        assert inode not in asked
        one.sendall(b"x")
        assert (found(), anew(), found()) == (0, 1, 1)
        assert inode in asked


LAUNCHES = """
import os, subprocess, sys
ranks = [
    subprocess.Popen([sys.executable, "-c", "input()"], stdin=-1, env={**os.environ, "RANK": str(rank)})
    for rank in (2, 3)
]
print(*(rank.pid for rank in ranks), flush=True)
input()
for rank in ranks:
    rank.communicate(b"\\n")
"""


def test_ranks_that_a_launcher_started_are_found_below_it(tmp_path: Path) -> None:
    with subprocess.Popen([sys.executable, "-c", LAUNCHES], stdin=-1, stdout=-1) as launcher:
        assert launcher.stdout is not None
        two, three = map(int, launcher.stdout.readline().split())
        targets = [Target(2, 0, launcher.pid), Target(3, 1, launcher.pid)]
        end = time.monotonic() + 10
        while ranks_below(launcher.pid) != {
            2: two,
            3: three,
        }:  # between fork and exec they have its environment
            assert time.monotonic() < end
        with closing(Looker(tmp_path, {2: 0, 3: 1}, "")) as looker:
            ranks = looker.look(targets, ()).ranks
            assert [one.stat and one.stat.pid for one in ranks.values()] == [two, three]
        launcher.communicate(b"\n")
