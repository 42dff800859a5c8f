"""The recorder of events: one object per distinct fact about an object, counted up when it comes again.

The name of an Event is made from what it says, so that a restarted operator that says the same again makes no second
one. Events are for people; one that cannot be written is logged and forgotten.
"""

from __future__ import annotations

import hashlib
import logging
from collections import OrderedDict
from dataclasses import dataclass
from typing import TYPE_CHECKING

from stormjib_operator import names
from stormjib_operator.errors import ApiError, Conflict

if TYPE_CHECKING:
    from stormjib_operator.cluster import Cluster
    from stormjib_operator.observed import Event, Job, Manifest, Now

NODE_NAMESPACE = "default"
"""Where events about objects without a namespace are kept."""

KEPT = 4096
"""Facts that are remembered; with more, the oldest may be said again."""
REPEAT_S = 60.0
"""A fact that keeps coming is counted up no more often than this."""

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class About:
    """What an event is about."""

    api_version: str
    kind: str
    namespace: str
    name: str
    uid: str


def about_job(job: Job) -> About:
    """Events of a TrainingJob."""
    return About(names.API_VERSION, names.KIND, job.namespace, job.name, job.uid)


def about_node(name: str) -> About:
    """Events of a node. Their uid is the node's name, as the kubelet has it, or `kubectl describe` would not show them."""
    return About("v1", "Node", NODE_NAMESPACE, name, name)


class Recorder:
    """Writes events."""

    def __init__(self, cluster: Cluster, component: str = names.FIELD_MANAGER) -> None:
        self._cluster = cluster
        self._component = component
        self._said: OrderedDict[str, tuple[float, int]] = OrderedDict()

    async def record(self, about: About, event: Event, now: Now) -> None:
        """Write one event, or count it up."""
        name = _name(about, event)
        said_at, count = self._said.get(name, (float("-inf"), 0))
        if now.seconds - said_at < REPEAT_S or (count and event.once):
            return
        self._remember(name, now.seconds, count + 1)
        try:
            if count:
                change = {"count": count + 1, "lastTimestamp": now.text}
                await self._cluster.merge("Event", about.namespace, name, change)
            else:
                await self._cluster.create(self._manifest(about, event, name, now))
        except Conflict:
            return  # an operator before us said it
        except ApiError as error:
            _log.warning("event %s of %s/%s: %s", event.reason, about.namespace, about.name, error)

    def _manifest(self, about: About, event: Event, name: str, now: Now) -> Manifest:
        involved = {"apiVersion": about.api_version, "kind": about.kind, "name": about.name, "uid": about.uid}
        if about.kind != "Node":
            involved["namespace"] = about.namespace
        return {
            "apiVersion": "v1",
            "kind": "Event",
            "metadata": {"name": name, "namespace": about.namespace},
            "involvedObject": involved,
            "type": "Warning" if event.warning else "Normal",
            "reason": event.reason[:128],
            "message": event.message[:1024],
            "source": {"component": self._component},
            "reportingComponent": self._component,
            "reportingInstance": self._component,
            "firstTimestamp": now.text,
            "lastTimestamp": now.text,
            "count": 1,
        }

    def _remember(self, name: str, at: float, count: int) -> None:
        self._said[name] = (at, count)
        self._said.move_to_end(name)
        while len(self._said) > KEPT:
            self._said.popitem(last=False)


def _name(about: About, event: Event) -> str:
    said = hashlib.sha256(f"{about.uid}/{event.reason}/{event.message}".encode()).hexdigest()[:16]
    return f"{about.name}.{said}"
