"""The children of a job that are no pods: Service, NetworkPolicy, token Secret, kept template."""

from __future__ import annotations

import hashlib
import json
from typing import TYPE_CHECKING

from stormjib_operator import names
from stormjib_operator.pods import owner

if TYPE_CHECKING:
    from stormjib_operator.observed import Job, Manifest, Observed, Render, Rendered


def service(job: Job, incarnation: int, cluster_ip: str) -> Manifest:
    """The coordinator's Service. It names the incarnation, so that a cut predecessor gets nothing; its address is kept,
    because running pods know the coordinator by it."""
    spec: Manifest = {
        "type": "ClusterIP",
        "selector": {
            names.JOB: job.name,
            names.ROLE: names.Role.COORDINATOR.value,
            names.INCARNATION: str(incarnation),
        },
        "ports": [
            {"name": "coordinator", "port": names.COORDINATOR_PORT, "targetPort": names.COORDINATOR_PORT}
        ],
        # An agent that waits for the coordinator's first second must not be turned away by its readiness.
        "publishNotReadyAddresses": True,
    }
    if cluster_ip:
        spec["clusterIP"] = cluster_ip
    return _applied(_child(job, "v1", "Service", names.service(job.name), spec=spec))


def network_policy(job: Job, render: Render) -> Manifest:
    """Who may reach the job's pods: each other, the operator, and who reads metrics."""
    ours = {"podSelector": {"matchLabels": {names.JOB: job.name}}}
    port = [{"protocol": "TCP", "port": names.COORDINATOR_PORT}]
    ingress: list[Manifest] = [
        {"from": [ours]},
        {"from": [_namespace({"kubernetes.io/metadata.name": render.operator_namespace})], "ports": port},
    ]
    if render.monitoring_labels is not None:
        ingress.append({"from": [_namespace(dict(render.monitoring_labels))], "ports": port})
    spec = ours | {"policyTypes": ["Ingress"], "ingress": ingress}
    kind = "networking.k8s.io/v1"
    return _applied(_child(job, kind, "NetworkPolicy", names.network_policy(job.name), spec=spec))


def _namespace(labels: dict[str, str]) -> Manifest:
    return {"namespaceSelector": {"matchLabels": labels}}


def token_secret(seen: Observed) -> Manifest:
    """Both tokens of the job, for its pods. We may create Secrets and read none, so a second create is a 409 and fine."""
    job, tokens = seen.job, seen.tokens
    content = {"agent": tokens.agent, "operator": tokens.operator}
    name = names.token_secret(job.name, job.uid)
    return _child(job, "v1", "Secret", name, immutable=True, stringData=content)


def revision(job: Job, rendered: Rendered) -> Manifest:
    """The rendered pods, kept: what a ControllerRevision is for (immutable, owned, not in the way of the status)."""
    name = names.revision(job.name, job.uid, job.generation)
    return _child(job, "apps/v1", "ControllerRevision", name, revision=job.generation, data=rendered.data())


def digest(manifest: Manifest) -> str:
    """Digest of what we want an object to be."""
    return hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()[:16]


def applied(manifest: Manifest) -> str:
    """The digest that an object to be applied carries."""
    return str(manifest["metadata"]["annotations"][names.APPLIED])


def _child(job: Job, api_version: str, kind: str, name: str, **content: object) -> Manifest:
    meta = {
        "name": name,
        "namespace": job.namespace,
        "labels": names.labels(job.name, kind.lower()),
        "ownerReferences": owner(job),
    }
    return {"apiVersion": api_version, "kind": kind, "metadata": meta, **content}


def _applied(manifest: Manifest) -> Manifest:
    manifest["metadata"]["annotations"] = {names.APPLIED: digest(manifest)}
    return manifest
