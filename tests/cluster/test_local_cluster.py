"""The local cluster is a real one: pods, Services, volumes, nodes that are cut, lose power and come back."""

from __future__ import annotations

import os
import socket
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from cluster.kube import eventually, inotify_limit, sysctls
from typer.testing import CliRunner

from stormjib_local import processes
from stormjib_local.commands import app
from stormjib_local.errors import BadRequest

if TYPE_CHECKING:
    from cluster.conftest import Up
    from cluster.kube import Kubectl

    from stormjib_local.cluster import Cluster

IMAGE = "localhost/host:dev"
# So that the API's own eviction does not end a pod while a test has its node cut; and other tests keep jobs off a node.
PATIENT = [{"operator": "Exists", "effect": "NoSchedule"}] + [
    {
        "key": f"node.kubernetes.io/{state}",
        "operator": "Exists",
        "effect": "NoExecute",
        "tolerationSeconds": 300,
    }
    for state in ("not-ready", "unreachable")
]
SERVE = "import http.server; http.server.test(http.server.SimpleHTTPRequestHandler, port=8000)"


def _pod(name: str, node: str, code: str, claim: str = "") -> dict[str, Any]:
    """A pod that the `restricted` profile accepts, and that runs Python."""
    volumes: list[dict[str, Any]] = [{"name": "tmp", "emptyDir": {}}]
    mounts = [{"name": "tmp", "mountPath": "/tmp"}]
    if claim:
        volumes.append({"name": "data", "persistentVolumeClaim": {"claimName": claim}})
        mounts.append({"name": "data", "mountPath": "/data"})
    container = {
        "name": "main",
        "image": IMAGE,
        "command": ["python3", "-u", "-c", code],
        "workingDir": "/tmp",
        "securityContext": {
            "allowPrivilegeEscalation": False,
            "readOnlyRootFilesystem": True,
            "capabilities": {"drop": ["ALL"]},
        },
        "resources": {"limits": {"memory": "256Mi"}},
        "volumeMounts": mounts,
    }
    return {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {"name": name, "labels": {"app": name}},
        "spec": {
            "nodeSelector": {"kubernetes.io/hostname": node},
            "terminationGracePeriodSeconds": 1,
            "automountServiceAccountToken": False,
            "tolerations": PATIENT,
            "securityContext": {
                "runAsNonRoot": True,
                "runAsUser": 10001,
                "seccompProfile": {"type": "RuntimeDefault"},
            },
            "containers": [container],
            "volumes": volumes,
        },
    }


def _claim(name: str) -> dict[str, Any]:
    return {
        "apiVersion": "v1",
        "kind": "PersistentVolumeClaim",
        "metadata": {"name": name},
        "spec": {
            "accessModes": ["ReadWriteMany"],
            "storageClassName": "shared",
            "resources": {"requests": {"storage": "1Gi"}},
        },
    }


def _reaches(kubectl: Kubectl, pod: str, address: str) -> bool:
    code = f"import urllib.request as u; print(u.urlopen('http://{address}:8000', timeout=2).status)"
    return kubectl("exec", pod, "--", "python3", "-c", code, check=False).strip() == "200"


def _ready(kubectl: Kubectl, node: str) -> bool:
    conditions = kubectl.get("node", node)["status"]["conditions"]
    return any(each["type"] == "Ready" and each["status"] == "True" for each in conditions)


def test_it_comes_up_in_time_and_leaves_the_machines_settings_alone(up: Up) -> None:
    assert up.seconds < 25
    assert sysctls() == up.sysctls
    assert inotify_limit() >= 1000, "a few nodes more, and kubelets would not start"


def test_nothing_of_it_runs_in_the_machines_own_network(cluster: Cluster) -> None:
    ours = list(processes.marked(cluster.name))
    assert len(ours) > 20
    machine = processes.network_of(os.getpid())
    assert [process for process in ours if processes.network_of(process.pid) == machine] == []


def test_restricted_pods_use_this_environment_and_talk_across_nodes(kubectl: Kubectl) -> None:
    kubectl.apply(_pod("server", "node-2", SERVE), _pod("client", "node-1", SERVE))
    kubectl.wait("condition=Ready", "pod/server", "pod/client")
    kubectl("expose", "pod", "server", "--port=8000")
    service = kubectl.get("service", "server")["spec"]["clusterIP"]
    eventually("the Service answers", 15, lambda: _reaches(kubectl, "client", service))

    code = "import sys, os, stormjib_local, yaml; print(sys.prefix, os.getuid(), stormjib_local.__file__)"
    prefix, uid, module = kubectl("exec", "client", "--", "python3", "-c", code).split()
    assert (prefix, uid) == ("/opt/venv", "10001")
    assert Path(module).exists(), "the code is this checkout's own, live"
    refused = kubectl("exec", "client", "--", "python3", "-c", "open('/x', 'w')", check=False)
    assert "Read-only file system" in refused


