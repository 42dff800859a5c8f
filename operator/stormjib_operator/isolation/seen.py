"""What the isolator sees of the cluster, as plain records, and the only functions that know the key names behind it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from stormjib_operator import names
from stormjib_operator.isolation.models import IsolationSpec, IsolationStatus, PolicySpec, PolicyStatus

if TYPE_CHECKING:
    from collections.abc import Mapping

    from stormjib_operator.isolation.models import Outcome

Manifest = dict[str, Any]
CONTROL_PLANE = ("node-role.kubernetes.io/control-plane", "node-role.kubernetes.io/master")


@dataclass(frozen=True)
class Node:
    """A node, as far as isolation needs it."""

    name: str
    uid: str
    resource_version: str = ""
    labels: Mapping[str, str] = field(default_factory=dict)
    taints: tuple[Manifest, ...] = ()
    conditions: tuple[Manifest, ...] = ()
    unschedulable: bool = False

    @property
    def control_plane(self) -> bool:
        return any(label in self.labels for label in CONTROL_PLANE)

    @property
    def marked(self) -> bool:
        """It bears our taint or our condition."""
        return any(taint.get("key") == names.TAINT for taint in self.taints) or self.suspected

    @property
    def suspected(self) -> bool:
        return self.condition(names.SUSPECT) == "True"

    @property
    def ready(self) -> bool:
        return self.condition("Ready") == "True"

    def condition(self, kind: str) -> str:
        """The status of a condition; empty where there is none."""
        return next((str(c.get("status", "")) for c in self.conditions if c.get("type") == kind), "")


@dataclass(frozen=True)
class Isolation:
    """A NodeIsolation."""

    name: str
    uid: str
    resource_version: str
    spec: IsolationSpec
    status: IsolationStatus


@dataclass(frozen=True)
class Policy:
    """The IsolationPolicy."""

    spec: PolicySpec
    status: PolicyStatus
    resource_version: str
    reset: str = ""
    """The trip of the breaker that a human has closed."""


@dataclass(frozen=True)
class Preflight:
    """A preflight Job of ours."""

    name: str
    uid: str
    node: str
    outcome: Outcome


@dataclass(frozen=True)
class View:
    """All that one pass of the isolator knows."""

    policy: Policy
    nodes: Mapping[str, Node]
    isolations: Mapping[str, Isolation]
    preflights: tuple[Preflight, ...] = ()


def see_node(manifest: Manifest) -> Node:
    """The record of a node."""
    meta, spec = manifest["metadata"], manifest.get("spec", {})
    return Node(
        name=meta["name"],
        uid=meta["uid"],
        resource_version=meta.get("resourceVersion", ""),
        labels=meta.get("labels", {}),
        taints=tuple(spec.get("taints", ())),
        conditions=tuple(manifest.get("status", {}).get("conditions", ())),
        unschedulable=bool(spec.get("unschedulable", False)),
    )


def see_isolation(manifest: Manifest) -> Isolation:
    """The record of a NodeIsolation. Raises pydantic's ValidationError where it does not fit the models."""
    meta = manifest["metadata"]
    return Isolation(
        name=meta["name"],
        uid=meta["uid"],
        resource_version=meta["resourceVersion"],
        spec=IsolationSpec.model_validate(manifest["spec"]),
        status=IsolationStatus.model_validate(manifest.get("status", {})),
    )


def see_policy(manifest: Manifest) -> Policy:
    """The record of the IsolationPolicy. Raises pydantic's ValidationError where it does not fit the models."""
    meta = manifest["metadata"]
    return Policy(
        spec=PolicySpec.model_validate(manifest.get("spec", {})),
        status=PolicyStatus.model_validate(manifest.get("status", {})),
        resource_version=meta["resourceVersion"],
        reset=meta.get("annotations", {}).get(names.RESET_BREAKER, ""),
    )
