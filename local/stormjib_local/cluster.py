"""A cluster: what `stormjib local` does, for programs.

cluster = Cluster("dev")
cluster.up(nodes=3, mounts=[repository])
cluster.cut("node-2")
cluster.down()
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path

from stormjib_local import addresses as plan
from stormjib_local import cgroups, control_plane, images, machine, network, node, pki, processes
from stormjib_local.addresses import Addresses
from stormjib_local.control_plane import ControlPlane
from stormjib_local.errors import ApiError, BadRequest, LocalError
from stormjib_local.hosts import Host
from stormjib_local.layout import CONTROL, ROOT, Layout
from stormjib_local.node import Node
from stormjib_local.processes import wait_until
from stormjib_local.tools import Tools

Say = Callable[[str], None]
_NODES = 3
_DEFAULT_ACCOUNT = "/api/v1/namespaces/default/serviceaccounts/default"
_BINARIES = (*control_plane.BINARIES, *node.BINARIES)


@dataclass(frozen=True)
class Record:
    """What the cluster is, as `up` was asked for."""

    index: int
    nodes: int
    mounts: list[str]
    environment: str
    """The Python environment that containers see; containerd reads it once, so it cannot change."""
    inotify: int
    """The machine's limit of inotify instances before any cluster came."""


@dataclass(frozen=True)
class NodeStatus:
    """One node, from outside and from the API's view."""

    name: str
    power: bool
    cable: bool
    ready: bool | None
    missing: tuple[str, ...]
    """Components that do not run."""


