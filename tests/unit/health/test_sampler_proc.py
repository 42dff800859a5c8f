"""What /proc says about processes: states, ages, use of the processor, and who holds a socket."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time

import pytest

from stormjib_health.sampler.proc import (
    Activity,
    Stat,
    StatFile,
    Watch,
    below,
    descendants,
    open_sockets,
    parse_schedule,
    parse_stat,
    read_small,
    read_stat,
    read_wchan,
)


def test_a_name_with_blanks_and_parentheses_is_read_over() -> None:
    line = b"71 (a ) R (b) S 3 71 71 0 -1 4194560 100 0 0 0 25 17 0 0 20 0 1 0 100 0 0"
    assert parse_stat(line) == Stat(pid=71, state="S", parent=3, ticks=42)


def test_own_state_and_none_for_who_is_gone() -> None:
    own = read_stat(os.getpid())
    assert own is not None
    assert (own.pid, own.parent, own.state) == (os.getpid(), os.getppid(), "R")
    assert read_stat(2**22 + 1) is None


def test_a_stopped_process_ages_and_a_running_one_does_not() -> None:
    watch = Watch()
    assert watch.sample(10.0, Stat(1, "S", 0, 0)).state_age_s == 0.0
    assert watch.sample(11.0, Stat(1, "T", 0, 0)).state_age_s == 0.0
    assert watch.sample(12.5, Stat(1, "T", 0, 0)).state_age_s == 1.5
    assert watch.sample(14.0, Stat(1, "S", 0, 0)).state_age_s == 0.0


def test_a_process_that_is_stopped_again_and_again_and_runs_in_between_is_not_stopped() -> None:
    watch = Watch()
    watch.sample(10.0, Stat(1, "T", 0, 50))
    assert watch.sample(10.2, Stat(1, "T", 0, 50)).state_age_s == pytest.approx(0.2)
    assert watch.sample(10.4, Stat(1, "T", 0, 51)).state_age_s == 0.0
    assert watch.sample(10.6, Stat(1, "T", 0, 51)).state_age_s == pytest.approx(0.2)


def test_what_lasted_while_nobody_looked_does_not_count() -> None:
    watch = Watch()
    for tenth in range(20):
        seen = watch.sample(10.0 + tenth / 10, Stat(1, "D", 0, 0))
    assert seen.state_age_s == seen.idle_s == pytest.approx(1.9)
    assert watch.sample(102.0, Stat(1, "D", 0, 0)) == Activity("D", 0.0, 0.0)
    assert watch.sample(103.0, Stat(1, "D", 0, 0)) == Activity("D", 1.0, 1.0)


def test_idle_time_grows_while_no_cpu_is_used_and_ends_with_its_use() -> None:
    watch = Watch()
    ticks = os.sysconf("SC_CLK_TCK")
    assert watch.sample(0.0, Stat(1, "S", 0, 0)).idle_s == 0.0
    assert watch.sample(1.0, Stat(1, "S", 0, ticks)).idle_s == 0.0  # busy
    assert watch.sample(2.0, Stat(1, "S", 0, ticks)).idle_s == 1.0
    assert watch.sample(3.0, Stat(1, "S", 0, ticks + 2)).idle_s == 2.0  # 2 % is nothing
    assert watch.sample(3.1, Stat(1, "S", 0, ticks * 9)).idle_s == pytest.approx(2.1)  # too soon to judge
    assert watch.sample(4.0, Stat(1, "S", 0, ticks * 9)).idle_s == 0.0


def test_the_age_of_a_wait_for_a_device_starts_when_it_is_first_seen() -> None:
    watch = Watch()
    assert watch.sample(10.0, Stat(1, "D", 0, 0)).state_age_s == 0.0
    assert watch.sample(12.0, Stat(1, "D", 0, 0)).state_age_s == 2.0
    assert watch.sample(13.0, Stat(1, "T", 0, 0)).state_age_s == 0.0


def test_everything_below_a_process_is_found_once_although_numbers_were_reused() -> None:
    """A snapshot of /proc is not one moment, so a reused number can make it a circle."""
    family = {
        1: [Stat(2, "S", 1, 0)],
        2: [Stat(3, "S", 2, 0)],
        3: [Stat(2, "S", 3, 0)],
        9: [Stat(8, "S", 9, 0)],
    }
    assert [stat.pid for stat in below(1, family)] == [2, 3]


def test_the_holder_of_a_socket_is_known_by_its_inode() -> None:
    one, other = socket.socketpair()
    with one, other:
        inodes = {os.fstat(side.fileno()).st_ino for side in (one, other)}
        assert inodes <= open_sockets(os.getpid())
    assert not inodes & open_sockets(os.getpid())
    assert open_sockets(2**22 + 1) == set()


def test_where_a_process_sleeps_in_the_kernel() -> None:
    with subprocess.Popen([sys.executable, "-c", "print(flush=True); input()"], stdin=-1, stdout=-1) as child:
        assert child.stdin is not None
        assert child.stdout is not None
        child.stdout.readline()
        deadline = time.monotonic() + 10  # it may sleep somewhere else before
        while "pipe" not in read_wchan(child.pid) and time.monotonic() < deadline:
            os.sched_yield()
        assert "pipe" in read_wchan(child.pid)
        file = StatFile(child.pid)
        assert file.read() == read_stat(child.pid)
        assert child.pid in {stat.pid for stat in descendants(os.getpid())}
        child.stdin.close()
    assert file.read() is None
    file.close()
    assert StatFile(child.pid).read() is None
    assert StatFile(child.pid).queued_s() == 0.0
    assert read_wchan(child.pid) == ""
    assert read_small(f"/proc/{child.pid}/cgroup") == b""


def test_time_on_a_processor_and_the_wait_for_one_may_not_be_kept() -> None:
    assert parse_schedule(b"9123456789 2500000000 812\n") == pytest.approx((9.123456789, 2.5))
    assert parse_schedule(b"0\n") == parse_schedule(b"") == (0.0, 0.0)


def test_two_processes_on_one_processor_wait_for_each_other() -> None:
    cpu = min(os.sched_getaffinity(0))
    burn = f"import os\nos.sched_setaffinity(0, {{{cpu}}})\nwhile True: pass"
    ones = [subprocess.Popen([sys.executable, "-c", burn]) for _ in range(2)]
    file = StatFile(ones[0].pid)
    try:
        deadline = time.monotonic() + 10
        while file.queued_s() < 0.1:
            assert time.monotonic() < deadline, "neither waits for the other"
            time.sleep(0.05)
    finally:
        file.close()
        for one in ones:
            one.kill()
            one.wait()
