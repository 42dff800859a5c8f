"""etcd, API server, controller manager, scheduler and the provisioner of class `shared`, on a host of their own."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING

import yaml

from stormjib_local import network, pki, provisioner
from stormjib_local.addresses import SERVICES, Addresses
from stormjib_local.api import Api, Json
from stormjib_local.hosts import Host
from stormjib_local.layout import CONTROL, Layout
from stormjib_local.pki import Authority
from stormjib_local.processes import wait_until

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

BINARIES = ("etcd", "kube-apiserver", "kube-controller-manager", "kube-scheduler")
COMPONENTS = (*BINARIES, provisioner.COMPONENT)

_AUTHENTICATION = {
    "apiVersion": "apiserver.config.k8s.io/v1",
    "kind": "AuthenticationConfiguration",
    "anonymous": {
        "enabled": True,
        "conditions": [{"path": path} for path in ("/livez", "/readyz", "/healthz")],
    },
}
# Who is called what in the API: (file, user, groups).
_USERS = (
    ("admin", "admin", ("system:masters",)),
    ("kube-controller-manager", "system:kube-controller-manager", ()),
    ("kube-scheduler", "system:kube-scheduler", ()),
    ("kubelet-client", "kube-apiserver-kubelet-client", ("system:masters",)),
    (provisioner.COMPONENT, provisioner.USER, ()),
)


@dataclass(frozen=True)
class ControlPlane:
    """The control plane of one cluster."""

    layout: Layout
    addresses: Addresses

    @property
    def host(self) -> Host:
        """Where it runs."""
        return Host(self.layout, CONTROL)

    @property
    def api(self) -> Api:
        """As administrator."""
        return Api(self.addresses.server, self.layout.pki, "admin")

    def write_credentials(self) -> None:
        """Certificates and kubeconfigs, once; a second call changes nothing."""
        folder = self.layout.pki
        folder.mkdir(parents=True, exist_ok=True)
        folder.chmod(0o700)
        authority = Authority.keep(folder, f"stormjib-{self.layout.name}")
        if not (folder / "sa.pub").exists():
            private, public = pki.signing_key()
            pki.write(folder / "sa.key", private)
            pki.write(folder / "sa.pub", public)
        if not (folder / "apiserver.key").exists():
            authority.issue(
                "kube-apiserver",
                hosts=("kubernetes", "kubernetes.default", "kubernetes.default.svc"),
                addresses=(self.addresses.control, SERVICES[1]),
            ).write(folder, "apiserver")
        for file, user, groups in _USERS:
            self.credential(authority, file, user, groups)

    def credential(self, authority: Authority, file: str, user: str, groups: tuple[str, ...] = ()) -> Path:
        """A user's certificate, and the kubeconfig that holds it."""
        path = self.layout.kubeconfig if file == "admin" else self.layout.credential(file)
        if not path.exists():
            pair = authority.issue(user, groups=groups)
            pair.write(self.layout.pki, file)
            pki.write(path, pki.kubeconfig(self.addresses.server, authority.pair.certificate, pair))
        return path

    def start(self, find: Callable[[str], Path]) -> None:
        """Start what does not run; comes back when the API server serves."""
        host = self.host
        network.plug_in(self.layout, self.addresses, CONTROL, 0)
        host.boot()
        pki.write(host.disk / "authentication.yaml", yaml.safe_dump(_AUTHENTICATION).encode())
        host.start("etcd", [find("etcd"), *self.etcd_flags()])
        host.start("kube-apiserver", [find("kube-apiserver"), *self.apiserver_flags()])
        wait_until("the API server's start", 60, self._serves)
        host.start("kube-controller-manager", [find("kube-controller-manager"), *self.controller_flags()])
        host.start("kube-scheduler", [find("kube-scheduler"), *self.scheduler_flags()])
        for path, body in _objects():
            self.api.post(path, body)
        host.start(provisioner.COMPONENT, self._provisioner())

    def _serves(self) -> bool:
        self.host.check("etcd", "kube-apiserver")
        return self.api.ready()

    def etcd_flags(self) -> list[str]:
        client, peer = "http://127.0.0.1:2379", "http://127.0.0.1:2380"
        return [
            f"--data-dir={self.host.disk / 'etcd'}",
            f"--listen-client-urls={client}",
            f"--advertise-client-urls={client}",
            f"--listen-peer-urls={peer}",
            f"--initial-advertise-peer-urls={peer}",
            f"--initial-cluster=default={peer}",
            "--unsafe-no-fsync",
            "--log-level=warn",
        ]

    def apiserver_flags(self) -> list[str]:
        keys, control = self.layout.pki, self.addresses.control
        return [
            "--etcd-servers=http://127.0.0.1:2379",
            f"--bind-address={control}",
            f"--advertise-address={control}",
            "--secure-port=6443",
            f"--tls-cert-file={keys / 'apiserver.crt'}",
            f"--tls-private-key-file={keys / 'apiserver.key'}",
            f"--client-ca-file={keys / 'ca.crt'}",
            "--authorization-mode=Node,RBAC",
            f"--authentication-config={self.host.disk / 'authentication.yaml'}",
            "--enable-admission-plugins=NodeRestriction",
            "--service-account-issuer=https://kubernetes.default.svc",
            f"--service-account-key-file={keys / 'sa.pub'}",
            f"--service-account-signing-key-file={keys / 'sa.key'}",
            f"--service-cluster-ip-range={SERVICES}",
            f"--kubelet-client-certificate={keys / 'kubelet-client.crt'}",
            f"--kubelet-client-key={keys / 'kubelet-client.key'}",
            f"--kubelet-certificate-authority={keys / 'ca.crt'}",
            "--kubelet-preferred-address-types=InternalIP",
            "--default-not-ready-toleration-seconds=5",
            "--default-unreachable-toleration-seconds=5",
            "--allow-privileged=true",
            "--profiling=false",
        ]

    def controller_flags(self) -> list[str]:
        config = self.layout.credential("kube-controller-manager")
        return [
            f"--kubeconfig={config}",
            f"--authentication-kubeconfig={config}",
            f"--authorization-kubeconfig={config}",
            f"--service-account-private-key-file={self.layout.pki / 'sa.key'}",
            f"--root-ca-file={self.layout.pki / 'ca.crt'}",
            "--use-service-account-credentials",
            "--leader-elect=false",
            "--bind-address=127.0.0.1",
            "--kube-api-qps=200",
            "--kube-api-burst=400",
            f"--flex-volume-plugin-dir={self.host.disk / 'volume-plugins'}",
            "--pvclaimbinder-sync-period=2s",
            "--node-monitor-period=1s",
            "--node-monitor-grace-period=8s",
            "--profiling=false",
        ]

    def scheduler_flags(self) -> list[str]:
        config = self.layout.credential("kube-scheduler")
        return [
            f"--kubeconfig={config}",
            f"--authentication-kubeconfig={config}",
            f"--authorization-kubeconfig={config}",
            "--leader-elect=false",
            "--bind-address=127.0.0.1",
            "--profiling=false",
        ]

    def _provisioner(self) -> list[str | Path]:
        # -P: a folder of the caller's must not come before our own package.
        arguments = (self.addresses.server, self.layout.pki, self.layout.shared)
        return [sys.executable, "-P", "-m", "stormjib_local.provisioner", *arguments]


