"""One pass over one job: read, decide, write the status once, carry out, tell.

The status is written first, because it holds the numbers that name what is made next. A pass that is broken off at any
point leaves nothing that the next one would not find: everything is read anew from the API and the coordinator.
"""

from __future__ import annotations

import asyncio
import logging
from dataclasses import replace
from datetime import UTC, datetime
from typing import TYPE_CHECKING

from pydantic import ValidationError

from stormjib_operator import names, see, tokens
from stormjib_operator.decide import decide
from stormjib_operator.errors import ApiError, Conflict, CoordinatorError, Refused
from stormjib_operator.events import about_job
from stormjib_operator.incarnation import current
from stormjib_operator.isolation.resolve import resolve
from stormjib_operator.metrics import ACCUSATIONS, PASS_SECONDS, PASSES
from stormjib_operator.observed import Link, Now, Observed, Refusal, Rendered
from stormjib_operator.queue import Retry

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Iterable

    from stormjib_operator.cluster import Cluster
    from stormjib_operator.coordinator_client import Streams
    from stormjib_operator.events import Recorder
    from stormjib_operator.isolation.reporter import Reporter
    from stormjib_operator.models import Status
    from stormjib_operator.observed import Decision, Event, Job, Manifest, Pod, Render
    from stormjib_operator.queue import Key
    from stormjib_runtime.wire import Bounds

RESYNC_S = 300.0
"""Every job is looked at this often even if nothing happens: a watch may have missed something."""
REFUSED_FIRST_S, REFUSED_LONGEST_S = 0.5, 60.0
PAST = 64
"""Pods that are remembered of each job after they have gone, or as many as it has slots."""
TERM = 1 << 32
"""Bounds versions of one holder of the Lease stay below this many; a later holder's are all above an earlier one's."""

_log = logging.getLogger(__name__)


def read_clock() -> Now:
    """The present moment."""
    now = datetime.now(UTC)
    return Now(now.timestamp(), now.strftime("%Y-%m-%dT%H:%M:%SZ"))


