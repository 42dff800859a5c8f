"""Our mark on a node, as JSON patches: the taint `stormjib.io/isolated` and the condition `TrainingHardwareSuspect`.

Every patch first tests the node's resourceVersion: what was decided on one state of a node is written to no other one, and
a taint that somebody else sets meanwhile is not lost. `spec.unschedulable` and NoExecute are never ours.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from stormjib_operator import names

if TYPE_CHECKING:
    from stormjib_operator.isolation.seen import Manifest, Node
    from stormjib_operator.observed import Now


def taint(node: Node, reason: str) -> list[Manifest]:
    """Operations on the node that give it our taint; none where it has it."""
    if any(each["key"] == names.TAINT for each in node.taints):
        return []
    ours = {"key": names.TAINT, "value": label_value(reason), "effect": "NoSchedule"}
    return _write(node, "/spec/taints", [*node.taints, ours], there=bool(node.taints))


def untaint(node: Node) -> list[Manifest]:
    """Operations on the node that take our taint away; none where it has none."""
    kept = [each for each in node.taints if each["key"] != names.TAINT]
    return _write(node, "/spec/taints", kept, there=True) if len(kept) < len(node.taints) else []


def suspect(node: Node, reason: str, message: str, now: Now) -> list[Manifest]:
    """Operations on the node's status that give it our condition; none where it has it."""
    if node.suspected:
        return []
    ours = {
        "type": names.SUSPECT,
        "status": "True",
        "reason": label_value(reason),
        "message": message[:1024],
        "lastHeartbeatTime": now.text,
        "lastTransitionTime": now.text,
    }
    rest = [each for each in node.conditions if each.get("type") != names.SUSPECT]
    return _write(node, "/status/conditions", [*rest, ours], there=bool(node.conditions))


def clear(node: Node) -> list[Manifest]:
    """Operations on the node's status that take our condition away; none where it has none."""
    kept = [each for each in node.conditions if each.get("type") != names.SUSPECT]
    there = len(kept) < len(node.conditions)
    return _write(node, "/status/conditions", kept, there=True) if there else []


def label_value(text: str) -> str:
    """What of a text may stand in a taint's value."""
    return re.sub(r"[^A-Za-z0-9]", "", text)[:63] or "Suspect"


def _write(node: Node, path: str, value: list[Manifest], *, there: bool) -> list[Manifest]:
    version = {"op": "test", "path": "/metadata/resourceVersion", "value": node.resource_version}
    return [version, {"op": "replace" if there else "add", "path": path, "value": value}]
