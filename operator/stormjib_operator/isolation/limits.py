"""What isolation must never exceed: pure. Everything here can only forbid.

The memory of the limits is threefold, so that no restart and no human can make it forget: the marks that nodes bear, the
states of the NodeIsolations, and the policy's own list of recent isolations, which is written before anything else is.
A time that lies ahead of our clock counts as now.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from stormjib_operator import names
from stormjib_operator.isolation.models import Breaker, Mode, Recent
from stormjib_operator.isolation.weigh import open_evidence

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from stormjib_operator.isolation.models import Evidence, IsolationStatus, PolicySpec
    from stormjib_operator.isolation.seen import Isolation, Node, View
    from stormjib_operator.observed import Now

ACCUSED_S = 600.0
"""Accusations of one job that lie so close together are at a time."""


@dataclass(frozen=True)
class Refusal:
    """Why a node is not isolated: one word and a sentence."""

    reason: str
    message: str


@dataclass(frozen=True)
class Ledger:
    """What counts against the limits in the middle of a pass: it grows with every isolation that the pass decides."""

    view: View
    statuses: Mapping[str, IsolationStatus]
    """Of every NodeIsolation, as this pass has left it so far."""
    recent: tuple[Recent, ...]
    breaker: Breaker

    @property
    def fleet(self) -> tuple[Node, ...]:
        """Nodes that opted in."""
        policy = self.view.policy.spec
        return tuple(node for node in self.view.nodes.values() if opted_in(node, policy))

    @property
    def marked(self) -> frozenset[str]:
        """Nodes that bear our mark or are about to, with or without a NodeIsolation."""
        borne = {name for name, node in self.view.nodes.items() if node.marked}
        return frozenset(borne | {name for name, status in self.statuses.items() if status.state.marked})


def opted_in(node: Node, policy: PolicySpec) -> bool:
    """Whether the node may be isolated as far as its labels go."""
    label = policy.opt_in_label
    if node.labels.get(names.ISOLATION_LABEL) == "disabled" or node.control_plane:
        return False
    return node.labels.get(label.key) == label.value


def allowed(fleet: int, policy: PolicySpec) -> int:
    """How many of so many nodes may be isolated at a time."""
    return max(1, fleet * policy.limits.max_isolated_percent // 100) if fleet else 0


def forbids(ledger: Ledger, isolation: Isolation, now: Now) -> Refusal | None:
    """The first limit that forbids isolating the node, or None."""
    node = ledger.view.nodes.get(isolation.spec.node_name)
    checks = (_foreign, _mode, _breaker, _correlated, _fleet, _rate, _domain, _job, _capacity)
    if node is None:
        return Refusal("NoSuchNode", "the node is not there")
    for check in checks:
        refusal = check(ledger, isolation, node, now)
        if refusal is not None:
            return refusal
    return None


def believable(ledger: Ledger, isolation: Isolation, now: Now) -> bool:
    """Whether a node that is to be isolated counts for the breaker: one that is nobody's business of ours, or that a job
    accuses in one breath with many others, does not."""
    node = ledger.view.nodes.get(isolation.spec.node_name)
    return node is not None and not any(c(ledger, isolation, node, now) for c in (_foreign, _correlated))


def tripped(ledger: Ledger, demanded: int, now: Now) -> Breaker:
    """The breaker, opened where so many nodes are to be isolated at a time that something else must be wrong."""
    policy, fleet = ledger.view.policy.spec, len(ledger.fleet)
    most = max(allowed(fleet, policy), fleet * policy.limits.breaker_percent // 100)
    if ledger.breaker.open or demanded <= most:
        return ledger.breaker
    words = f"{demanded} of {fleet} nodes are to be isolated at a time; more than {most} are not believed"
    return Breaker(open=True, trip=ledger.breaker.trip + 1, message=words, time=now.text)


def lately(ledger: Ledger, now: Now) -> frozenset[str]:
    """Nodes that were isolated within the window."""
    window = ledger.view.policy.spec.limits.window_seconds
    return frozenset(each.node_name for each in ledger.recent if age(each.time, now) < window)


def reset(breaker: Breaker, acknowledged: str, now: Now) -> Breaker:
    """The breaker, closed where a human has named just this trip."""
    if not breaker.open or acknowledged != str(breaker.trip):
        return breaker
    return Breaker(open=False, trip=breaker.trip, message=f"trip {breaker.trip} was closed", time=now.text)


def age(text: str | None, now: Now) -> float:
    """Seconds since a written time; never negative, infinite where there is none."""
    return max(0.0, now.since(text))


# --- one limit each ---------------------------------------------------------------------------------------------------


def held_by_other(node: Node, policy: PolicySpec) -> str:
    """Why the node is somebody else's business, or nothing."""
    if node.control_plane:
        return "it is a control-plane node"
    if not opted_in(node, policy):
        return "its labels do not let it be isolated"
    if node.unschedulable:
        return "it is cordoned"
    ours = (names.TAINT, *policy.pool_taint_keys)
    foreign = [
        t["key"] for t in node.taints if t["key"] not in ours and t.get("effect") != "PreferNoSchedule"
    ]
    return f"it bears the taint {foreign[0]} of another party" if foreign else ""


