"""The operator's hand in isolation: evidence is written into NodeIsolations, and it is seen when a namespace leaves a node.

The operator may create and apply NodeIsolations, and has no right to nodes. Each namespace's evidence has a field manager of
its own, so that server-side apply merges what several of them say.
"""

from __future__ import annotations

import asyncio
import logging
from typing import TYPE_CHECKING

from pydantic import ValidationError

from stormjib_operator import names
from stormjib_operator.errors import ApiError, Refused
from stormjib_operator.isolation.models import MARKED, Evidence, State
from stormjib_operator.isolation.seen import see_isolation

if TYPE_CHECKING:
    from stormjib_operator.cluster import Cluster
    from stormjib_operator.isolation.resolve import Report
    from stormjib_operator.isolation.seen import Isolation
    from stormjib_operator.observed import Job, Manifest

EVERY_S = 1.0
"""While somebody has yet to leave a node, or a preflight runs there."""
IDLE_S = 30.0
WATCHED = (State.PROPOSED, *(state for state in MARKED if state is not State.NEEDS_REPAIR))

_log = logging.getLogger(__name__)


class Reporter:
    """Writes NodeIsolations."""

    def __init__(self, cluster: Cluster) -> None:
        self._cluster = cluster
        self._news = asyncio.Event()

    async def report(self, report: Report, least_nodes: int) -> bool:
        """Write one accusation down; False where the API server refuses it for good. Raises ApiError where it may
        work later."""
        found = await self._isolation(report.node)
        evidence = merged(found, report.evidence.model_copy(update={"least_nodes": least_nodes}))
        if evidence is None:
            return True
        try:
            await self._cluster.apply(manifest(report.node, evidence), manager=manager(evidence.namespace))
        except Refused as error:
            _log.warning("evidence against %s was refused: %s", report.node, error.message)
            return False
        self._news.set()
        return True

    async def answered(self, job: Job) -> frozenset[str]:
        """Nodes that the job keeps away from although its evidence is answered, or a human has deleted it."""
        over = set()
        for each in job.status.isolation.nodes:
            if not each.evidence:
                continue  # nobody was accused: only this job keeps away
            found = await self._isolation(each.node_name)
            if found is None or each.evidence in found.status.answered:
                over.add(each.node_name)
        return frozenset(over)

    async def run(self) -> None:
        """See for ever who leaves the nodes that are accused."""
        while True:
            self._news.clear()
            try:
                pending = await self._look()
            except ApiError as error:
                _log.warning("who is on accused nodes: %s", error)
                pending = True
            try:
                async with asyncio.timeout(EVERY_S if pending else IDLE_S):
                    await self._news.wait()
            except TimeoutError:
                continue

    async def _look(self) -> bool:
        """Write down who has left or come back; whether that may soon change."""
        watched = [each for each in await self._isolations() if each.status.state in WATCHED]
        for isolation in watched:
            for evidence in isolation.spec.evidence:
                await self._see(isolation, evidence)
        return bool(watched)

    async def _see(self, isolation: Isolation, evidence: Evidence) -> None:
        node = isolation.spec.node_name
        pods = await self._cluster.every("Pod", evidence.namespace, fields=f"spec.nodeName={node}")
        left = all(pod.get("status", {}).get("phase") in ("Succeeded", "Failed") for pod in pods)
        if left == evidence.left:
            return
        change = {"left": left, "departures": evidence.departures + left}
        changed = manifest(node, evidence.model_copy(update=change))
        # Not created anew where a human has just deleted it.
        changed["metadata"]["uid"] = isolation.uid
        await self._cluster.apply(changed, manager=manager(evidence.namespace))

    async def _isolations(self) -> list[Isolation]:
        found = [_readable(each) for each in await self._cluster.every(names.NODE_ISOLATION)]
        return [each for each in found if each is not None]

    async def _isolation(self, node: str) -> Isolation | None:
        found = await self._cluster.get(names.NODE_ISOLATION, "", node)
        return _readable(found) if found is not None else None


def merged(found: Isolation | None, fresh: Evidence) -> Evidence | None:
    """The namespace's entry with the new accusation in it; None where it is there already. What the namespace has said
    before and nobody has answered keeps its weight: all its jobs speak with one voice."""
    old = next((e for e in found.spec.evidence if e.namespace == fresh.namespace), None) if found else None
    if found is None or old is None:
        return fresh
    if old.id == fresh.id:
        return None
    fresh = fresh.model_copy(update={"departures": old.departures})
    if old.id in found.status.answered:
        return fresh
    weight = max(old.weight_percent, fresh.weight_percent)
    return fresh.model_copy(update={"weight_percent": weight, "confirmed": old.confirmed or fresh.confirmed})


def manager(namespace: str) -> str:
    """The field manager of a namespace's evidence."""
    return f"{names.FIELD_MANAGER}/{namespace}"


def manifest(node: str, evidence: Evidence) -> Manifest:
    """The NodeIsolation as one namespace's evidence has it."""
    said = evidence.model_dump(mode="json", by_alias=True)
    reason = f"{evidence.namespace}/{evidence.job}: {evidence.syndrome}: {evidence.sentence}"
    return {
        "apiVersion": names.API_VERSION,
        "kind": names.NODE_ISOLATION,
        "metadata": {"name": node},
        "spec": {"nodeName": node, "reason": reason[:1024], "evidence": [said]},
    }


def _readable(found: Manifest) -> Isolation | None:
    try:
        return see_isolation(found)
    except ValidationError as error:
        _log.error("NodeIsolation %s cannot be read: %s", found["metadata"]["name"], error)
        return None
