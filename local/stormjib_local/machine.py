"""What a cluster asks of this machine and shares with the other clusters on it."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING

from stormjib_local import addresses, network
from stormjib_local.errors import LocalError, NotRoot
from stormjib_local.hosts import MOUNT_POINTS
from stormjib_local.layout import ROOT, Layout
from stormjib_local.processes import PATH, run

if TYPE_CHECKING:
    from collections.abc import Iterator

# Program → Debian's package.
_PROGRAMS = {
    "containerd": "containerd",
    "ctr": "containerd",
    "runc": "runc",
    "ip": "iproute2",
    "nft": "nftables",
    "nsenter": "util-linux",
    "unshare": "util-linux",
    "setsid": "util-linux",
    "mount": "mount",
}
# A node takes about nine inotify instances, and all of root's processes together have 128 by default.
_INOTIFY = Path("/proc/sys/fs/inotify/max_user_instances")
_INSTANCES = 2048


def need_root() -> None:
    """Namespaces, mounts and cgroups are root's."""
    if os.geteuid() != 0:
        raise NotRoot("the local cluster needs root (namespaces, mounts, cgroups): call it with `sudo`")


def need_programs() -> None:
    """What comes from the machine's own distribution."""
    path = f"{os.environ.get('PATH', '')}:{PATH}"
    missing = [package for program, package in _PROGRAMS.items() if not shutil.which(program, path=path)]
    if missing:
        raise LocalError(
            f"please install: {' '.join(sorted(set(missing)))} (Debian's names; `make setup` does it there)"
        )


def clusters() -> list[str]:
    """The names of all clusters that are up."""
    return sorted(path.parent.name.removeprefix("stormjib-") for path in ROOT.glob("stormjib-*/cluster.json"))


def free_index() -> int:
    """For a new cluster; the caller holds the lock on `ROOT`."""
    taken = [_record(name).get("index", -1) for name in clusters()]
    return addresses.pick(taken, network.routes()).index


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Nobody else's turn while we are at it. The folder itself is the lock, so that none stays behind."""
    while (descriptor := _hold(folder)) is None:
        continue
    try:
        yield
    finally:
        with suppress(OSError):
            folder.rmdir()  # if there is nothing in it: a refused `up` leaves nothing
        os.close(descriptor)


def _hold(folder: Path) -> int | None:
    """The folder, locked; None if a `down` removed it under our hands or while we waited."""
    try:
        folder.mkdir(exist_ok=True)
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    except (FileNotFoundError, FileExistsError):
        return None
    fcntl.flock(descriptor, fcntl.LOCK_EX)
    with suppress(FileNotFoundError):
        if os.stat(folder).st_ino == os.fstat(descriptor).st_ino:
            return descriptor
    os.close(descriptor)
    return None


def unmount_below(folder: Path) -> None:
    """Nothing must be mounted in a tree that is about to be removed."""

    def mounted() -> list[str]:
        lines = Path("/proc/self/mountinfo").read_text().splitlines()
        points = [line.split()[4] for line in lines]
        return [point for point in points if point.startswith(f"{folder}/") or point == str(folder)]

    for point in reversed(mounted()):
        run("umount", "-l", point, check=False)
    if left := mounted():
        # Never remove a tree that something of the machine is mounted in.
        raise LocalError(f"still mounted: {', '.join(left)}")


def empty(folder: Path) -> None:
    """Remove all that is in a folder."""
    for path in folder.iterdir():
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink()


def raise_limits() -> int:
    """Room for our daemons' inotify instances; returns what the limit was before any cluster came."""
    now = int(_INOTIFY.read_text())
    if now < _INSTANCES:
        # In a container the setting may be read-only: a few nodes do without.
        with suppress(OSError):
            _INOTIFY.write_text(f"{_INSTANCES}\n")
    return min([now, *(_record(name).get("inotify", now) for name in clusters())])


def restore(inotify: int | None) -> None:
    """When the last cluster has gone: the limit as it was, and no mount points of ours."""
    if clusters():
        return
    for folder in MOUNT_POINTS:
        # Not ours alone: it stays if somebody else keeps something there.
        with suppress(OSError):
            folder.rmdir()
    if inotify is not None:
        with suppress(OSError):
            _INOTIFY.write_text(f"{inotify}\n")


def _record(name: str) -> dict[str, int]:
    record: dict[str, int] = json.loads(Layout(name).record.read_text())
    return record