def _foreign(ledger: Ledger, isolation: Isolation, node: Node, now: Now) -> Refusal | None:
    words = held_by_other(node, ledger.view.policy.spec)
    return Refusal("NotOurs", words) if words else None


def _mode(ledger: Ledger, isolation: Isolation, node: Node, now: Now) -> Refusal | None:
    policy = ledger.view.policy.spec
    if policy.pause_requests:
        return Refusal("Paused", f"paused: {policy.pause_requests[0]}")
    if policy.mode is Mode.REPORT_ONLY:
        return Refusal(
            "ReportOnly", "the policy's mode is ReportOnly: set it to Taint to have nodes isolated"
        )
    return None


def _breaker(ledger: Ledger, isolation: Isolation, node: Node, now: Now) -> Refusal | None:
    breaker, limits = ledger.breaker, ledger.view.policy.spec.limits
    if breaker.open:
        how = f'annotate the policy with {names.RESET_BREAKER}="{breaker.trip}" to close the breaker'
        return Refusal("BreakerOpen", f"{breaker.message}: {how}")
    if breaker.trip and age(breaker.time, now) < limits.storm_cooldown_seconds:
        return Refusal("StormCooldown", "the breaker was closed a short while ago")
    return None


def _fleet(ledger: Ledger, isolation: Isolation, node: Node, now: Now) -> Refusal | None:
    fleet, marked = len(ledger.fleet), len(ledger.marked - {node.name})
    most = allowed(fleet, ledger.view.policy.spec)
    if marked < most:
        return None
    return Refusal("FleetLimit", f"{marked} of {fleet} nodes are isolated; no more than {most} may be")


def _rate(ledger: Ledger, isolation: Isolation, node: Node, now: Now) -> Refusal | None:
    limits = ledger.view.policy.spec.limits
    recent = sum(age(each.time, now) < limits.window_seconds for each in ledger.recent)
    if recent < limits.max_per_window:
        return None
    return Refusal("RateLimit", f"{recent} nodes were isolated within {limits.window_seconds} s")


def _domain(ledger: Ledger, isolation: Isolation, node: Node, now: Now) -> Refusal | None:
    limits = ledger.view.policy.spec.limits
    domain = node.labels.get(limits.topology_key)
    if domain is None:
        return None
    there = {n.name for n in ledger.view.nodes.values() if n.labels.get(limits.topology_key) == domain}
    others = there & (ledger.marked | lately(ledger, now)) - {node.name}
    if len(others) < limits.max_per_domain:
        return None
    words = f"{len(others)} nodes of {limits.topology_key}={domain} are isolated: suspect what they share"
    return Refusal("DomainLimit", words)


def _job(ledger: Ledger, isolation: Isolation, node: Node, now: Now) -> Refusal | None:
    most = ledger.view.policy.spec.limits.max_nodes_per_job
    for job in jobs(isolation.spec.evidence):
        held = {name for name in _accused_by(ledger, job) if name in ledger.marked and name != node.name}
        if len(held) >= most:
            return Refusal("JobLimit", f"{len(held)} nodes are isolated on the evidence of {job}")
    return None


def _correlated(ledger: Ledger, isolation: Isolation, node: Node, now: Now) -> Refusal | None:
    limits = ledger.view.policy.spec.limits
    for each in open_evidence(isolation, ledger.statuses[isolation.name]):
        accused = _accused_by(ledger, _job_of(each), now)
        if len(accused) >= 2 and 100 * len(accused) > limits.correlation_percent * each.job_nodes:
            words = f"{_job_of(each)} accuses {len(accused)} of its {each.job_nodes} nodes at a time"
            return Refusal("Correlated", f"{words}: suspect its program or the network")
    return None


def _capacity(ledger: Ledger, isolation: Isolation, node: Node, now: Now) -> Refusal | None:
    policy = ledger.view.policy.spec
    needed = max((each.least_nodes for each in isolation.spec.evidence), default=0)
    usable = [n for n in ledger.fleet if n.ready and not held_by_other(n, policy) and n.name != node.name]
    left = sum(n.name not in ledger.marked for n in usable)
    if not policy.limits.free_capacity or left >= needed:
        return None
    return Refusal("NoCapacity", f"{left} healthy nodes would stay; training jobs need {needed}")


def jobs(evidence: Iterable[Evidence]) -> tuple[str, ...]:
    """The jobs behind evidence, as `namespace/name`."""
    return tuple(_job_of(each) for each in evidence)


def _job_of(evidence: Evidence) -> str:
    return f"{evidence.namespace}/{evidence.job}"


def _accused_by(ledger: Ledger, job: str, now: Now | None = None) -> frozenset[str]:
    """Nodes that the job accuses; with `now`, those of open evidence of the last minutes."""
    found = set()
    for name, isolation in ledger.view.isolations.items():
        status = ledger.statuses[name]
        evidence = isolation.spec.evidence if now is None else open_evidence(isolation, status)
        if any(_job_of(e) == job and (now is None or age(e.time, now) < ACCUSED_S) for e in evidence):
            found.add(name)
    return frozenset(found)
