"""The stage on which demo, recovery bench and cluster tests play: a local cluster with the chart installed by helm."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from bench import pods
from stormjib_local.cluster import Cluster

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

ROOT = Path(__file__).resolve().parents[1]
SYSTEM = "stormjib-system"
IMAGE = ("localhost/host", "dev")


class StageError(RuntimeError):
    """A command of the stage failed: holds what was run and what it said."""


@dataclass
class Stage:
    """A cluster whose last node is kept for the operator; nodes that join later are not."""

    cluster: Cluster

    def __post_init__(self) -> None:
        self.operator_node = self.cluster.nodes[-1]
        """Name of the node that only the operator runs on."""

    def kubectl(self, *arguments: str, stdin: str | None = None) -> str:
        """Output of kubectl with the cluster's admin credentials. Raises StageError with its words."""
        return self._run(
            [str(self.cluster.kubectl), "--kubeconfig", str(self.cluster.kubeconfig), *arguments], stdin
        )

    def get(self, *arguments: str) -> dict[str, Any]:
        """`kubectl get ... -o json`, parsed."""
        found: dict[str, Any] = json.loads(self.kubectl("get", *arguments, "-o", "json"))
        return found

    def install(self, *settings: str) -> None:
        """Install or upgrade the chart; waits until the operator is ready."""
        values = {
            "image.repository": IMAGE[0],
            "image.tag": IMAGE[1],
            "nodeSelector.kubernetes\\.io/hostname": self.operator_node,
            "tolerations[0].operator": "Exists",
        }
        sets = [part for key, value in values.items() for part in ("--set", f"{key}={value}")]
        sets += [part for setting in settings for part in ("--set", setting)]
        chart = str(ROOT / "charts/stormjib")
        head = [str(self.cluster.helm), "--kubeconfig", str(self.cluster.kubeconfig), "upgrade", "--install"]
        self._run(
            [
                *head,
                "stormjib",
                chart,
                "-n",
                SYSTEM,
                "--create-namespace",
                "--wait",
                "--timeout",
                "90s",
                *sets,
            ]
        )

    def reserve_operator_node(self, *, reserved: bool = True) -> None:
        """Keep jobs off the operator's node, or let them in again."""
        taint = "stormjib.io/demo=operator:NoSchedule" + ("" if reserved else "-")
        self.kubectl("taint", "--overwrite", "node", self.operator_node, taint)

    def make_namespace(self, name: str) -> None:
        """A namespace under the `restricted` Pod Security profile."""
        labels = {"pod-security.kubernetes.io/enforce": "restricted"}
        manifest = {"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": name, "labels": labels}}
        self.kubectl("apply", "-f", "-", stdin=json.dumps(manifest))

    def apply_sample(
        self, name: str, namespace: str, change: Callable[[dict[str, Any]], None] | None = None
    ) -> str:
        """Apply `manifests/samples/NAME` with the local image; `change` may edit the job. Returns the job's name."""
        documents = [d for d in yaml.safe_load_all((ROOT / "manifests/samples" / name).read_text()) if d]
        job = next(d for d in documents if d["kind"] == "TrainingJob")
        for container in job["spec"]["template"]["spec"]["containers"]:
            container["image"] = ":".join(IMAGE)
        if change is not None:
            change(job)
        self.kubectl("apply", "-n", namespace, "-f", "-", stdin=yaml.safe_dump_all(documents))
        return str(job["metadata"]["name"])

    def job(self, namespace: str, name: str) -> dict[str, Any]:
        """The TrainingJob as it is now."""
        return self.get("trainingjob", name, "-n", namespace)

    def pods_of(self, namespace: str, job: str, role: str) -> list[dict[str, Any]]:
        """Live pods of one role of the job, in the order of their slots."""
        found = self.get("pods", "-n", namespace, "-l", f"stormjib.io/job={job},stormjib.io/role={role}")[
            "items"
        ]
        live = [
            p
            for p in found
            if not p["metadata"].get("deletionTimestamp") and p["status"]["phase"] == "Running"
        ]
        return sorted(live, key=lambda p: int(p["metadata"]["labels"].get("stormjib.io/slot", 0)))

    def operator_pods(self) -> list[dict[str, Any]]:
        """The operator's pods that run and are not on their way out."""
        found = self.get("pods", "-n", SYSTEM, "-l", "app.kubernetes.io/name=stormjib")["items"]
        live = (p for p in found if not p["metadata"].get("deletionTimestamp"))
        return [p for p in live if p["status"]["phase"] == "Running"]

    def operator_pod(self) -> dict[str, Any]:
        """The operator's pod. Raises StageError where none runs."""
        found = self.operator_pods()
        if not found:
            raise StageError(f"no operator runs in {SYSTEM}")
        return found[-1]

    def condition(self, namespace: str, job: str, kind: str) -> dict[str, Any] | None:
        """One condition of the job's status, or None while it is not there."""
        conditions = self.job(namespace, job).get("status", {}).get("conditions", [])
        return next((c for c in conditions if c["type"] == kind), None)

    def _run(self, command: list[str], stdin: str | None = None) -> str:
        done = subprocess.run(command, input=stdin, capture_output=True, text=True, check=False, timeout=180)
        if done.returncode != 0:
            raise StageError(f"{' '.join(command)}\n{done.stdout}{done.stderr}")
        return done.stdout


def wait_until(found: Callable[[], Any], seconds: float, what: str, every: float = 0.25) -> Any:
    """The first true value of `found()`. Raises TimeoutError naming `what`."""
    deadline = time.monotonic() + seconds
    while not (value := found()):
        if time.monotonic() > deadline:
            raise TimeoutError(f"not seen within {seconds:.0f} s: {what}")
        time.sleep(every)
    return value


@contextmanager
def opened(name: str, nodes: int, *, keep: bool = False) -> Iterator[Stage]:
    """A running cluster of that name, taken down at the end (also on Ctrl-C) unless `keep`."""
    cluster = Cluster(name, say=lambda line: print(f"cluster: {line}", flush=True))
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    cluster.down()  # what an earlier run with KEEP=1 left
    try:
        cluster.up(nodes=nodes, mounts=[ROOT])
        yield Stage(cluster)
    finally:
        if not keep:
            cluster.down()


def kill_rank(pod: dict[str, Any], sig: signal.Signals) -> float:
    """Send `sig` to one rank in the pod. Returns the time of the fault; raises StageError where there is no rank."""
    ranks = pods.ranks_of(pod["metadata"]["uid"])
    if not ranks:
        raise StageError(f"no rank runs in pod {pod['metadata']['name']}: the fault would not fire")
    at = time.time()
    ranks[-1].send(sig)
    return at
