"""One pass of the isolator: read everything, plan, write in the order in which the limits need it.

The policy's memory goes first, then the NodeIsolations, then the nodes. Whatever could not be written stops what follows
from it, and the next pass, which reads everything anew, goes on from there.
"""

from __future__ import annotations

import logging
from collections import Counter as Count
from dataclasses import replace
from typing import TYPE_CHECKING

from pydantic import ValidationError

from stormjib_operator import names
from stormjib_operator.errors import ApiError, Conflict
from stormjib_operator.events import about_node
from stormjib_operator.isolation import marks, metrics, preflight
from stormjib_operator.isolation.lifecycle import Plan, plan
from stormjib_operator.isolation.models import PolicySpec, State
from stormjib_operator.isolation.seen import View, see_isolation, see_node, see_policy
from stormjib_operator.observed import Event
from stormjib_operator.reconcile import read_clock

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from stormjib_operator.cluster import Cluster
    from stormjib_operator.events import Recorder
    from stormjib_operator.fields import Model
    from stormjib_operator.isolation.models import IsolationStatus, Mode
    from stormjib_operator.isolation.preflight import Image
    from stormjib_operator.isolation.seen import Isolation, Manifest, Node, Policy
    from stormjib_operator.observed import Now

MANAGER = "stormjib-isolator"

_log = logging.getLogger(__name__)