def test_a_shared_claim_is_one_folder_for_pods_on_two_nodes(cluster: Cluster, kubectl: Kubectl) -> None:
    kubectl.apply(_claim("data"), _pod("one", "node-1", SERVE, "data"), _pod("two", "node-2", SERVE, "data"))
    kubectl.wait("condition=Ready", "pod/one", "pod/two")
    assert kubectl.get("pvc", "data")["status"]["phase"] == "Bound"
    kubectl("exec", "one", "--", "python3", "-c", "open('/data/x', 'w').write('hello')")
    assert kubectl("exec", "two", "--", "python3", "-c", "print(open('/data/x').read())").strip() == "hello"

    folder = cluster.shared_folder / f"pvc-{kubectl.get('pvc', 'data')['metadata']['uid']}"
    assert (folder / "x").read_text() == "hello"
    kubectl("delete", "pod", "one", "two", "--wait=true")
    kubectl("delete", "pvc", "data")
    eventually("the folder of a deleted claim is removed", 20, lambda: not folder.exists())


@pytest.mark.timeout(120)
def test_a_cut_node_runs_on_with_its_storage_but_nobody_reaches_it(
    cluster: Cluster, kubectl: Kubectl
) -> None:
    count = (
        "import time, pathlib\n"
        "for n in range(10**9): pathlib.Path('/data/n').write_text(str(n)); time.sleep(0.05)"
    )
    kubectl.apply(_claim("data"))
    kubectl.apply(
        _pod("far", "node-3", SERVE), _pod("near", "node-1", SERVE), _pod("counter", "node-3", count, "data")
    )
    kubectl.wait("condition=Ready", "pod/far", "pod/near", "pod/counter")
    far = kubectl.get("pod", "far")["status"]["podIP"]
    counter = cluster.shared_folder / f"pvc-{kubectl.get('pvc', 'data')['metadata']['uid']}" / "n"
    assert _reaches(kubectl, "near", far)

    cluster.cut("node-3")
    try:
        assert not _reaches(kubectl, "near", far)
        eventually("NotReady", 15, lambda: not _ready(kubectl, "node-3"))
        assert [n.cable for n in cluster.status() if n.name == "node-3"] == [False]
        before = counter.read_text()
        eventually("the pod writes on", 5, lambda: counter.read_text() != before)
    finally:
        cluster.heal("node-3")
    eventually("Ready", 20, lambda: _ready(kubectl, "node-3"))
    assert _reaches(kubectl, "near", far)
    assert kubectl.get("pod", "counter")["status"]["containerStatuses"][0]["restartCount"] == 0


@pytest.mark.timeout(120)
def test_a_node_that_loses_power_loses_every_process_and_comes_back(
    cluster: Cluster, kubectl: Kubectl
) -> None:
    kubectl.apply(_pod("victim", "node-4", SERVE))
    kubectl.wait("condition=Ready", "pod/victim")
    pids = cluster.pids_of(kubectl.get("pod", "victim")["metadata"]["uid"])
    assert len(pids) == 2, "sandbox and container"
    assert {cluster.node_of_pid(pid) for pid in pids} == {"node-4"}

    cluster.stop("node-4")
    assert not [pid for pid in pids if cluster.node_of_pid(pid)]
    assert not [process for process in processes.marked(cluster.name) if process.host == "node-4"]
    eventually("NotReady", 15, lambda: not _ready(kubectl, "node-4"))
    cluster.stop("node-4")  # already

    cluster.start("node-4")
    eventually("Ready", 30, lambda: _ready(kubectl, "node-4"))
    eventually(
        "the pod runs again",
        40,
        lambda: kubectl.get("pod", "victim")["status"]["containerStatuses"][0]["restartCount"] == 1,
    )
    kubectl.wait("condition=Ready", "pod/victim")