def _objects() -> list[tuple[str, Json]]:
    """The few objects that the cluster brings along: (where to create, what)."""
    rbac = "rbac.authorization.k8s.io"
    name = {"name": provisioner.USER}
    rules = [
        {"apiGroups": [""], "resources": ["persistentvolumeclaims"], "verbs": ["get", "list", "watch"]},
        {
            "apiGroups": [""],
            "resources": ["persistentvolumes"],
            "verbs": ["get", "list", "watch", "create", "delete"],
        },
    ]
    role = {"apiVersion": f"{rbac}/v1", "kind": "ClusterRole", "metadata": name, "rules": rules}
    binding = {
        "apiVersion": f"{rbac}/v1",
        "kind": "ClusterRoleBinding",
        "metadata": name,
        "roleRef": {"apiGroup": rbac, "kind": "ClusterRole", "name": provisioner.USER},
        "subjects": [{"apiGroup": rbac, "kind": "User", "name": provisioner.USER}],
    }
    storage = {
        "apiVersion": "storage.k8s.io/v1",
        "kind": "StorageClass",
        "metadata": {"name": provisioner.STORAGE_CLASS},
        "provisioner": provisioner.PROVISIONER,
        "reclaimPolicy": "Delete",
        "volumeBindingMode": "Immediate",
    }
    return [
        (f"/apis/{rbac}/v1/clusterroles", role),
        (f"/apis/{rbac}/v1/clusterrolebindings", binding),
        ("/apis/storage.k8s.io/v1/storageclasses", storage),
    ]
