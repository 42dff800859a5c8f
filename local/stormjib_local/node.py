"""A node: containerd, kubelet and kube-proxy on a host of their own."""

from __future__ import annotations

import json
import os
import socket
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from stormjib_local import cgroups, network, pki
from stormjib_local.errors import LocalError
from stormjib_local.hosts import Host
from stormjib_local.images import PAUSE_IMAGE
from stormjib_local.pki import Authority
from stormjib_local.processes import run, wait_until

if TYPE_CHECKING:
    from collections.abc import Callable

    from stormjib_local.addresses import Addresses
    from stormjib_local.control_plane import ControlPlane
    from stormjib_local.layout import Layout

BINARIES = ("kubelet", "kube-proxy")
COMPONENTS = ("containerd", *BINARIES)
_PLUGINS = (Path("/usr/lib/cni"), Path("/opt/cni/bin"))


@dataclass(frozen=True)
class Node:
    """Node `number` of one cluster."""

    layout: Layout
    addresses: Addresses
    number: int

    @property
    def name(self) -> str:
        """As the API calls it."""
        return f"node-{self.number}"

    @property
    def host(self) -> Host:
        """Where it runs."""
        return Host(self.layout, self.name)

    @property
    def _socket(self) -> Path:
        return self.host.run / "containerd.sock"

    def write_credentials(self, control: ControlPlane) -> None:
        """A kubelet's and a kube-proxy's own, never the administrator's."""
        authority = Authority.keep(self.layout.pki, self.layout.name)
        serving = f"{self.name}-serving"
        if not (self.layout.pki / f"{serving}.key").exists():
            authority.issue(
                f"system:node:{self.name}", hosts=(self.name,), addresses=(self.addresses.node(self.number),)
            ).write(self.layout.pki, serving)
        control.credential(authority, self.name, f"system:node:{self.name}", ("system:nodes",))
        control.credential(authority, f"{self.name}-proxy", "system:kube-proxy")

    def prepare(self) -> None:
        """Power, network and containerd with the images: all that needs no API server."""
        network.plug_in(self.layout, self.addresses, self.name, self.number)
        cgroups.create(self.layout.cgroup(self.name))
        self.host.boot()
        if self.host.running("containerd") and self._answers():
            return  # with its images
        self._write_configuration()
        self.host.start("containerd", ["containerd", "-c", self.host.disk / "containerd.toml"])
        wait_until(f"containerd of {self.name}", 30, self._answers)
        run("ctr", "-a", self._socket, "-n", "k8s.io", "image", "import", self.layout.images)

    def join(self, find: Callable[[str], Path]) -> None:
        """kubelet and kube-proxy; the API server should serve by now."""
        disk = self.host.disk
        self.host.start(
            "kubelet",
            [
                find("kubelet"),
                f"--config={disk / 'kubelet.yaml'}",
                f"--kubeconfig={self.layout.credential(self.name)}",
                f"--hostname-override={self.name}",
                f"--node-ip={self.addresses.node(self.number)}",
                f"--root-dir={disk / 'kubelet'}",
                f"--cert-dir={disk / 'pki'}",
            ],
        )
        self.host.start("kube-proxy", [find("kube-proxy"), f"--config={disk / 'proxy.yaml'}"])

    def stop(self) -> None:
        """As if somebody pulled the power cord. Its disk stays."""
        self.host.kill()
        network.unplug(self.layout, self.name)

    def _answers(self) -> bool:
        self.host.check("containerd")
        with socket.socket(socket.AF_UNIX) as probe:
            return probe.connect_ex(str(self._socket)) == 0

    def _write_configuration(self) -> None:
        disk = self.host.disk
        pki.write(disk / "containerd.toml", self.containerd_configuration().encode())
        pki.write(disk / "cni" / "10-pods.conflist", json.dumps(self.cni_configuration()).encode())
        pki.write(disk / "resolv.conf", b"nameserver 127.0.0.1\n", 0o644)
        pki.write(disk / "kubelet.yaml", yaml.safe_dump(self.kubelet_configuration()).encode())
        pki.write(disk / "proxy.yaml", yaml.safe_dump(self.proxy_configuration()).encode())

    def containerd_configuration(self) -> str:
        disk, temporary = self.host.disk, self.host.run
        return f"""\
version = 2
root = "{disk / "containerd"}"
state = "{temporary / "containerd"}"
temp = "{temporary / "tmp"}"
[grpc]
  address = "{self._socket}"
[plugins."io.containerd.internal.v1.opt"]
  path = "{disk / "containerd" / "opt"}"
[plugins."io.containerd.grpc.v1.cri"]
  sandbox_image = "{PAUSE_IMAGE}"
  # Without CAP_SYS_RESOURCE (a machine may lack it) a container's score cannot go below containerd's own.
  restrict_oom_score_adj = true
  disable_apparmor = true
  netns_mounts_under_state_dir = true
  [plugins."io.containerd.grpc.v1.cri".containerd]
    snapshotter = "overlayfs"
    [plugins."io.containerd.grpc.v1.cri".containerd.runtimes.runc]
      runtime_type = "io.containerd.runc.v2"
      base_runtime_spec = "{self.layout.base_spec}"
      [plugins."io.containerd.grpc.v1.cri".containerd.runtimes.runc.options]
        SystemdCgroup = false
  [plugins."io.containerd.grpc.v1.cri".cni]
    bin_dir = "{plugins()}"
    conf_dir = "{disk / "cni"}"
"""

    def cni_configuration(self) -> dict[str, Any]:
        bridge = {
            "type": "bridge",
            "bridge": "cni0",
            "isGateway": True,
            "ipMasq": False,
            "ipam": {
                "type": "host-local",
                "dataDir": str(self.host.run / "ipam"),
                "ranges": [[{"subnet": str(self.addresses.pods_of(self.number))}]],
                "routes": [{"dst": "0.0.0.0/0"}],
            },
        }
        return {"cniVersion": "1.0.0", "name": self.layout.netns(self.name), "plugins": [bridge]}

    def kubelet_configuration(self) -> dict[str, Any]:
        disk, keys = self.host.disk, self.layout.pki
        return {
            "apiVersion": "kubelet.config.k8s.io/v1beta1",
            "kind": "KubeletConfiguration",
            "address": str(self.addresses.node(self.number)),
            "containerRuntimeEndpoint": f"unix://{self._socket}",
            "cgroupDriver": "cgroupfs",
            "cgroupRoot": f"/{self.layout.cgroup(self.name)}",
            "enforceNodeAllocatable": [],
            "failCgroupV1": False,
            "failSwapOn": False,
            # Lowering a score and raising a limit need CAP_SYS_RESOURCE, which a machine may lack.
            "oomScoreAdj": 0,
            "maxOpenFiles": 20000,
            "makeIPTablesUtilChains": False,
            "podLogsDir": str(disk / "pod-logs"),
            "volumePluginDir": str(disk / "volume-plugins"),
            "resolvConf": str(disk / "resolv.conf"),
            "clusterDomain": "cluster.local",
            "nodeStatusUpdateFrequency": "2s",
            "nodeLeaseDurationSeconds": 8,
            "crashLoopBackOff": {"maxContainerRestartPeriod": "1s"},
            "evictionHard": {
                "memory.available": "200Mi",
                "nodefs.available": "1%",
                "imagefs.available": "1%",
            },
            "imageGCHighThresholdPercent": 100,
            "tlsCertFile": str(keys / f"{self.name}-serving.crt"),
            "tlsPrivateKeyFile": str(keys / f"{self.name}-serving.key"),
            "authentication": {
                "anonymous": {"enabled": False},
                "webhook": {"enabled": True},
                "x509": {"clientCAFile": str(keys / "ca.crt")},
            },
            "authorization": {"mode": "Webhook"},
        }

    def proxy_configuration(self) -> dict[str, Any]:
        return {
            "apiVersion": "kubeproxy.config.k8s.io/v1alpha1",
            "kind": "KubeProxyConfiguration",
            "mode": "nftables",
            "hostnameOverride": self.name,
            "bindAddress": str(self.addresses.node(self.number)),
            "clientConnection": {"kubeconfig": str(self.layout.credential(f"{self.name}-proxy"))},
            "clusterCIDR": str(self.addresses.pods),
            # These limits are the whole machine's, not a namespace's: leave them alone.
            "conntrack": {
                "maxPerCore": 0,
                "min": 0,
                "tcpEstablishedTimeout": "0s",
                "tcpCloseWaitTimeout": "0s",
            },
        }


def plugins() -> Path:
    """Where the CNI plugins lie."""
    for folder in _PLUGINS:
        if os.access(folder / "bridge", os.X_OK):
            return folder
    raise LocalError(
        f"no CNI plugins in {' or '.join(map(str, _PLUGINS))}: install containernetworking-plugins (Debian's name)"
    )