def test_a_pod_with_a_service_account_reaches_the_api(kubectl: Kubectl) -> None:
    pod = _pod("client", "node-2", SERVE)
    pod["spec"]["automountServiceAccountToken"] = True
    kubectl.apply(pod)
    kubectl.wait("condition=Ready", "pod/client")
    code = (
        "import os, ssl, urllib.request as u; f = '/var/run/secrets/kubernetes.io/serviceaccount/'\n"
        "r = u.Request(f'https://{os.environ[\"KUBERNETES_SERVICE_HOST\"]}/apis/authentication.k8s.io/v1/selfsubjectreviews',"
        ' data=b\'{"apiVersion":"authentication.k8s.io/v1","kind":"SelfSubjectReview"}\','
        " headers={'Authorization': 'Bearer ' + open(f + 'token').read(), 'Content-Type': 'application/json'})\n"
        "print(u.urlopen(r, timeout=5, context=ssl.create_default_context(cafile=f + 'ca.crt')).read().decode())"
    )
    said = kubectl("exec", "client", "--", "python3", "-c", code)
    assert f"system:serviceaccount:{kubectl.namespace}:default" in said


def test_a_crashing_container_is_restarted_every_second(kubectl: Kubectl) -> None:
    kubectl.apply(_pod("crash", "node-1", "raise SystemExit(3)"))

    def restarts() -> int:
        statuses = kubectl.get("pod", "crash")["status"].get("containerStatuses", [{}])
        return int(statuses[0].get("restartCount", 0))

    # With the usual back-off of 10, 20, 40 s the fourth restart comes after more than a minute.
    eventually("four restarts", 25, lambda: restarts() >= 4)


def test_a_nodes_credentials_are_no_administrators(cluster: Cluster, kubectl: Kubectl) -> None:
    def told(user: str, *question: str) -> str:
        config = cluster.layout.credential(user)
        return kubectl(f"--kubeconfig={config}", *question, check=False)

    assert "forbidden" in told("node-1", "label", "node", "node-2", "x=y").lower()
    assert "no" in told("node-1-proxy", "auth", "can-i", "get", "secrets")
    assert "yes" in told("node-1-proxy", "auth", "can-i", "list", "services", "--all-namespaces")
    assert "no" in told("provisioner", "auth", "can-i", "list", "pods")


@pytest.mark.timeout(120)
def test_a_second_up_changes_nothing_and_completes_what_is_missing(
    cluster: Cluster, kubectl: Kubectl
) -> None:
    def running() -> dict[tuple[str, str], int]:
        return {(p.host, p.component): p.pid for p in processes.marked(cluster.name) if p.is_component}

    before = running()
    cluster.up()
    assert running() == before

    victims = [("node-2", "kubelet"), ("control", "kube-scheduler"), ("control", "provisioner")]
    for victim in victims:
        os.kill(before[victim], 9)
        eventually(f"{victim} is gone", 5, lambda gone=victim: gone not in running())  # type: ignore[misc]
    assert "kubelet" in next(node.missing for node in cluster.status() if node.name == "node-2")
    cluster.up()
    after = running()
    assert set(after) == set(before)
    assert {key for key in after if after[key] != before[key]} == set(victims)
    with pytest.raises(BadRequest, match="`down` first"):
        cluster.up(nodes=1)


def test_the_command_line_shows_what_is_and_refuses_what_is_not(cluster: Cluster) -> None:
    def call(*words: str) -> tuple[int, str]:
        done = CliRunner().invoke(app, [*words, "--name", cluster.name], env={"COLUMNS": "120"})
        return done.exit_code, done.output

    code, text = call("status")
    assert code == 0, text
    assert text.count("Ready") == len(cluster.nodes)
    assert call("kubeconfig") == (0, f"{cluster.kubeconfig}\n")
    assert call("logs", "node-1.kubelet")[0] == 0
    for words, why in [
        (("logs", "node-1.nothing"), "there are: control.etcd"),
        (("node", "cut", "node-77"), "no node"),
        (("node", "cut", "node-9"), f"it has {len(cluster.nodes)} nodes"),
        (("up", "--nodes", "0"), "from 1 to"),
        (("up", "--mount", "/no/such"), "no such file"),
    ]:
        code, text = call(*words)
        assert code == 1, text
        assert why in text


def test_the_machine_itself_reaches_pods(kubectl: Kubectl) -> None:
    kubectl.apply(_pod("server", "node-2", SERVE))
    kubectl.wait("condition=Ready", "pod/server")
    address = kubectl.get("pod", "server")["status"]["podIP"]

    def connects() -> bool:
        with socket.socket() as probe:
            probe.settimeout(1)
            return probe.connect_ex((address, 8000)) == 0

    eventually("the pod listens", 10, connects)
