"""One host of the cluster, the control plane or a node: network, mount and process namespaces of its own.

The first process in a host's process namespace is its power: killing it ends everything in there at once, pods and all,
and with the last process its mounts are gone too. So nothing that kubelet or containerd do can outlive their host.
"""

from __future__ import annotations

import os
import shutil
import signal
import uuid
from pathlib import Path
from typing import TYPE_CHECKING

from stormjib_local import processes
from stormjib_local.errors import CommandFailed, LocalError
from stormjib_local.processes import Process, run, spawn, tail, wait_until

if TYPE_CHECKING:
    from collections.abc import Sequence

    from stormjib_local.layout import Layout

# kubelet sets these for the whole machine if they differ. It sees files of ours that say what it wants to see, so the
# machine keeps its own; the boot id is new with every boot, as on a real node.
_SYSCTLS = {
    "vm/overcommit_memory": "1",
    "vm/panic_on_oom": "0",
    "kernel/panic": "10",
    "kernel/panic_on_oops": "1",
    "kernel/keys/root_maxkeys": "1000000",
    "kernel/keys/root_maxbytes": "25000000",
}


# libcni's cache and kubelet's device plugins: each host has its own, mounted on these folders of the machine.
MOUNT_POINTS = (Path("/var/lib/cni"), Path("/var/lib/kubelet"))


class Host:
    """A host by name."""

    def __init__(self, layout: Layout, name: str) -> None:
        self.layout = layout
        self.name = name
        self.disk = layout.host(name)
        self.run = self.disk / "run"
        """What a reboot empties."""

    @property
    def init(self) -> int | None:
        """The pid of its first process, if it has power."""
        return processes.init_of(self.layout.name, self.name)

    def boot(self) -> None:
        """Give it power, if it has none. Its network must be there."""
        if self.init is not None:
            return
        shutil.rmtree(self.run, ignore_errors=True)
        self.run.mkdir(parents=True)
        spawn(
            [
                "nsenter",
                f"--net=/run/netns/{self.layout.netns(self.name)}",
                *(
                    "unshare",
                    "--mount",
                    "--propagation",
                    "slave",
                    "--pid",
                    "--fork",
                    "--kill-child",
                    "--mount-proc",
                ),
                *("env", "--ignore-signal=CHLD", "sleep", "infinity"),
            ],
            marker=self.layout.marker(self.name, "init"),
            log=self.layout.log(self.name, "init"),
        )
        wait_until(f"booting {self.name}", 10, lambda: self.init is not None, interval=0.01)
        self._mount_own_folders()

    def _mount_own_folders(self) -> None:
        """Its own /run, /var/log and boot id, so that daemons with fixed paths leave nothing on the machine."""
        logs = self.disk / "log"
        logs.mkdir(exist_ok=True)
        facts = self.run / "sys"
        facts.mkdir()
        files = _SYSCTLS | {"kernel/random/boot_id": str(uuid.uuid4())}
        self.inside("mount", "--make-rshared", "/")
        for name, value in files.items():
            if not Path("/proc/sys", name).exists():
                continue
            file = facts / name.replace("/", ".")
            file.write_text(f"{value}\n")
            self.inside("mount", "--bind", file, Path("/proc/sys", name))
        for folder, own in ((logs, "/var/log"), *self._library(), (self.run, "/run")):
            self.inside("mount", "--bind", folder, own)

    def _library(self) -> list[tuple[Path, str]]:
        """What daemons keep in /var/lib whatever they are told."""
        pairs = [(self.run / "lib" / path.name, path) for path in MOUNT_POINTS]
        for source, target in pairs:
            source.mkdir(parents=True)
            target.mkdir(exist_ok=True)
        return [(source, str(target)) for source, target in pairs]

    def inside(self, *argv: str | Path) -> str:
        """Run a program in the host until it ends."""
        return run(*self._enter(), *argv)

    def start(self, component: str, argv: Sequence[str | Path]) -> None:
        """Start a daemon in the host, if it does not run already."""
        if self.running(component):
            return
        spawn(
            [*self._enter(), *argv],
            marker=self.layout.marker(self.name, component),
            log=self.layout.log(self.name, component),
        )

    def running(self, component: str) -> Process | None:
        """The daemon, if it runs."""
        for process in processes.marked(self.layout.name):
            if (process.host, process.component) == (self.name, component) and process.is_component:
                return process
        return None

    def check(self, *components: str) -> None:
        """Complain, with the end of its log, if a daemon that was started is gone."""
        alive = {p.component for p in processes.marked(self.layout.name) if p.host == self.name}
        for component in components:
            if component not in alive:
                log = self.layout.log(self.name, component)
                raise CommandFailed(
                    f"{component} on {self.name} ended; the end of {log}:\n{tail(log.read_text())}"
                )

    def kill(self) -> None:
        """Take its power away."""
        init = self.init
        if init is None:
            return
        os.kill(init, signal.SIGKILL)
        # The kernel lets the first process go only after all others of the namespace are gone.
        wait_until(f"stopping {self.name}", 20, lambda: self.init is None, interval=0.01)

    def _enter(self) -> list[str]:
        init = self.init
        if init is None:
            raise LocalError(f"{self.name} has no power")
        return ["nsenter", "--target", str(init), "--net", "--mount", "--pid", "--"]