class Cluster:
    """The local cluster called `name`, whether it is up or not."""

    def __init__(self, name: str = "dev", say: Say = lambda line: None) -> None:
        self.name = plan.check_name(name)
        self.layout = Layout(self.name)
        self.tools = Tools(say=say)
        self._say = say

    @property
    def kubeconfig(self) -> Path:
        """The administrator's."""
        return self.layout.kubeconfig

    @property
    def shared_folder(self) -> Path:
        """The folder of this machine behind the volumes of class `shared`."""
        return self.layout.shared

    @cached_property
    def kubectl(self) -> Path:
        """The program, of the cluster's own version."""
        return self.tools.find("kubectl")

    @cached_property
    def helm(self) -> Path:
        """The program."""
        return self.tools.find("helm")

    @property
    def record(self) -> Record | None:
        """None where no cluster of this name is up."""
        try:
            return Record(**json.loads(self.layout.record.read_text()))
        except FileNotFoundError:
            return None
        except (TypeError, ValueError) as error:
            raise LocalError(
                f"{self.layout.record} is not of this version ({error}): `stormjib local down --name {self.name}`"
            ) from error

    @property
    def nodes(self) -> list[str]:
        """The names of its nodes."""
        return [each.name for each in self._nodes(self._existing())]

    def up(self, nodes: int | None = None, mounts: Iterable[str | Path] | None = None) -> None:
        """Bring it up, or complete what is missing of it."""
        machine.need_root()
        machine.need_programs()
        for binary in _BINARIES:
            self.tools.find(binary)
        with self._alone():
            record = self.decide(nodes, mounts)
            self._lay_out(record)
            self._start(record)

    def down(self) -> None:
        """Leave nothing of it, whatever state it is in."""
        machine.need_root()
        with self._alone():
            inotify = self._limit_before()
            self._kill_all()
            machine.unmount_below(self.layout.state)
            network.remove(self.layout)
            cgroups.remove(self.layout.cgroup(""))
            machine.empty(self.layout.state)
        machine.restore(inotify)

    def cut(self, node: str) -> None:
        """Pull a node's network cable. What runs on it runs on."""
        self._set_port(node, up=False)

    def heal(self, node: str) -> None:
        """Plug the cable in again."""
        self._set_port(node, up=True)

    def stop(self, node: str) -> None:
        """Take a node's power: every process on it, pods too, is gone at once."""
        machine.need_root()
        self._node(node).stop()

    def start(self, node: str) -> None:
        """Give a node its power back; comes back when it has booted, not when it is Ready."""
        machine.need_root()
        one = self._node(node)
        one.prepare()
        one.join(self.tools.find)

    def status(self) -> list[NodeStatus]:
        """All nodes."""
        record = self._existing()
        ready = self._ready(record)
        result = []
        for each in self._nodes(record):
            missing = tuple(name for name in node.COMPONENTS if not each.host.running(name))
            cable = network.port_up(self.layout, each.name)
            result.append(
                NodeStatus(each.name, each.host.init is not None, cable, ready.get(each.name), missing)
            )
        return result

    def control_missing(self) -> tuple[str, ...]:
        """Components of the control plane that do not run."""
        host = Host(self.layout, CONTROL)
        return tuple(name for name in control_plane.COMPONENTS if not host.running(name))

    def node_of_pid(self, pid: int) -> str | None:
        """On which node a process of this machine runs as part of a pod; None if on none of ours."""
        prefix = f"/{self.layout.cgroup('')}"
        for path in processes.cgroup_lines(pid):
            if path.startswith(prefix):
                return path.removeprefix(prefix).split("/")[0]
        return None

    def pids_of(self, pod_uid: str) -> list[int]:
        """The processes of a pod, as this machine numbers them."""
        return [
            pid
            for pid in processes.pids()
            if any(f"/pod{pod_uid}/" in p for p in processes.cgroup_lines(pid))
        ]

    def decide(self, nodes: int | None, mounts: Iterable[str | Path] | None) -> Record:
        """What the cluster shall be: as asked for if it is new, else as it is, perhaps with more nodes."""
        old = self.record
        wanted = None if mounts is None else [str(path) for path in images.check_mounts(mounts)]
        if old is None:
            count = plan.check_nodes(_NODES if nodes is None else nodes)
            with machine.locked(ROOT):
                made = Record(machine.free_index(), count, wanted or [], sys.prefix, machine.raise_limits())
                self._write(made)
            return made
        for what, is_now, asked in (
            ("set of mounts", old.mounts, old.mounts if wanted is None else wanted),
            ("environment", old.environment, sys.prefix),
        ):
            if is_now != asked:
                raise BadRequest(f"cluster {self.name} is up with another {what} ({is_now}): `down` first")
        count = plan.check_nodes(old.nodes if nodes is None else nodes)
        if count < old.nodes:
            raise BadRequest(f"cluster {self.name} has {old.nodes} nodes, more than {count}: `down` first")
        new = replace(old, nodes=count)
        self._write(new)
        return new

    def _limit_before(self) -> int | None:
        try:
            record = self.record
        except LocalError:
            return None  # `down` must work with any record
        return record.inotify if record else None

    def _write(self, record: Record) -> None:
        pki.write(self.layout.record, json.dumps(asdict(record)).encode(), 0o644)

    def _lay_out(self, record: Record) -> None:
        control = self._control(record)
        control.write_credentials()
        for each in self._nodes(record):
            each.write_credentials(control)
        pki.write(self.layout.images, images.archive())
        spec = images.base_spec(map(Path, record.mounts))
        pki.write(self.layout.base_spec, json.dumps(spec, indent=1).encode())
        self.layout.shared.mkdir(exist_ok=True)
        if owner := os.environ.get("SUDO_UID"):
            os.chown(self.layout.kubeconfig, int(owner), -1)
        network.create_switch(self.layout, Addresses(record.index))

    def _start(self, record: Record) -> None:
        begin = time.monotonic()

        def say(line: str) -> None:
            self._say(f"{line} ({time.monotonic() - begin:.1f} s)")

        control, nodes = self._control(record), self._nodes(record)
        # Nodes boot and import their images while the API server starts; only then do kubelets have whom to talk to.
        with ThreadPoolExecutor(len(nodes)) as pool:
            prepared = [pool.submit(each.prepare) for each in nodes]
            control.start(self.tools.find)
            say("control plane: serving")
            for task in prepared:
                task.result()
            say(f"{len(nodes)} nodes: containerd has the images")
            for each in nodes:
                each.join(self.tools.find)
        self._wait_ready(control, nodes)
        say(f"{len(nodes)} nodes: Ready")
        wait_until("the default ServiceAccount", 60, lambda: self._has(record, _DEFAULT_ACCOUNT), 0.1)
        say("ready for pods")

    def _wait_ready(self, control: ControlPlane, nodes: list[Node]) -> None:
        def all_ready() -> bool:
            control.host.check(*control_plane.COMPONENTS)
            for each in nodes:
                each.host.check(*node.COMPONENTS)
            ready = self._ready(self._existing())
            return all(ready.get(each.name) for each in nodes)

        wait_until(f"nodes Ready (logs are in {self.layout.state / 'logs'})", 90, all_ready, 0.2)

    def _has(self, record: Record, path: str) -> bool:
        try:
            self._control(record).api.get(path)
        except ApiError:
            return False
        return True

    def _ready(self, record: Record) -> dict[str, bool]:
        try:
            found = self._control(record).api.get("/api/v1/nodes")["items"]
        except (ApiError, FileNotFoundError):
            return {}
        return {
            item["metadata"]["name"]: any(
                condition["type"] == "Ready" and condition["status"] == "True"
                for condition in item["status"].get("conditions", ())
            )
            for item in found
        }

    def _kill_all(self) -> None:
        """Everything that carries our marker, or lives in our namespaces or cgroups."""
        for host in {process.host for process in processes.marked(self.name)}:
            # First the power: what a host runs ends with it, in one moment.
            Host(self.layout, host).kill()

        def none_left() -> bool:
            found = {process.pid for process in processes.marked(self.name)}
            found |= set(processes.inside(network.inodes(self.layout), self.layout.cgroup("")))
            for pid in found - {os.getpid()}:
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            return not found

        wait_until(f"ending the processes of {self.name}", 30, none_left)

    def _set_port(self, node: str, *, up: bool) -> None:
        machine.need_root()
        network.set_port(self.layout, self._node(node).name, up=up)

    def _node(self, name: str) -> Node:
        record, number = self._existing(), plan.node_number(name)
        if number > record.nodes:
            raise BadRequest(f"cluster {self.name} has no {name}: it has {record.nodes} nodes")
        return Node(self.layout, Addresses(record.index), number)

    def _nodes(self, record: Record) -> list[Node]:
        return [Node(self.layout, Addresses(record.index), number + 1) for number in range(record.nodes)]

    def _control(self, record: Record) -> ControlPlane:
        return ControlPlane(self.layout, Addresses(record.index))

    def _existing(self) -> Record:
        record = self.record
        if record is None:
            raise LocalError(f"no cluster {self.name} is up: `stormjib local up --name {self.name}`")
        return record

    @contextmanager
    def _alone(self) -> Iterator[None]:
        with machine.locked(self.layout.state):
            yield
