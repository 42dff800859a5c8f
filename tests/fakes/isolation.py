"""A small world for the isolation core: nodes, NodeIsolations, a policy, preflights that end as a test says.

`World.look` is one pass of the isolator; `writes` cuts it off after so many writes, in the order in which the shell makes
them. What is marked, when, and on whose word is kept in a log of the test's own, so that a check believes nothing that
the core says of itself.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

from stormjib_operator import names
from stormjib_operator.isolation.lifecycle import Plan, plan
from stormjib_operator.isolation.models import (
    Evidence,
    IsolationSpec,
    IsolationStatus,
    Limits,
    Mode,
    Outcome,
    PolicySpec,
    PolicyStatus,
    State,
)
from stormjib_operator.isolation.seen import Isolation, Node, Policy, Preflight, View
from stormjib_operator.observed import Now

if TYPE_CHECKING:
    from collections.abc import Callable

READY = {"type": "Ready", "status": "True"}
OURS = {"key": names.TAINT, "effect": "NoSchedule"}
SUSPECT = {"type": names.SUSPECT, "status": "True"}


def at(seconds: float) -> Now:
    """So many seconds after noon."""
    stamp = 1_800_000_000.0 + seconds
    return Now(stamp, datetime.fromtimestamp(stamp, UTC).strftime("%Y-%m-%dT%H:%M:%SZ"))


def node(name: str, rack: str = "", **change: Any) -> Node:
    """A healthy node that opted in."""
    labels = {names.ISOLATION_LABEL: "enabled"} | ({"topology.kubernetes.io/rack": rack} if rack else {})
    return Node(name=name, uid=f"uid-{name}", labels=labels, conditions=(READY,), **change)


def evidence(namespace: str = "a", weight: int = 90, seconds: float = 0.0, **change: Any) -> Evidence:
    """What a job of the namespace says; it has left the node."""
    base: dict[str, Any] = {
        "namespace": namespace,
        "id": f"{namespace}/1/{seconds}",
        "job": "job",
        "slot": 0,
        "pod_uid": "pod",
        "generation": "1.1",
        "syndrome": "NonCommunicationHang",
        "weight_percent": weight,
        "time": at(seconds).text,
        "job_nodes": 16,
        "left": True,
    }
    return Evidence(**base | change)


def policy(mode: Mode = Mode.TAINT, **change: Any) -> PolicySpec:
    """A policy that taints; limits by name, the rest as fields."""
    known = {name: change.pop(name) for name in list(change) if name in Limits.model_fields}
    return PolicySpec(mode=mode, limits=Limits(**known), **change)


@dataclass(frozen=True)
class Marked:
    """One moment in which a node was marked, with what stood there just then."""

    node: str
    seconds: float
    others: frozenset[str]


@dataclass
class World:
    """Everything that the isolator sees, and that humans, jobs and other parties change."""

    spec: PolicySpec
    nodes: dict[str, Node]
    isolations: dict[str, Isolation] = field(default_factory=dict)
    memory: PolicyStatus = field(default_factory=PolicyStatus)
    preflights: dict[str, Preflight] = field(default_factory=dict)
    reset: str = ""
    seconds: float = 0.0
    log: list[Marked] = field(default_factory=list)
    last: Plan | None = None
    _uids: int = 0

    @property
    def now(self) -> Now:
        return at(self.seconds)

    def accuse(self, name: str, said: Evidence) -> None:
        """As the operator's server-side apply does: one entry for each namespace."""
        old = self.isolations.get(name)
        if old is None:
            self._uids += 1
            spec = IsolationSpec(node_name=name, reason="it hangs", evidence=(said,))
            self.isolations[name] = Isolation(name, f"uid-{self._uids}", "1", spec, IsolationStatus())
            return
        kept = tuple(e for e in old.spec.evidence if e.namespace != said.namespace)
        self.isolations[name] = replace(old, spec=old.spec.model_copy(update={"evidence": (*kept, said)}))

    def change(self, name: str, **change: Any) -> None:
        """Somebody else changes a node."""
        self.nodes[name] = replace(self.nodes[name], **change)

    def ends(self, name: str, outcome: Outcome) -> bool:
        """The preflight that runs on a node ends; False where none runs."""
        running = [p for p in self.preflights.values() if p.node == name and p.outcome is Outcome.RUNNING]
        for each in running:
            self.preflights[each.name] = replace(each, outcome=outcome)
        return bool(running)

    def look(self, times: int = 1, writes: int | None = None) -> Plan:
        """So many passes; the last one may break off."""
        for turn in range(times):
            made = self._pass(writes if turn == times - 1 else None)
        return made

    def state(self, name: str) -> State:
        return self.isolations[name].status.state

    def reason(self, name: str) -> str:
        return self.isolations[name].status.reason

    def marked(self) -> set[str]:
        return {name for name, each in self.nodes.items() if each.marked}

    def _pass(self, writes: int | None) -> Plan:
        view = View(
            Policy(self.spec, self.memory, "1", self.reset),
            dict(self.nodes),
            dict(self.isolations),
            tuple(self.preflights.values()),
        )
        made = plan(view, self.now)
        for act in self._acts(made)[:writes]:
            act()
        self.last = made
        return made

    def _acts(self, made: Plan) -> list[Callable[[], None]]:
        acts: list[Callable[[], None]] = [lambda: setattr(self, "memory", made.policy)]
        acts += [lambda n=n, s=s: self._write(n, s) for n, s in made.statuses.items()]  # type: ignore[misc]
        acts += [lambda n=n: self._unmark(n.name) for n in made.unmark]  # type: ignore[misc]
        for each in made.mark:
            acts += [lambda n=each: self._taint(n.name), lambda n=each: self._condition(n.name)]  # type: ignore[misc]
        acts += [lambda p=p: self._drop(p.name) for p in made.drop]  # type: ignore[misc]
        acts += [lambda n=n, j=j: self._start(n.name, j) for n, j in made.start]  # type: ignore[misc]
        return acts

    def _write(self, name: str, status: IsolationStatus) -> None:
        self.isolations[name] = replace(self.isolations[name], status=status)

    def _taint(self, name: str) -> None:
        found = self.nodes[name]
        if not found.marked:
            self.log.append(Marked(name, self.seconds, frozenset(self.marked())))
        if OURS not in found.taints:
            self.change(name, taints=(*found.taints, OURS))

    def _condition(self, name: str) -> None:
        if not self.nodes[name].suspected:
            self.change(name, conditions=(*self.nodes[name].conditions, SUSPECT))

    def _unmark(self, name: str) -> None:
        found = self.nodes[name]
        self.change(
            name,
            taints=tuple(t for t in found.taints if t != OURS),
            conditions=tuple(c for c in found.conditions if c != SUSPECT),
        )

    def _drop(self, name: str) -> None:
        self.preflights.pop(name, None)

    def _start(self, name: str, job: str) -> None:
        self.preflights[job] = Preflight(job, f"uid-{job}", name, Outcome.RUNNING)


def world(count: int = 20, **change: Any) -> World:
    """So many healthy nodes under a policy that taints."""
    return World(policy(**change), {f"n{i}": node(f"n{i}") for i in range(count)})