class Reconciler:
    """Looks at jobs. Holds nothing that a restart would miss: refusals and pushed bounds are found out again, and an
    accusation against a pod that no operator remembers any more is refused."""

    def __init__(
        self,
        cluster: Cluster,
        streams: Streams,
        recorder: Recorder,
        render: Render,
        key: bytes,
        term: Callable[[], int],
        clock: Callable[[], Now] = read_clock,
        reporter: Reporter | None = None,
    ) -> None:
        self._cluster = cluster
        self._streams = streams
        self._recorder = recorder
        self._render = render
        self._key = key
        self._term = term
        self._clock = clock
        self._refusals: dict[Key, dict[str, Refusal]] = {}
        self._pushed: dict[Key, tuple[str, Bounds]] = {}
        self._reporter = reporter
        self._past: dict[Key, dict[str, Pod]] = {}
        self._least: dict[Key, int] = {}

    async def look(self, key: Key) -> float | None:
        """One pass. Returns when to look again; raises Retry where something failed that may pass."""
        with PASS_SECONDS.time():
            try:
                return await self._pass(key)
            except Conflict as error:
                _log.info("%s: %s; reading it again", key, error.message)
            except ApiError as error:
                _log.warning("%s: %s", key, error)
            except Exception:  # noqa: BLE001 - the top of a worker: one job that breaks a pass must not stop the others
                _log.exception("%s: a pass broke; this is a defect", key)
            PASSES.labels("failed").inc()
            raise Retry

    async def _pass(self, key: Key) -> float | None:
        manifest = await self._cluster.get(names.KIND, key.namespace, key.name)
        job = self._readable(key, manifest)
        if job is None:
            self._forget(key)
            return None
        seen = await self._observe(key, job)
        now = self._clock()
        seen, said = await self._accuse(key, seen, now)
        decision = decide(seen, now)
        self._streams.aim(key, decision.target, seen.tokens.operator)
        if decision.status != job.status:
            await self._write_status(job, decision.status)
        await self._carry_out(key, seen, decision, now)
        for event in (*decision.events, *said):
            await self._recorder.record(about_job(job), event, now)
        PASSES.labels("done").inc()
        again = RESYNC_S if decision.again_s is None else min(decision.again_s, RESYNC_S)
        fresh = any(refusal.retry_at > now.seconds for refusal in self._refusals.get(key, {}).values())
        return 0.0 if fresh and not seen.refusals else again

    def _readable(self, key: Key, manifest: Manifest | None) -> Job | None:
        if manifest is None:
            return None
        try:
            return see.see_job(manifest)
        except ValidationError as error:
            _log.error("%s cannot be read, it was accepted by an older definition: %s", key, error)
            return None

    def _forget(self, key: Key) -> None:
        self._streams.aim(key, None)
        self._refusals.pop(key, None)
        self._pushed.pop(key, None)
        self._past.pop(key, None)
        self._least.pop(key, None)

    # --- accusations --------------------------------------------------------------------------------------------------

    async def _accuse(self, key: Key, seen: Observed, now: Now) -> tuple[Observed, tuple[Event, ...]]:
        """Evidence is written before the job's status says that it was looked at: a pass that breaks off in between does
        it again, and nothing changes. Where it cannot be written, training goes on, and a later pass tries again."""
        self._least[key] = _least(seen.job)
        try:
            if self._reporter is not None and seen.job.status.isolation.nodes:
                seen = replace(seen, answered=await self._reporter.answered(seen.job))
            resolved = resolve(seen, now)
            for report in resolved.reports:
                taken = self._reporter is None or await self._reporter.report(report, self._needed())
                ACCUSATIONS.labels("Taken" if taken else "NotWritten").inc()
        except ApiError as error:
            _log.warning("%s: accusations wait: %s", key, error)
            return seen, ()
        for reason, count in resolved.refused.items():
            ACCUSATIONS.labels(reason).inc(count)
        return replace(seen, accusations=resolved.accusations), resolved.events

    def _needed(self) -> int:
        return sum(self._least.values())

    # --- read ---------------------------------------------------------------------------------------------------------

    async def _observe(self, key: Key, job: Job) -> Observed:
        """Everything the decision needs, read side by side."""
        pods, service, policy, rendered = await asyncio.gather(
            self._cluster.pods(job.namespace, job.name),
            self._cluster.get("Service", job.namespace, names.service(job.name)),
            self._cluster.get("NetworkPolicy", job.namespace, names.network_policy(job.name)),
            self._rendered(job),
        )
        seen = Observed(
            job=job,
            render=self._render,
            tokens=tokens.derive(self._key, job.uid),
            pods=tuple(see.see_pod(pod) for pod in pods if see.owned(pod, job.uid)),
            foreign=tuple(see.see_pod(pod) for pod in pods if not see.owned(pod, job.uid)),
            service=see.see_service(service, job.uid) if service else None,
            policy_applied=see.see_applied(policy, job.uid) if policy else None,
            rendered=rendered,
            refusals=dict(self._refusals.get(key, {})),
        )
        seen = replace(seen, past=self._remember(key, seen))
        pod, link = current(seen), self._streams.link(key)
        return (
            replace(seen, link=link)
            if pod is not None and pod.uid == link.pod_uid
            else replace(seen, link=Link())
        )

    def _remember(self, key: Key, seen: Observed) -> tuple[Pod, ...]:
        """Pods of this job that were there once, the newest last."""
        known = self._past.setdefault(key, {})
        for pod in seen.slot_pods():
            if pod.node and pod.started:
                known.pop(pod.uid, None)
                known[pod.uid] = pod
        while len(known) > max(PAST, seen.job.spec.nodes.slots):
            known.pop(next(iter(known)))
        live = {pod.uid for pod in seen.pods}
        return tuple(pod for uid, pod in known.items() if uid not in live)

    async def _rendered(self, job: Job) -> Rendered | None:
        if not job.status.template:
            return None
        kept = await self._cluster.get("ControllerRevision", job.namespace, job.status.template)
        return Rendered(**kept["data"]) if kept is not None and see.owned(kept, job.uid) else None

    # --- write --------------------------------------------------------------------------------------------------------

    async def _write_status(self, job: Job, status: Status) -> None:
        """The one status write; refused where the job has changed since it was read, so that no number is given twice."""
        meta = {"name": job.name, "namespace": job.namespace, "resourceVersion": job.resource_version}
        body = status.model_dump(mode="json", by_alias=True, exclude_none=True)
        manifest = {"apiVersion": names.API_VERSION, "kind": names.KIND, "metadata": meta, "status": body}
        await self._cluster.apply(manifest, status=True)

    async def _carry_out(self, key: Key, seen: Observed, decision: Decision, now: Now) -> None:
        namespace = seen.job.namespace
        # Bounds go before pods are deleted: the coordinator shall know first who may register instead.
        await self._push(key, seen, decision)
        await self._all(self._cluster.delete_pod(namespace, pod.name, pod.uid) for pod in decision.delete)
        await self._all(self._attempt(key, each, self._cluster.apply, now) for each in decision.apply)
        for wave in decision.create:
            await self._all(self._attempt(key, each, self._create, now) for each in wave)

    async def _all(self, calls: Iterable[Awaitable[None]]) -> None:
        await asyncio.gather(*calls)

    async def _create(self, manifest: Manifest) -> Manifest:
        try:
            return await self._cluster.create(manifest)
        except Conflict:
            return manifest  # made by a pass before; the next one reads it

    async def _attempt(
        self, key: Key, manifest: Manifest, act: Callable[[Manifest], Awaitable[Manifest]], now: Now
    ) -> None:
        """Make one child. A refusal is no failure of the pass: it is remembered, and the status says it."""
        name = see.name_of(manifest)
        refusals = self._refusals.setdefault(key, {})
        try:
            await act(manifest)
        except Refused as error:
            old = refusals.get(name)
            delay = min(REFUSED_LONGEST_S, old.delay * 2 if old else REFUSED_FIRST_S)
            refusals[name] = Refusal(error.code, error.message, now.seconds + delay, delay)
            _log.warning("%s: %s was refused: %s", key, name, error.message)
        else:
            refusals.pop(name, None)

    async def _push(self, key: Key, seen: Observed, decision: Decision) -> None:
        """Give the coordinator the bounds, unless it holds just these."""
        state, wanted = seen.state, decision.bounds
        if state is None or wanted is None or decision.target is None:
            return
        uid = decision.target.pod_uid
        if uid != seen.link.pod_uid or self._holds(key, uid, wanted, state.bounds_version):
            return
        version = max(self._term() * TERM, state.bounds_version) + 1
        if version > (self._term() + 1) * TERM:
            _log.error("%s: its coordinator holds bounds of a later operator; leaving it alone", key)
            return
        bounds = replace(wanted, version=version)
        try:
            await self._streams.push(key, bounds)
            self._pushed[key] = (uid, bounds)
        except CoordinatorError as error:
            _log.warning("%s: bounds were not taken: %s", key, error)

    def _holds(self, key: Key, uid: str, wanted: Bounds, version: int) -> bool:
        pushed_to, pushed = self._pushed.get(key, ("", None))
        return (
            pushed is not None
            and pushed_to == uid
            and pushed.version == version
            and replace(pushed, version=wanted.version) == wanted
        )


def _least(job: Job) -> int:
    """Nodes that the job needs, where it trains."""
    status = job.status
    idle = any(status.holds(kind) for kind in (names.Type.COMPLETE, names.Type.FAILED, names.Type.SUSPENDED))
    return 0 if idle or status.generation is None else job.spec.nodes.least