class Actor:
    """Looks at all NodeIsolations at once. Remembers nothing between two passes but which nodes an event matters for."""

    def __init__(
        self,
        cluster: Cluster,
        recorder: Recorder,
        namespace: str,
        image: Image,
        mode: Mode,
        clock: Callable[[], Now] = read_clock,
    ) -> None:
        self._cluster = cluster
        self._recorder = recorder
        self._namespace = namespace
        self._image = image
        self._mode = mode
        self._clock = clock
        self.concerned: frozenset[str] = frozenset()
        """Nodes with a NodeIsolation, or with our mark."""

    async def look(self) -> float | None:
        """One pass; when to look again. Raises ApiError; Conflict where somebody was faster."""
        now = self._clock()
        view = await self._view(now)
        made = plan(view, now)
        marked = {name for name, node in view.nodes.items() if node.marked}
        self.concerned = frozenset({each.spec.node_name for each in view.isolations.values()} | marked)
        await self._write_policy(view.policy, made)
        written = await self._write_statuses(view, made)
        await self._carry_out(view, made, written, now)
        for said in made.said:
            if said.node in written:
                event = Event(said.reason, said.message, warning=said.warning)
                await self._recorder.record(about_node(said.node), event, now)
        _count(made, view)
        return made.again_s if written >= made.statuses.keys() else 0.2

    # --- read ---------------------------------------------------------------------------------------------------------

    async def _view(self, now: Now) -> View:
        nodes = {n.name: n for n in map(see_node, await self._cluster.every("Node"))}
        jobs = await self._cluster.every("Job", self._namespace, labels=f"{preflight.LABEL}=true")
        isolations = [_readable(each) for each in await self._cluster.every(names.NODE_ISOLATION)]
        return View(
            policy=await self._policy(),
            nodes=nodes,
            isolations={each.name: each for each in isolations if each is not None},
            preflights=tuple(preflight.see(job) for job in jobs),
        )

    async def _policy(self) -> Policy:
        """The policy; where an administrator has made none, the one of the installation is made."""
        found = await self._cluster.get(names.ISOLATION_POLICY, "", names.POLICY)
        if found is None:
            body = _object(names.ISOLATION_POLICY, names.POLICY) | {"spec": {"mode": self._mode.value}}
            found = await self._cluster.create(body)
        try:
            return see_policy(found)
        except ValidationError as error:
            # An older definition accepted it; without limits that can be read nothing may be written to nodes.
            _log.error("the IsolationPolicy cannot be read, so nothing is isolated: %s", error)
            paused = PolicySpec(pause_requests=("the IsolationPolicy cannot be read",))
            return replace(see_policy({**found, "spec": {}}), spec=paused)

    # --- write --------------------------------------------------------------------------------------------------------

    async def _write_policy(self, policy: Policy, made: Plan) -> None:
        if made.policy != policy.status:
            body = _with_status(names.ISOLATION_POLICY, names.POLICY, policy.resource_version, made.policy)
            await self._cluster.apply(body, status=True, manager=MANAGER)

    async def _write_statuses(self, view: View, made: Plan) -> set[str]:
        """Names of the NodeIsolations whose status stands as planned."""
        written = set()
        for name, status in made.statuses.items():
            if await self._write_status(view.isolations[name], status):
                written.add(name)
        return written

    async def _write_status(self, isolation: Isolation, status: IsolationStatus) -> bool:
        if status == isolation.status:
            return True
        body = _with_status(names.NODE_ISOLATION, isolation.name, isolation.resource_version, status)
        try:
            await self._cluster.apply(body, status=True, manager=MANAGER)
        except ApiError as error:
            _log.info("NodeIsolation %s: %s; reading it again", isolation.name, error.message)
            return False
        return True

    async def _carry_out(self, view: View, made: Plan, written: set[str], now: Now) -> None:
        for node in made.unmark:
            await self._try(node, self._unmark(node))
        for node in made.mark:
            if node.name in written:
                await self._try(node, self._mark(node, view.isolations[node.name], now))
        for job in made.drop:
            await self._cluster.delete("Job", self._namespace, job.name, job.uid)
        for node, name in made.start:
            if node.name in written:
                await self._start(name, node, view.policy.spec)
        for gone in made.forget:
            await self._cluster.delete(names.NODE_ISOLATION, "", gone.name, gone.uid)

    async def _try(self, node: Node, act: Awaitable[None]) -> None:
        try:
            await act
        except Conflict as error:
            _log.info("node %s has changed: %s", node.name, error.message)
            raise
        except ApiError as error:
            metrics.NODE_WRITES_FAILED.inc()
            _log.error("node %s was not written to: %s", node.name, error)

    async def _mark(self, node: Node, isolation: Isolation, now: Now) -> None:
        newest = max(isolation.spec.evidence, key=lambda each: each.time, default=None)
        reason = newest.syndrome if newest else "Suspect"
        fresh = await self._patch(node, marks.taint(node, reason), status=False)
        await self._patch(fresh, marks.suspect(fresh, reason, isolation.spec.reason, now), status=True)
        _log.warning("node %s is isolated: %s", node.name, isolation.spec.reason)

    async def _unmark(self, node: Node) -> None:
        fresh = await self._patch(node, marks.untaint(node), status=False)
        await self._patch(fresh, marks.clear(fresh), status=True)
        _log.warning("node %s is given back", node.name)

    async def _patch(self, node: Node, operations: list[Manifest], *, status: bool) -> Node:
        if not operations:
            return node
        return see_node(await self._cluster.json_patch("Node", node.name, operations, status=status))

    async def _start(self, name: str, node: Node, policy: PolicySpec) -> None:
        try:
            await self._cluster.create(preflight.manifest(name, self._namespace, node, policy, self._image))
        except Conflict:
            return  # made by a pass before


def _readable(found: Manifest) -> Isolation | None:
    try:
        return see_isolation(found)
    except ValidationError as error:
        _log.error("NodeIsolation %s cannot be read: %s", found["metadata"]["name"], error)
        return None


def _object(kind: str, name: str) -> Manifest:
    return {"apiVersion": names.API_VERSION, "kind": kind, "metadata": {"name": name}}


def _with_status(kind: str, name: str, version: str, status: Model) -> Manifest:
    body = _object(kind, name)
    body["metadata"]["resourceVersion"] = version
    return body | {"status": status.model_dump(mode="json", by_alias=True, exclude_none=True)}


def _count(made: Plan, view: View) -> None:
    standing = Count(status.state for status in made.statuses.values())
    for state in State:
        metrics.NODES.labels(state.value).set(standing[state])
    metrics.BREAKER.set(made.policy.breaker.open)
    for said in made.said:
        metrics.TURNS.labels(said.reason).inc()
    for name, status in made.statuses.items():
        if (
            status.last_outcome is not None
            and status.last_outcome_time != view.isolations[name].status.last_outcome_time
        ):
            metrics.PREFLIGHTS.labels(status.last_outcome.value).inc()
