"""Where everything of one cluster lies, and what it is called. One function makes each name."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

CONTROL = "control"
SWITCH = "switch"
ROOT = Path("/var/lib")


@dataclass(frozen=True)
class Layout:
    """Paths and names of cluster `name`. Everything lies under one folder."""

    name: str
    root: Path = ROOT

    @property
    def state(self) -> Path:
        """The folder that `down` removes."""
        return self.root / f"stormjib-{self.name}"

    @property
    def record(self) -> Path:
        """What `up` was asked for."""
        return self.state / "cluster.json"

    @property
    def pki(self) -> Path:
        """Keys and certificates; root only."""
        return self.state / "pki"

    @property
    def kubeconfig(self) -> Path:
        """The administrator's."""
        return self.state / "admin.conf"

    @property
    def shared(self) -> Path:
        """The folder of the machine behind StorageClass `shared`."""
        return self.state / "shared"

    @property
    def base_spec(self) -> Path:
        """containerd's base runtime spec."""
        return self.state / "base.json"

    @property
    def images(self) -> Path:
        """The OCI archive that each node imports."""
        return self.state / "images.tar"

    def host(self, host: str) -> Path:
        """The disk of a host (`control`, `node-1`, …)."""
        return self.state / host

    def log(self, host: str, component: str) -> Path:
        """A component's log; it stays when its host loses power."""
        return self.state / "logs" / f"{host}.{component}.log"

    def credential(self, user: str) -> Path:
        """A component's kubeconfig."""
        return self.state / "credentials" / f"{user}.conf"

    def netns(self, host: str) -> str:
        """The name of a host's network namespace."""
        return f"{self.netns_prefix}{host}"

    @property
    def netns_prefix(self) -> str:
        """What the names of all our network namespaces, and only they, begin with."""
        return f"sj-{self.name}-"

    def cgroup(self, host: str) -> str:
        """A node's cgroup, below the root of each hierarchy."""
        return f"sj-{self.name}-{host}"

    def marker(self, host: str, component: str) -> str:
        """Value of `MARKER` in the environment of a process that we started."""
        return f"{self.name}/{host}/{component}"
