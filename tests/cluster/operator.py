"""What the operator's cluster tests share: the chart on the cluster, jobs, and what the API says of them."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from cluster.kube import Kubectl, eventually

from bench.stage import IMAGE as LOCAL_IMAGE
from bench.stage import SYSTEM, Stage

if TYPE_CHECKING:
    from stormjib_local.cluster import Cluster

IMAGE = ":".join(LOCAL_IMAGE)


def install(cluster: Cluster, *settings: str) -> None:
    """The chart by helm, on a node of its own, under the `restricted` profile; waits until it is ready."""
    stage = Stage(cluster)
    stage.make_namespace(SYSTEM)
    stage.reserve_operator_node()
    stage.install(*settings)


def job(name: str = "job", **spec: Any) -> dict[str, Any]:
    """A job of two nodes whose ranks do what they are told by `command`; small, so that many fit."""
    trainer = {
        "name": "trainer",
        "image": IMAGE,
        "resources": {"requests": {"cpu": "10m", "memory": "64Mi"}, "limits": {"memory": "2Gi"}},
    }
    base: dict[str, Any] = {
        "template": {
            "spec": {
                "securityContext": {"runAsUser": 10001},
                "terminationGracePeriodSeconds": 10,  # a rank that only sleeps has nothing to save
                "containers": [trainer],
            }
        },
        "launcher": {"command": ["--no-python", "sleep", "1000"]},
        "nodes": {"replicas": 2},
    }
    metadata = {"name": name}
    return {
        "apiVersion": "stormjib.io/v1alpha1",
        "kind": "TrainingJob",
        "metadata": metadata,
        "spec": base | spec,
    }


def condition(kubectl: Kubectl, name: str, kind: str) -> dict[str, Any]:
    """A condition of a job, or nothing yet."""
    conditions = kubectl.get("trainingjob", name).get("status", {}).get("conditions", [])
    return next((each for each in conditions if each["type"] == kind), {})


def wait_for(
    kubectl: Kubectl, name: str, kind: str, status: str, reason: str = "", seconds: float = 40
) -> dict[str, Any]:
    """The condition once it has that status, and that reason where one is named."""

    def found() -> dict[str, Any] | None:
        seen = condition(kubectl, name, kind)
        fits = seen.get("status") == status and reason in ("", seen.get("reason"))
        return seen if fits else None

    try:
        met: dict[str, Any] = eventually(f"{kind}={status} {reason}", seconds, found)
    except AssertionError as error:
        raise AssertionError(
            f"{error}: {json.dumps(kubectl.get('trainingjob', name).get('status'), indent=1)}"
        ) from None
    return met


def pods(kubectl: Kubectl, name: str, role: str = "") -> list[dict[str, Any]]:
    """Pods of a job that nobody is deleting, by name."""
    selector = f"stormjib.io/job={name}" + (f",stormjib.io/role={role}" if role else "")
    items = kubectl.get("pods", "-l", selector)["items"]
    live = [pod for pod in items if "deletionTimestamp" not in pod["metadata"]]
    return sorted(live, key=lambda pod: str(pod["metadata"]["name"]))


def children(kubectl: Kubectl, name: str) -> list[str]:
    """Everything that a job has made and that is still there."""
    kinds = "pods,services,secrets,networkpolicies,controllerrevisions"
    found = kubectl.get(kinds, "-l", f"stormjib.io/job={name}")["items"]
    return [f"{each['kind']}/{each['metadata']['name']}" for each in found]


def wait_running(kubectl: Kubectl, name: str, seconds: float = 50) -> None:
    """Until ranks of a first generation are there."""
    eventually(
        "a generation", seconds, lambda: kubectl.get("trainingjob", name).get("status", {}).get("generation")
    )
