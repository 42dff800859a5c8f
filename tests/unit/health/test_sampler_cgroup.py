"""Throttling by both versions of cgroups, from recorded files."""

from __future__ import annotations

import os

import pytest

from stormjib_health.sampler.cgroup import Throttling, stat_path, throttled_s

V1_STAT = b"nr_periods 120\nnr_throttled 35\nthrottled_time 2500000000\nnr_bursts 0\nburst_time 0\n"
V2_STAT = (
    b"usage_usec 81212345\nuser_usec 70112345\nsystem_usec 11100000\ncore_sched.force_idle_usec 0\n"
    b"nr_periods 120\nnr_throttled 35\nthrottled_usec 2500000\nnr_bursts 0\nburst_usec 0\n"
)
V2_NO_QUOTA = b"usage_usec 81212345\nuser_usec 70112345\nsystem_usec 11100000\n"

V1_HOST = """\
31 23 0:28 / /sys/fs/cgroup rw,relatime - tmpfs tmpfs rw,mode=755
32 31 0:29 / /sys/fs/cgroup/cpu,cpuacct rw,relatime shared:9 - cgroup cgroup rw,cpu,cpuacct
34 31 0:31 / /sys/fs/cgroup/cpuset rw,relatime - cgroup cgroup rw,cpuset
41 31 0:38 / /sys/fs/cgroup/unified rw,relatime - cgroup2 cgroup2 rw
"""
V1_POD = """\
612 600 0:29 /kubepods/burstable/podabc/0123 /sys/fs/cgroup/cpu,cpuacct ro,nosuid - cgroup cgroup rw,cpu,cpuacct
614 600 0:31 /kubepods/burstable/podabc/0123 /sys/fs/cgroup/cpuset ro,nosuid - cgroup cgroup rw,cpuset
"""
V1_OWN = """\
12:cpuset:/kubepods/burstable/podabc/0123
4:cpu,cpuacct:/kubepods/burstable/podabc/0123
1:name=systemd:/kubepods/burstable/podabc/0123
0::/
"""
V2_HOST = (
    "35 24 0:30 / /sys/fs/cgroup rw,nosuid shared:4 - cgroup2 cgroup2 rw,nsdelegate,memory_recursiveprot\n"
)
V2_POD = "1093 1087 0:30 / /sys/fs/cgroup ro,nosuid,nodev - cgroup2 cgroup rw,nsdelegate\n"
V2_POD_NO_NAMESPACE = (
    "1093 1087 0:30 /kubepods.slice/pod1.slice/cri-1.scope /sys/fs/cgroup ro - cgroup2 cgroup rw\n"
)


@pytest.mark.parametrize(
    ("stat", "seconds"),
    [
        (V1_STAT, 2.5),
        (V2_STAT, 2.5),
        (V2_NO_QUOTA, 0.0),
        (b"", 0.0),
        (b"throttled_usec x\n", 0.0),
        (b"\xff \n", 0),
    ],
)
def test_both_versions_give_seconds(stat: bytes, seconds: float) -> None:
    assert throttled_s(stat) == pytest.approx(seconds)


@pytest.mark.parametrize(
    ("cgroup", "mountinfo", "path"),
    [
        ("4:cpu,cpuacct:/user/a\n0::/\n", V1_HOST, "/sys/fs/cgroup/cpu,cpuacct/user/a/cpu.stat"),
        (V1_OWN, V1_POD, "/sys/fs/cgroup/cpu,cpuacct/cpu.stat"),
        ("0::/user.slice/user-0.slice\n", V2_HOST, "/sys/fs/cgroup/user.slice/user-0.slice/cpu.stat"),
        ("0::/\n", V2_POD, "/sys/fs/cgroup/cpu.stat"),
        ("0::/kubepods.slice/pod1.slice/cri-1.scope\n", V2_POD_NO_NAMESPACE, "/sys/fs/cgroup/cpu.stat"),
        ("0::/kubepods.slice/pod1.slice/cri-1.scope/in\n", V2_POD_NO_NAMESPACE, "/sys/fs/cgroup/in/cpu.stat"),
        ("0::/../other.slice\n", V2_POD, ""),
        ("1:name=systemd:/x:y\n", V1_POD, ""),
        ("", V2_POD, ""),
        ("0::/\n", "", ""),
    ],
)
def test_the_file_of_the_own_cgroup(cgroup: str, mountinfo: str, path: str) -> None:
    assert stat_path(cgroup, mountinfo) == path


def test_this_machine() -> None:
    found = Throttling().read([os.getpid(), 2**22 + 1])
    assert found.keys() == {os.getpid(), 2**22 + 1}
    assert all(seconds >= 0 for seconds in found.values())
