"""The folder of a node in the machine's cgroups: one per hierarchy in version 1, a single one in version 2."""

from __future__ import annotations

import os
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from stormjib_local.errors import LocalError
from stormjib_local.processes import wait_until

if TYPE_CHECKING:
    from collections.abc import Iterable

# What kubelet wants to find enabled in a version 2 folder (those of them that the machine has).
_WANTED = ("cpuset", "cpu", "io", "memory", "hugetlb", "pids")


@dataclass(frozen=True)
class Hierarchy:
    """One mounted cgroup file system."""

    mount: Path
    version: int
    controllers: frozenset[str]


def parse(mountinfo: str) -> list[Hierarchy]:
    """The hierarchies in the text of /proc/self/mountinfo."""
    found = {}
    for line in mountinfo.splitlines():
        left, _, right = line.partition(" - ")
        kind, _, options = ([*right.split(" ", 2), "", ""])[:3]
        if kind in ("cgroup", "cgroup2"):
            mount = Path(left.split()[4])
            found[mount] = Hierarchy(mount, 2 if kind == "cgroup2" else 1, frozenset(options.split(",")))
    return list(found.values())


def used(hierarchies: Iterable[Hierarchy]) -> list[Hierarchy]:
    """Those that a kubelet works with: all of version 1, or version 2 alone (in a hybrid it holds no controller)."""
    listed = list(hierarchies)
    first = [h for h in listed if h.version == 1]
    return first or listed


def hierarchies() -> list[Hierarchy]:
    """What this machine has mounted."""
    return parse(Path("/proc/self/mountinfo").read_text())


def create(name: str) -> None:
    """Make the folder of a node, before its kubelet starts."""
    for hierarchy in used(hierarchies()):
        folder = hierarchy.mount / name
        if hierarchy.version == 2:
            _delegate(hierarchy.mount)
        folder.mkdir(exist_ok=True)
        if "cpuset" in hierarchy.controllers:
            # A new cpuset of version 1 is empty, and nothing can run in it.
            for file in ("cpuset.cpus", "cpuset.mems"):
                (folder / file).write_text((hierarchy.mount / file).read_text())


def _delegate(root: Path) -> None:
    have = (root / "cgroup.controllers").read_text().split()
    enabled = (root / "cgroup.subtree_control").read_text().split()
    for controller in _WANTED:
        if controller in have and controller not in enabled:
            try:
                (root / "cgroup.subtree_control").write_text(f"+{controller}")
            except OSError as error:
                raise LocalError(
                    f"cannot enable the cgroup controller {controller} in {root}: {error}. Inside a container, give "
                    "it its own cgroup namespace and let it write there"
                ) from error


def remove(prefix: str) -> None:
    """Remove the folders that begin with `prefix`, whatever lies below them; their processes must be gone."""
    for hierarchy in hierarchies():
        for folder in hierarchy.mount.glob(f"{prefix}*"):
            # The kernel keeps a folder busy until the last exit has been accounted.
            wait_until(f"removing {folder}", 10, partial(_remove_tree, folder))


def _remove_tree(top: Path) -> bool:
    for folder, _, _ in os.walk(top, topdown=False):
        try:
            os.rmdir(folder)
        except FileNotFoundError:
            continue
        except OSError:
            return False
    return not top.exists()
