"""What speaks against a node, and how much of it: pure.

A tenant makes its own records, verdicts and checks, so all that the jobs of one namespace say weighs 0.9 at most of the
1.0 that isolates. The rest must come from what that tenant does not run: a preflight of ours on the node after the
namespace has left it, a condition of the node, or a job of another namespace. A namespace that an administrator trusts is
believed alone, where a check has confirmed its verdict.

Percent throughout, whole numbers: 100 isolates.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from stormjib_operator.isolation.models import Weight

if TYPE_CHECKING:
    from stormjib_operator.isolation.models import Evidence, IsolationStatus, PolicySpec
    from stormjib_operator.isolation.seen import Isolation, Node
    from stormjib_operator.observed import Now

ISOLATES = 100
ONE_TENANT = 90
"""The most that one namespace can weigh."""
FAILED = 50
"""One failed preflight of ours; two isolate alone, one confirms a verdict of middling weight."""
CONDITION = 100
FRESH_S = 3600.0
"""A confirmed verdict of a trusted namespace, and a preflight of ours, keep their full weight so long: else the first
second would take a part of what is just enough."""


def weigh(
    isolation: Isolation, status: IsolationStatus, node: Node, policy: PolicySpec, now: Now
) -> tuple[Weight, ...]:
    """What each source weighs now, the heaviest first. Nothing weighs where no open evidence accuses the node."""
    said = [
        Weight(source=f"Namespace/{each.namespace}", percent=_said(each, policy, now))
        for each in open_evidence(isolation, status)
    ]
    if not said:
        return ()
    own = [Weight(source="Preflight", percent=_failed(status, policy, now)), *_conditions(node, policy)]
    return tuple(sorted((w for w in (*said, *own) if w.percent), key=lambda w: (-w.percent, w.source)))


def total(weights: tuple[Weight, ...]) -> int:
    """All sources together, in percent; what is beyond ten times enough is cut."""
    return min(sum(each.percent for each in weights), 1000)


def open_evidence(isolation: Isolation, status: IsolationStatus) -> tuple[Evidence, ...]:
    """Evidence that no passed preflight and no release has answered."""
    return tuple(each for each in isolation.spec.evidence if each.id not in status.answered)


def _said(evidence: Evidence, policy: PolicySpec, now: Now) -> int:
    trusted = evidence.namespace in policy.trusted_namespaces
    if trusted and evidence.confirmed:
        return _decayed(ISOLATES, now.since(evidence.time), policy, grace_s=FRESH_S)
    return _decayed(min(evidence.weight_percent, ONE_TENANT), now.since(evidence.time), policy)


def _failed(status: IsolationStatus, policy: PolicySpec, now: Now) -> int:
    return _decayed(FAILED * min(status.fails, 3), now.since(status.last_fail_time), policy, grace_s=FRESH_S)


def _decayed(percent: int, age_s: float, policy: PolicySpec, grace_s: float = 60.0) -> int:
    """Half after each half-life. Ages are hours of a wall clock, so a minute of two hosts' difference is no matter: what is
    younger than the grace, or from a clock ahead of ours, weighs in full."""
    if percent == 0 or age_s <= grace_s:
        return percent
    return int(percent * math.exp2(-age_s / policy.half_life_seconds))


def _conditions(node: Node, policy: PolicySpec) -> list[Weight]:
    bad = (c for c in policy.node_conditions if c.status == node.condition(c.type))
    return [Weight(source=f"Condition/{each.type}", percent=CONDITION) for each in bad]
