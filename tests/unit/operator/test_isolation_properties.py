"""Whatever jobs, nodes, humans and crashes do, in whatever order: no limit is ever broken.

The checks look at what was written to nodes and at what the test itself has done, and believe no word of the core.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from fakes.isolation import READY, Marked, World, evidence, node, policy
from stormjib_operator import names
from stormjib_operator.isolation.lifecycle import STALE_S
from stormjib_operator.isolation.models import Mode, Outcome

if TYPE_CHECKING:
    from stormjib_operator.isolation.seen import Node

COUNT, WINDOW_S = 20, 600
LOOSE: dict[str, Any] = {
    "max_isolated_percent": 20,
    "max_per_window": 64,
    "max_nodes_per_job": 64,
    "max_per_domain": 64,
    "correlation_percent": 100,
    "breaker_percent": 50,
}
# One limit is tight at a time, or the tightest would hide all others.
TIGHT: dict[str, dict[str, Any]] = {
    "fleet": {"max_isolated_percent": 5},
    "rate": {"max_per_window": 2},
    "job": {"max_nodes_per_job": 1},
    "domain": {"max_per_domain": 1},
    "breaker": {"max_isolated_percent": 10, "breaker_percent": 1},
    "all": {"max_isolated_percent": 10, "max_per_window": 3, "max_nodes_per_job": 2, "max_per_domain": 1},
}
RACK = "topology.kubernetes.io/rack"
BAD = {"type": "KernelDeadlock", "status": "True"}
NAMESPACES = ("a", "b", "trusted")
numbers = st.integers(0, COUNT - 1)


@dataclass
class Heard:
    """What was really said and seen of one node; answered by a release, as far as the test knows."""

    accusers: set[str] = field(default_factory=set)
    trusted: bool = False
    failed: bool = False
    conditions: bool = False


class Isolations(RuleBasedStateMachine):
    """A fleet, its tenants, its humans."""

    @initialize(tight=st.sampled_from(sorted(TIGHT)))
    def begin(self, tight: str) -> None:
        spec = policy(
            trusted_namespaces=("trusted",),
            window_seconds=WINDOW_S,
            cooldown_seconds=60,
            probation_seconds=600,
            storm_cooldown_seconds=60,
            **LOOSE | TIGHT[tight],
        )
        self.world = World(spec, {f"n{i}": node(f"n{i}", f"r{i // 2}") for i in range(COUNT)})
        self.heard = {name: Heard() for name in self.world.nodes}
        self.checked = 0

    # --- jobs -------------------------------------------------------------------------------------------------------

    @rule(
        n=numbers,
        who=st.sampled_from(NAMESPACES),
        job=st.integers(0, 5),
        weight=st.sampled_from((30, 60, 90)),
        confirmed=st.booleans(),
        left=st.sampled_from((True, True, True, False)),
    )
    def accuse(self, n: int, who: str, job: int, weight: int, confirmed: bool, left: bool) -> None:
        said = evidence(
            who, weight, self.world.seconds, confirmed=confirmed, left=left, job=f"job{job}", job_nodes=20
        )
        self.world.accuse(f"n{n}", said)
        self.heard[f"n{n}"].accusers.add(who)
        self.heard[f"n{n}"].trusted |= confirmed and who == "trusted"

    @rule(n=numbers, count=st.integers(2, 6), one_job=st.booleans())
    def many_are_accused_and_believed(self, n: int, count: int, one_job: bool) -> None:
        """Neighbours share a rack; one job or one for each: so every limit is leaned on, by more than it lets through."""
        self.cordon(n, one_job)
        for number in range(n, n + count):
            self.accuse(number % COUNT, "trusted", 0 if one_job else number % 6, 90, True, True)
        self.look(2)

    # --- nodes, and other parties -----------------------------------------------------------------------------------

    @rule(n=numbers, bad=st.booleans())
    def condition(self, n: int, bad: bool) -> None:
        found = self._node(n)
        rest = tuple(c for c in found.conditions if c != BAD)
        self.world.change(found.name, conditions=(*rest, BAD) if bad else rest)
        self.heard[found.name].conditions |= bad

    @rule(n=numbers, cordoned=st.booleans())
    def cordon(self, n: int, cordoned: bool) -> None:
        self.world.change(f"n{n}", unschedulable=cordoned)

    @rule(n=numbers, there=st.booleans())
    def foreign_taint(self, n: int, there: bool) -> None:
        other = {"key": "node.kubernetes.io/not-ready", "effect": "NoExecute"}
        rest = tuple(t for t in self._node(n).taints if t != other)
        self.world.change(f"n{n}", taints=(*rest, other) if there else rest)

    @rule(n=numbers)
    def node_comes_anew(self, n: int) -> None:
        self.world.nodes[f"n{n}"] = node(f"n{n}", f"r{n // 2}")

    @rule(n=numbers, outcome=st.sampled_from((Outcome.PASSED, Outcome.FAILED, Outcome.UNKNOWN)))
    def preflight_ends(self, n: int, outcome: Outcome) -> None:
        if self.world.ends(f"n{n}", outcome):
            self.heard[f"n{n}"].failed |= outcome is Outcome.FAILED

    @rule(outcome=st.sampled_from((Outcome.PASSED, Outcome.FAILED)))
    def all_preflights_end(self, outcome: Outcome) -> None:
        for n in range(COUNT):
            self.preflight_ends(n, outcome)

    # --- humans -----------------------------------------------------------------------------------------------------

    @rule(n=numbers)
    def delete(self, n: int) -> None:
        self.world.isolations.pop(f"n{n}", None)

    @rule(n=numbers)
    def untaint(self, n: int) -> None:
        self.world.change(f"n{n}", taints=())

    @rule(n=numbers, value=st.sampled_from(("enabled", "disabled", "")))
    def label(self, n: int, value: str) -> None:
        labels = {key: old for key, old in self._node(n).labels.items() if key != names.ISOLATION_LABEL}
        self.world.change(f"n{n}", labels=labels | ({names.ISOLATION_LABEL: value} if value else {}))

    @rule(mode=st.sampled_from(Mode), paused=st.booleans())
    def policy_changes(self, mode: Mode, paused: bool) -> None:
        change = {"mode": mode, "pause_requests": ("upgrade",) if paused else ()}
        self.world.spec = self.world.spec.model_copy(update=change)

    @rule()
    def reset_breaker(self) -> None:
        self.world.reset = str(self.world.memory.breaker.trip)

    # --- the isolator, and time -------------------------------------------------------------------------------------

    @rule(seconds=st.sampled_from((1, 30, 61, 300, 601, 7200, -3600)))
    def time_passes(self, seconds: int) -> None:
        self.world.seconds += seconds

    @rule(times=st.integers(1, 3))
    def look(self, times: int) -> None:
        for _ in range(times):
            self._look(None)

    @rule(writes=st.integers(0, 8))
    def look_and_die(self, writes: int) -> None:
        self._look(writes)

    def _look(self, writes: int | None) -> None:
        before = dict(self.world.nodes)
        made = self.world.look(writes=writes)
        for entry in self.world.log[self.checked :]:
            assert not made.policy.breaker.open
            self._check(entry, before[entry.node])
        self.checked = len(self.world.log)

    # --- what must hold ----------------------------------------------------------------------------------------------

    def _check(self, entry: Marked, found: Node) -> None:
        spec, world = self.world.spec, self.world
        assert spec.mode is Mode.TAINT
        assert not spec.pause_requests
        assert found.labels.get(names.ISOLATION_LABEL) == "enabled"
        assert not found.unschedulable
        assert not found.taints
        fleet = [n for n in world.nodes.values() if n.labels.get(names.ISOLATION_LABEL) == "enabled"]
        assert len(entry.others) + 1 <= max(1, len(fleet) * spec.limits.max_isolated_percent // 100)
        racks = [world.nodes[n].labels[RACK] for n in (entry.node, *entry.others)]
        assert racks.count(found.labels[RACK]) <= spec.limits.max_per_domain
        self._check_jobs(entry)
        self._check_grounds(entry.node)

    def _check_jobs(self, entry: Marked) -> None:
        def jobs(name: str) -> set[str]:
            found = self.world.isolations.get(name)
            return {f"{e.namespace}/{e.job}" for e in found.spec.evidence} if found else set()

        for job in jobs(entry.node):
            assert sum(job in jobs(n) for n in entry.others) + 1 <= self.world.spec.limits.max_nodes_per_job

    def _check_grounds(self, name: str) -> None:
        heard = self.heard[name]
        own_word = heard.failed or heard.conditions or heard.trusted
        assert heard.accusers
        assert own_word or len(heard.accusers) >= 2, "one tenant alone has got a node isolated"

    @invariant()
    def no_more_than_the_rate(self) -> None:
        world = getattr(self, "world", _NOBODY)
        times = sorted(entry.seconds for entry in world.log)
        for first, last in zip(times, times[world.spec.limits.max_per_window :], strict=False):
            assert last - first >= WINDOW_S - STALE_S

    @invariant()
    def only_ours_is_written(self) -> None:
        for each in getattr(self, "world", _NOBODY).nodes.values():
            ours = [t for t in each.taints if t["key"] == names.TAINT]
            assert all(t["effect"] == "NoSchedule" for t in ours)
            assert READY in each.conditions

    def _node(self, n: int) -> Node:
        return self.world.nodes[f"n{n}"]


_NOBODY: Any = World(policy(), {})
TestIsolations = Isolations.TestCase
TestIsolations.settings = settings(
    max_examples=150,
    stateful_step_count=40,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much],
)


def test_the_machine_does_isolate_nodes() -> None:
    """Else its checks would check nothing: the plainest history of all leads to a mark, and that mark is checked."""
    machine = Isolations()
    machine.begin(tight="all")
    machine.accuse(0, "trusted", 0, 90, True, True)
    machine.look(2)
    assert [entry.node for entry in machine.world.log] == ["n0"]
    assert machine.checked == 1
    assert machine.world.log[0].others == frozenset()


@pytest.mark.parametrize("one_job", [True, False])
@pytest.mark.parametrize("tight", sorted(TIGHT))
def test_each_limit_is_leaned_on_at_least_once(tight: str, one_job: bool) -> None:
    """Random histories need not come by: here each limit is asked for more than it lets through, and checked as above."""
    machine = Isolations()
    machine.begin(tight=tight)
    for n in (0, 6):
        machine.many_are_accused_and_believed(n, 6, one_job)
        machine.time_passes(601)
        machine.no_more_than_the_rate()
    assert machine.checked == len(machine.world.log)
    assert machine.checked >= (0 if tight == "breaker" else 1)
