"""The Lease: one operator, and one isolator, acts at a time. Timings as everywhere in Kubernetes (15 s, 10 s, 2 s).

Own instead of the client's election, because ours releases the Lease when it is told to stop (the next operator takes
over at once, not after 15 s) and counts the terms: a term is part of every bounds version, so that a coordinator
refuses an operator that does not know yet that it lost the Lease. No clock of another host is compared: what counts is
how long a record has stayed unchanged on our own clock.
"""

from __future__ import annotations

import asyncio
import logging
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import TYPE_CHECKING

from stormjib_operator.errors import ApiError, Conflict

if TYPE_CHECKING:
    from stormjib_operator.cluster import Cluster
    from stormjib_operator.observed import Manifest

DURATION_S = 15
RENEW_S = 10.0
RETRY_S = 2.0
OPERATOR, ISOLATOR = "stormjib-operator", "stormjib-isolator"
"""Names of the two Leases."""

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Record:
    """What a Lease says."""

    holder: str
    renewed: str
    transitions: int
    duration_s: float


class Elector:
    """Takes, keeps and releases the Lease."""

    def __init__(self, cluster: Cluster, namespace: str, identity: str, name: str) -> None:
        self._cluster = cluster
        self._namespace = namespace
        self._identity = identity
        self._name = name
        self._seen: Record | None = None
        self._seen_at = 0.0
        self._written: Manifest | None = None
        """The Lease as we wrote it last: renewed without being read, as its resourceVersion tells whether it still is so."""
        self.term = 0
        """How often the Lease has changed hands, since we hold it."""

    async def acquire(self) -> None:
        """Return when we hold the Lease."""
        while not await self._try():
            await asyncio.sleep(RETRY_S)
        _log.info("holding the Lease as %s, term %d", self._identity, self.term)

    async def keep(self) -> None:
        """Renew the Lease; return when we could not for so long that another may hold it."""
        loop = asyncio.get_running_loop()
        renewed = loop.time()
        while loop.time() - renewed < RENEW_S:
            await asyncio.sleep(RETRY_S)
            begun = loop.time()
            if await self._try():
                renewed = begun
            elif self._seen is not None and self._seen.holder not in ("", self._identity):
                _log.error("the Lease was taken by %s", self._seen.holder)
                return
        _log.error("the Lease could not be renewed for %.0f s", RENEW_S)

    async def release(self) -> None:
        """Give the Lease back, so that the next operator need not wait for it to expire."""
        try:
            found = await self._cluster.get("Lease", self._namespace, self._name)
            if found is not None and _record(found).holder == self._identity:
                found["spec"] |= {"holderIdentity": "", "leaseDurationSeconds": 1, "renewTime": _micro_time()}
                await self._cluster.replace(found)
        except ApiError as error:
            _log.warning("the Lease could not be released and will expire: %s", error)

    async def _try(self) -> bool:
        try:
            return await self._renew() or await self._take()
        except ApiError as error:
            _log.warning("the Lease: %s", error)
            return False

    async def _renew(self) -> bool:
        if self._written is None:
            return False
        mine, self._written = self._written, None
        try:
            self._written = await self._cluster.replace(self._lease(mine))
        except Conflict:
            return False  # somebody wrote it: read what
        return True

    async def _take(self) -> bool:
        found = await self._cluster.get("Lease", self._namespace, self._name)
        if found is None:
            self._written = await self._cluster.create(self._lease(None))
            self.term = 1
            return True
        if not self._free(_record(found)):
            return False
        self._written = await self._cluster.replace(self._lease(found))
        self.term = _record(self._written).transitions
        return True

    def _free(self, record: Record) -> bool:
        now = asyncio.get_running_loop().time()
        if record != self._seen:
            self._seen, self._seen_at = record, now
        ours = record.holder in ("", self._identity)
        return ours or now - self._seen_at >= record.duration_s

    def _lease(self, old: Manifest | None) -> Manifest:
        record = _record(old) if old else None
        now = _micro_time()
        mine = record is not None and record.holder == self._identity
        spec = {
            "holderIdentity": self._identity,
            "leaseDurationSeconds": DURATION_S,
            "renewTime": now,
            "acquireTime": old["spec"].get("acquireTime", now) if old and mine else now,
            "leaseTransitions": (record.transitions if record else 0) + (0 if mine else 1),
        }
        if old is not None:
            return {**old, "spec": spec}
        meta = {"name": self._name, "namespace": self._namespace}
        return {"apiVersion": "coordination.k8s.io/v1", "kind": "Lease", "metadata": meta, "spec": spec}


def _record(lease: Manifest) -> Record:
    spec = lease.get("spec", {})
    return Record(
        holder=spec.get("holderIdentity") or "",
        renewed=spec.get("renewTime") or "",
        transitions=spec.get("leaseTransitions") or 0,
        duration_s=float(spec.get("leaseDurationSeconds") or DURATION_S),
    )


def _micro_time() -> str:
    return datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%S.%fZ")
