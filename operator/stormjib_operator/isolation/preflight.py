"""The preflight Job: our own measurement on one node, which no tenant runs.

The scheduler places it, by the node's name: so it gets the devices that it asks for only when nobody else has them. It
tolerates our taint and those that the pool bears anyway, and nothing else.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from stormjib_operator import names
from stormjib_operator.isolation.models import Outcome
from stormjib_operator.isolation.seen import Preflight

if TYPE_CHECKING:
    from collections.abc import Mapping

    from stormjib_operator.isolation.models import PolicySpec
    from stormjib_operator.isolation.seen import Manifest, Node

LABEL = f"{names.GROUP}/preflight"
"""On every preflight Job: the watch and the list go by it."""
NODE = f"{names.GROUP}/node"
"""Annotation: the node that is looked at."""
DEADLINE_S = 180
"""Ten seconds of measuring, and what it takes to place the pod and pull the image."""
KEPT_S = 600
UNFIT = 1
"""The exit code that says that the node is not fit; any other end says nothing about the node."""


@dataclass(frozen=True)
class Image:
    """What a preflight runs, by the isolator's own settings."""

    image: str
    pull_policy: str = "IfNotPresent"
    pull_secrets: tuple[str, ...] = ()
    run_as_user: int | None = None
    args: tuple[str, ...] = ()
    env: tuple[Mapping[str, Any], ...] = ()
    resources: Mapping[str, Any] = field(default_factory=dict)


def manifest(name: str, namespace: str, node: Node, policy: PolicySpec, image: Image) -> Manifest:
    """The Job that looks at the node."""
    labels = {LABEL: "true", "app.kubernetes.io/part-of": "stormjib"}
    rules = [
        {"action": "FailJob", "onExitCodes": _exit("In", UNFIT)},
        {"action": "Ignore", "onPodConditions": [{"type": "DisruptionTarget"}]},
    ]
    return {
        "apiVersion": "batch/v1",
        "kind": "Job",
        "metadata": {
            "name": name,
            "namespace": namespace,
            "labels": labels,
            "annotations": {NODE: node.name},
        },
        "spec": {
            "backoffLimit": 0,
            "activeDeadlineSeconds": DEADLINE_S,
            "ttlSecondsAfterFinished": KEPT_S,
            "podFailurePolicy": {"rules": rules},
            "template": {"metadata": {"labels": labels}, "spec": _pod(node, policy, image)},
        },
    }


def _exit(operator: str, *codes: int) -> Manifest:
    return {"containerName": "preflight", "operator": operator, "values": list(codes)}


def _pod(node: Node, policy: PolicySpec, image: Image) -> Manifest:
    security: Manifest = {"runAsNonRoot": True, "seccompProfile": {"type": "RuntimeDefault"}}
    if image.run_as_user is not None:
        security["runAsUser"] = image.run_as_user
    here = {"key": "metadata.name", "operator": "In", "values": [node.name]}
    required = {"nodeSelectorTerms": [{"matchFields": [here]}]}
    spec: Manifest = {
        "restartPolicy": "Never",
        "automountServiceAccountToken": False,
        "enableServiceLinks": False,
        "terminationGracePeriodSeconds": 1,
        "securityContext": security,
        "affinity": {"nodeAffinity": {"requiredDuringSchedulingIgnoredDuringExecution": required}},
        "tolerations": [{"key": key, "operator": "Exists"} for key in (names.TAINT, *policy.pool_taint_keys)],
        "containers": [_container(image)],
        "volumes": [{"name": "tmp", "emptyDir": {}}],
    }
    return spec | (
        {"imagePullSecrets": [{"name": n} for n in image.pull_secrets]} if image.pull_secrets else {}
    )


def _container(image: Image) -> Manifest:
    return {
        "name": "preflight",
        "image": image.image,
        "imagePullPolicy": image.pull_policy,
        "command": ["python3", "-m", "stormjib_runtime.preflight", "--json"],
        "args": list(image.args),
        "env": [{"name": "HOME", "value": "/tmp"}, *copy.deepcopy(list(image.env))],
        "securityContext": {
            "allowPrivilegeEscalation": False,
            "readOnlyRootFilesystem": True,
            "capabilities": {"drop": ["ALL"]},
        },
        "resources": copy.deepcopy(dict(image.resources)),
        "volumeMounts": [{"name": "tmp", "mountPath": "/tmp"}],
    }


def see(job: Manifest) -> Preflight:
    """The record of a preflight Job."""
    meta = job["metadata"]
    return Preflight(meta["name"], meta["uid"], meta.get("annotations", {}).get(NODE, ""), outcome(job))


def outcome(job: Manifest) -> Outcome:
    """How it ended: failed only where the program itself has said so."""
    held = {c["type"]: c for c in job.get("status", {}).get("conditions", ()) if c.get("status") == "True"}
    if "SuccessCriteriaMet" in held or "Complete" in held:
        return Outcome.PASSED
    failed = held.get("FailureTarget") or held.get("Failed")
    if failed is None:
        return Outcome.RUNNING
    return Outcome.FAILED if failed.get("reason") == "PodFailurePolicy" else Outcome.UNKNOWN
