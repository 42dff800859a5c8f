"""Where a node's cgroup lies, on machines of version 1, of version 2 and of both."""

from __future__ import annotations

from pathlib import Path

import pytest

from stormjib_local import cgroups
from stormjib_local.cgroups import Hierarchy

V2 = "30 23 0:27 / /sys/fs/cgroup rw,nosuid,nodev,noexec,relatime shared:9 - cgroup2 cgroup2 rw,nsdelegate\n"
V1 = (
    "32 31 0:29 / /sys/fs/cgroup/cpu,cpuacct rw,relatime - cgroup cgroup rw,cpu,cpuacct\n"
    "34 31 0:31 / /sys/fs/cgroup/cpuset rw,relatime shared:4 master:1 - cgroup cgroup rw,cpuset\n"
    "40 31 0:37 / /sys/fs/cgroup/systemd rw,relatime - cgroup cgroup rw,name=systemd\n"
)
HYBRID = V1 + "41 31 0:38 / /sys/fs/cgroup/unified rw,relatime - cgroup2 cgroup2 rw\n"
OTHER = "22 27 0:21 / /proc rw,relatime - proc proc rw\n27 1 254:0 / / rw - ext4 /dev/vda rw\n"


@pytest.mark.parametrize(
    ("text", "mounts"),
    [
        (V2, ["/sys/fs/cgroup"]),
        (V1, ["/sys/fs/cgroup/cpu,cpuacct", "/sys/fs/cgroup/cpuset", "/sys/fs/cgroup/systemd"]),
        (HYBRID, ["/sys/fs/cgroup/cpu,cpuacct", "/sys/fs/cgroup/cpuset", "/sys/fs/cgroup/systemd"]),
    ],
)
def test_the_hierarchies_that_a_kubelet_uses(text: str, mounts: list[str]) -> None:
    used = cgroups.used(cgroups.parse(OTHER + text))
    assert [str(hierarchy.mount) for hierarchy in used] == mounts


def test_a_new_cpuset_of_version_1_is_filled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "cpuset.cpus").write_text("0-1\n")
    (tmp_path / "cpuset.mems").write_text("0\n")
    monkeypatch.setattr(cgroups, "hierarchies", lambda: [Hierarchy(tmp_path, 1, frozenset({"cpuset"}))])
    cgroups.create("node")
    cgroups.create("node")
    assert (tmp_path / "node" / "cpuset.cpus").read_text() == "0-1\n"


def test_version_2_enables_what_the_kubelet_asks_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "cgroup.controllers").write_text("cpuset cpu io memory pids rdma\n")
    written: list[str] = []
    real = Path.write_text

    def write(path: Path, text: str) -> int:
        if path.name == "cgroup.subtree_control":
            written.append(text)
        return real(path, text)

    (tmp_path / "cgroup.subtree_control").write_text("memory pids\n")
    monkeypatch.setattr(Path, "write_text", write)
    monkeypatch.setattr(cgroups, "hierarchies", lambda: [Hierarchy(tmp_path, 2, frozenset())])
    cgroups.create("node")
    assert written == ["+cpuset", "+cpu", "+io"]
    assert (tmp_path / "node").is_dir()


def test_removal_goes_bottom_up_and_leaves_others_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "sj-a-node-1" / "kubepods" / "pod1" / "c1").mkdir(parents=True)
    (tmp_path / "sj-ab-node-1").mkdir()
    monkeypatch.setattr(cgroups, "hierarchies", lambda: [Hierarchy(tmp_path, 2, frozenset())])
    cgroups.remove("sj-a-")
    assert [path.name for path in tmp_path.iterdir()] == ["sj-ab-node-1"]
