"""What isolation is tested and measured with: the isolator on a cluster, and tenants whose coordinators say what they are told to say.

The operator's code runs in this process, under the operator's ServiceAccount; isolator, preflight Jobs, admission and RBAC are the cluster's.
"""

from __future__ import annotations

import json
import time
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import yaml
from cluster.kube import Kubectl, eventually
from cluster.operator import IMAGE, install, job, pods

from bench.stage import SYSTEM
from fakes.accuser import Accuser, OutsideOperator, accusation
from stormjib_operator.observed import Render
from stormjib_operator.queue import Key

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from stormjib_health.verdict import Accusation
    from stormjib_local.cluster import Cluster

TAINT, SUSPECT, LABEL = "stormjib.io/isolated", "TrainingHardwareSuspect", "stormjib.io/isolation"
NO_PEER = (
    "isolator.preflight.args={--peer,127.0.0.1:9}",
    "isolator.preflight.env[0].name=STORMJIB_TOKEN",
    "isolator.preflight.env[0].value=secret",
)
"""A preflight that no node can pass: its peer does not answer."""


class Scene:
    """The system's kubectl, the nodes that jobs may use, and an operator that the test leads."""

    def __init__(self, cluster: Cluster, operator: OutsideOperator) -> None:
        self.cluster, self.operator = cluster, operator
        self.system = Kubectl(cluster, SYSTEM)
        self.nodes = list(cluster.nodes[:-1])

    def policy(self, **change: Any) -> None:
        """The policy as a whole: quick, so that a test need not wait for minutes, and with these fields."""
        limits = {"windowSeconds": 1, "stormCooldownSeconds": 0} | change.pop("limits", {})
        spec = {"mode": "Taint", "cooldownSeconds": 1, "limits": limits} | change
        head = {"apiVersion": "stormjib.io/v1alpha1", "kind": "IsolationPolicy"}
        manifest = head | {"metadata": {"name": "default"}, "spec": spec}
        self.system("replace", "-f", "-", stdin=json.dumps(manifest))

    def mode(self) -> str:
        """What the policy lets the isolator do."""
        return str(self.system.get("isolationpolicy", "default")["spec"]["mode"])

    def isolation(self, node: str) -> dict[str, Any]:
        """A node's NodeIsolation, or nothing yet."""
        found = self.system("get", "nodeisolation", node, "-o", "json", "--ignore-not-found")
        return json.loads(found) if found else {}

    def state(self, node: str) -> str:
        return str(self.isolation(node).get("status", {}).get("state", ""))

    def reaches(self, node: str, state: str, seconds: float) -> None:
        """Wait for that state; where it does not come, say how the node got where it is."""
        try:
            eventually(state, seconds, lambda: self.state(node) == state)
        except AssertionError as error:
            raise AssertionError(f"{error}: {json.dumps(self.isolation(node), indent=1)}") from None

    def is_accused_by(self, node: str, count: int) -> bool:
        return len(self.isolation(node).get("spec", {}).get("evidence", ())) == count

    def tainted(self, node: str) -> bool:
        found = self.system.get("node", node)
        return any(each["key"] == TAINT for each in found["spec"].get("taints", ()))

    def suspected(self, node: str) -> bool:
        conditions = self.system.get("node", node)["status"]["conditions"]
        return any(c["type"] == SUSPECT and c["status"] == "True" for c in conditions)

    def clear(self) -> None:
        """No NodeIsolation, no mark, every node opted in, no open breaker."""
        self.system("delete", "nodeisolations", "--all")
        self.system("label", "--overwrite", "node", *self.nodes, f"{LABEL}=enabled")
        eventually("no mark", 20, lambda: not any(map(self.tainted, self.nodes)))
        found = self.system.get("isolationpolicy", "default").get("status", {}).get("breaker", {})
        if found.get("open"):
            reset = f"stormjib.io/reset-breaker={found['trip']}"
            self.system("annotate", "--overwrite", "isolationpolicy", "default", reset)


