"""What the tool finder can get: upstream projects, how each is built, and what upstream publishes ready-made."""

from __future__ import annotations

import hashlib
import platform
from dataclasses import dataclass
from typing import TYPE_CHECKING

from stormjib_local.errors import ToolMissing

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path


def architecture() -> str:
    """Go's word for this machine's processor."""
    return {"x86_64": "amd64", "aarch64": "arm64"}.get(platform.machine(), platform.machine())


@dataclass(frozen=True)
class Project:
    """One upstream project: `tools/<name>` holds its go.mod and go.sum."""

    name: str
    packages: Mapping[str, str]
    """Binary → package."""
    ldflags: str
    tags: str = ""
    hint: str = ""
    """How long a build takes."""

    def digest(self, modules: Path) -> str:
        """Changes with anything that changes the binaries."""
        parts = [(modules / self.name / file).read_bytes() for file in ("go.mod", "go.sum")]
        parts += [
            text.encode() for text in (self.ldflags, self.tags, architecture(), *self.packages.values())
        ]
        return hashlib.sha256(b"\0".join(parts)).hexdigest()[:16]


@dataclass(frozen=True)
class Published:
    """A file that upstream publishes, and the checksum it must have (`sha256:…` or `sha512:…`)."""

    url: str
    checksum: str


def _kubernetes_ldflags(version: str) -> str:
    # Needed, not cosmetic: without them the server's version cannot be parsed and kubectl refuses it.
    major, minor, _ = version.split(".")
    values = {
        "gitVersion": f"v{version}",
        "gitMajor": major,
        "gitMinor": minor,
        "gitTreeState": "archive",
        "buildDate": "1970-01-01T00:00:00Z",
    }
    places = ("k8s.io/component-base/version", "k8s.io/client-go/pkg/version")
    return "-s -w " + " ".join(
        f"-X {place}.{key}={value}" for key, value in values.items() for place in places
    )


# kube-apiserver comes first: what it compiles, the others share.
_KUBERNETES = (
    "kube-apiserver",
    "kube-controller-manager",
    "kube-scheduler",
    "kubectl",
    "kubelet",
    "kube-proxy",
)
PROJECTS = (
    # Those two first: the tests of processes need them, long before there is a cluster.
    Project("versitygw", {"versitygw": "github.com/versity/versitygw/cmd/versitygw"}, "-s -w"),
    Project("toxiproxy", {"toxiproxy": "github.com/Shopify/toxiproxy/v2/cmd/server"}, "-s -w"),
    Project("etcd", {"etcd": "go.etcd.io/etcd/server/v3"}, "-s -w"),
    Project(
        "k8s",
        {binary: f"k8s.io/kubernetes/cmd/{binary}" for binary in _KUBERNETES},
        _kubernetes_ldflags("1.36.2"),
        "selinux,notest,grpcnotrace",
        "the six of Kubernetes take about nine minutes on two cores, once",
    ),
    Project(
        "helm",
        {"helm": "helm.sh/helm/v4/cmd/helm"},
        "-s -w -X helm.sh/helm/v4/internal/version.version=v4.2.4",
    ),
)

_ENVTEST = "https://github.com/kubernetes-sigs/controller-tools/releases/download/envtest-v1.36.2/envtest-v1.36.2-linux"
_ETCD = "https://github.com/etcd-io/etcd/releases/download/v3.6.14/etcd-v3.6.14-linux"
_HELM = "https://get.helm.sh/helm-v4.2.4-linux"
_ENVTEST_AMD64 = Published(
    f"{_ENVTEST}-amd64.tar.gz",
    "sha512:ea743186c8a799f5cf8faf16969f86189d003cb7d130e0ac4b58789f1e5748dc"
    "f30ebe91c837a10d5ac415383da3e10b9e64d65785c938c23e739781cfb76f08",
)
_ENVTEST_ARM64 = Published(
    f"{_ENVTEST}-arm64.tar.gz",
    "sha512:2d72ee985a8e262a3c57dc9f7f0fd891f6a8c7bf7ebaa2db6dc6d8eac8ae2818"
    "1afe51c1f368b67756cdb40b10de9b205609e1726e5f27f7c6d824dd9c6649ac",
)
# (binary, architecture) → file. Nothing goes in here whose checksum was not read from what upstream publishes.
PUBLISHED: Mapping[tuple[str, str], Published] = {
    ("kube-apiserver", "amd64"): _ENVTEST_AMD64,
    ("kube-apiserver", "arm64"): _ENVTEST_ARM64,
    ("kubectl", "amd64"): _ENVTEST_AMD64,
    ("kubectl", "arm64"): _ENVTEST_ARM64,
    ("etcd", "amd64"): Published(
        f"{_ETCD}-amd64.tar.gz", "sha256:ffe840ff9295808e88cce2794a18a5ac87f12a5203c8314d0bf6aa119b41bac5"
    ),
    ("helm", "amd64"): Published(
        f"{_HELM}-amd64.tar.gz", "sha256:c306b46f719b0a4da32d0f78ee21bf90ce8d602f15b22ab753f0674d1670a7f3"
    ),
    ("helm", "arm64"): Published(
        f"{_HELM}-arm64.tar.gz", "sha256:564de2191b881e9f71b5606b25345821ea1682f06ab90499d3ab22b530176da1"
    ),
}


def binaries() -> list[str]:
    """Every binary there is, in the order in which to build them."""
    return [binary for project in PROJECTS for binary in project.packages]


def project_of(binary: str) -> Project:
    for project in PROJECTS:
        if binary in project.packages:
            return project
    raise ToolMissing(f"{binary} is none of our tools: {', '.join(binaries())}")