class Tenant:
    """One job of two slots, and its coordinator, which says what the test wants."""

    def __init__(self, scene: Scene, kubectl: Kubectl, name: str = "job", **spec: Any) -> None:
        self.scene, self.kubectl, self.name = scene, kubectl, name
        kubectl.apply(job(name, **{"nodes": {"replicas": 2, "minReplicas": 1}} | spec))
        uid = kubectl.get("tj", name)["metadata"]["uid"]
        self.accuser: Accuser = scene.operator.follow(Key(kubectl.namespace, name), uid)
        self.said: list[Accusation] = []
        wanted = kubectl.get("tj", name)["spec"]["nodes"]["replicas"]
        eventually("its pods", 60, lambda: len(self.slots()) == wanted)
        self.members = {slot: pod["metadata"]["uid"] for slot, pod in self.slots().items()}
        self.accuser.trains(self.members)
        eventually("its generation", 20, lambda: self.status().get("generation"))
        self.pod_names = {slot: pod["metadata"]["name"] for slot, pod in self.slots().items()}
        self.places = {slot: pod["spec"]["nodeName"] for slot, pod in self.slots().items()}

    def slots(self) -> dict[int, dict[str, Any]]:
        """Running pods by slot."""
        running = [p for p in pods(self.kubectl, self.name, "trainer") if p["status"]["phase"] == "Running"]
        return {int(p["metadata"]["labels"]["stormjib.io/slot"]): p for p in running}

    def status(self) -> dict[str, Any]:
        found: dict[str, Any] = self.kubectl.get("tj", self.name).get("status", {})
        return found

    def accuse(self, slot: int, **change: Any) -> float:
        """One accusation more; when it was said."""
        uid = change.pop("pod_uid", self.members.get(slot, ""))
        self.said.append(accusation(len(self.said) + 1, slot, uid, **change))
        self.scene.operator.say(self.accuser, accusations=tuple(self.said[-16:]))
        return time.monotonic()

    def leaves(self, slot: int) -> None:
        """As a coordinator does at once: it goes on without the slot, and tells its agent to go. The agent hears nothing
        of ours, so its pod is told instead."""
        rest = {each: uid for each, uid in self.members.items() if each != slot}
        self.scene.operator.do(lambda: self.accuser.trains(rest))
        name = self.pod_names[slot]
        self.kubectl("delete", "pod", name, "--grace-period=1", "--wait=false", "--ignore-not-found")

    def refused(self) -> int:
        return int(self.status().get("isolation", {}).get("refused", 0))


@contextmanager
def opened(cluster: Cluster, config: Path) -> Iterator[Scene]:
    """The chart with its operator held, and one in this process that acts under the same account by the kubeconfig `config`."""
    install(cluster)
    system = Kubectl(cluster, SYSTEM)
    hold_operator(system)
    render = Render(image=IMAGE, run_as_user=65532, operator_namespace=SYSTEM)
    eventually("a policy", 30, lambda: system("get", "isolationpolicies", "-o", "name"))
    nodes = cluster.nodes[:-1]
    system("label", "--overwrite", "node", *nodes, f"{LABEL}=enabled")
    try:
        with OutsideOperator(kubeconfig(cluster, system, config), render) as operator:
            yield Scene(cluster, operator)
    finally:
        system("delete", "nodeisolations", "--all", "--wait=false", check=False)
        eventually("no mark", 30, lambda: TAINT not in system("get", "nodes", "-o", "yaml"))
        system("label", "node", *nodes, f"{LABEL}-", check=False)
        system("delete", "isolationpolicy", "default", check=False)
        system("scale", "deployment", "stormjib", "--replicas=1")
        system("rollout", "status", "deployment", "stormjib", "--timeout=40s")


def hold_operator(system: Kubectl) -> None:
    """The cluster's own operator ends, and comes back when it is scaled up."""
    system("scale", "deployment", "stormjib", "--replicas=0")
    system("wait", "--for=delete", "pod", "-l", "app.kubernetes.io/name=stormjib", "--timeout=40s")


def kubeconfig(cluster: Cluster, system: Kubectl, path: Path, account: str = "stormjib") -> Path:
    """A kubeconfig with an account's own token."""
    config = yaml.safe_load(cluster.kubeconfig.read_text())
    user = {"name": account, "user": {"token": system("create", "token", account).strip()}}
    context = {"name": account, "context": {"user": account, "cluster": config["clusters"][0]["name"]}}
    config |= {"users": [user], "contexts": [context], "current-context": account}
    path.write_text(yaml.safe_dump(config))
    return path
