"""What one pass sees and decides, as plain records. Everything in the core takes and returns these."""

from __future__ import annotations

from dataclasses import dataclass, field
from datetime import datetime
from typing import TYPE_CHECKING, Any

from stormjib_operator import names

if TYPE_CHECKING:
    from collections.abc import Mapping

    from stormjib_operator.models import Accusations, Status
    from stormjib_operator.spec import Spec
    from stormjib_runtime.wire import Bounds, JobState

Manifest = dict[str, Any]


@dataclass(frozen=True)
class Now:
    """One moment of the operator's clock, given to the core: it reads no clock itself."""

    seconds: float
    text: str

    def since(self, text: str | None) -> float:
        """Seconds since an RFC 3339 time of the API; infinite where there is none."""
        return self.seconds - moment(text) if text else float("inf")


def moment(text: str) -> float:
    """Seconds since the epoch of an RFC 3339 time."""
    return datetime.fromisoformat(text).timestamp()


@dataclass(frozen=True)
class Problem:
    """Why a pod does not run: one word, and the words of the scheduler or kubelet."""

    reason: str
    message: str


@dataclass(frozen=True)
class Pod:
    """A pod of the job, as far as decisions need it."""

    name: str
    uid: str
    role: str
    slot: int = -1
    attempt: int = -1
    incarnation: int = -1
    node: str = ""
    ip: str = ""
    phase: str = "Pending"
    ready: bool = False
    started: bool = False
    """A container of it has run at some time."""
    deleting: bool = False
    created: float = 0.0
    problem: Problem | None = None
    avoids: tuple[str, ...] = ()
    """Nodes that it was kept off when it was made."""

    @property
    def over(self) -> bool:
        """It will never run again."""
        return self.phase in ("Succeeded", "Failed")

    @property
    def unschedulable(self) -> bool:
        return self.problem is not None and self.problem.reason in ("Unschedulable", "SchedulingGated")


FOREIGN = "foreign"
"""Stands for the digest of an object of our name that a deleted job of the same name still owns."""


@dataclass(frozen=True)
class ServiceSeen:
    """The coordinator's Service as it stands."""

    cluster_ip: str
    applied: str


@dataclass(frozen=True)
class Rendered:
    """The pods as rendered when the job started. A newer operator fills them in, and never renders them anew."""

    slot: Manifest
    coordinator: Manifest

    def data(self) -> Manifest:
        return {"slot": self.slot, "coordinator": self.coordinator}


@dataclass(frozen=True)
class Link:
    """What the stream from the coordinator last said. Lost: it missed its heartbeats although its pod was Ready."""

    pod_uid: str = ""
    state: JobState | None = None
    lost: bool = False
    silent_s: float = 0.0


@dataclass(frozen=True)
class Tokens:
    """What agents and the operator show to the coordinator. Never logged."""

    agent: str = field(repr=False)
    operator: str = field(repr=False)


@dataclass(frozen=True)
class Refusal:
    """A create that the API server refused, in its words, and when to ask again."""

    code: int
    message: str
    retry_at: float
    delay: float


@dataclass(frozen=True)
class Job:
    """The TrainingJob itself."""

    namespace: str
    name: str
    uid: str
    generation: int
    resource_version: str
    deleting: bool
    spec: Spec
    status: Status


@dataclass(frozen=True)
class Render:
    """What the operator's own settings put into pods."""

    image: str
    pull_policy: str = "IfNotPresent"
    pull_secrets: tuple[str, ...] = ()
    run_as_user: int | None = None
    operator_namespace: str = "stormjib"
    monitoring_labels: Mapping[str, str] | None = None


@dataclass(frozen=True)
class Observed:
    """All that one pass knows."""

    job: Job
    render: Render
    tokens: Tokens
    pods: tuple[Pod, ...] = ()
    foreign: tuple[Pod, ...] = ()
    """Pods of a deleted job of the same name: their names are taken."""
    service: ServiceSeen | None = None
    policy_applied: str | None = None
    rendered: Rendered | None = None
    link: Link = Link()
    refusals: Mapping[str, Refusal] = field(default_factory=dict)
    past: tuple[Pod, ...] = ()
    """Pods of the job that this operator has seen and that are gone: an accusation may come after its pod has left."""
    answered: frozenset[str] = frozenset()
    """Nodes that the job keeps away from although what it said against them is answered."""
    accusations: Accusations | None = None
    """What this pass has made of the coordinator's accusations; None where it could not write it down."""

    @property
    def state(self) -> JobState | None:
        return self.link.state

    def slot_pods(self) -> tuple[Pod, ...]:
        return tuple(pod for pod in self.pods if pod.role == names.Role.SLOT)

    def coordinators(self) -> tuple[Pod, ...]:
        return tuple(pod for pod in self.pods if pod.role == names.Role.COORDINATOR)


@dataclass(frozen=True)
class Event:
    """A fact for people, on the TrainingJob."""

    reason: str
    message: str
    warning: bool = False
    once: bool = False
    """Said in every state of a coordinator: a repetition is no news."""


@dataclass(frozen=True)
class Target:
    """The coordinator to listen to, and from which generation on its history is wanted."""

    pod_uid: str
    job_uid: str
    address: str
    ready: bool
    above: str | None


@dataclass(frozen=True)
class Decision:
    """What shall be. Carried out in this order: status, deletes, applies, creates, bounds, events."""

    status: Status
    delete: tuple[Pod, ...] = ()
    apply: tuple[Manifest, ...] = ()
    create: tuple[tuple[Manifest, ...], ...] = ()
    """In waves, one after the other, because the scheduler places pods in the order in which they come."""
    bounds: Bounds | None = None
    """The version is filled in by the shell, which knows what the coordinator holds."""
    target: Target | None = None
    events: tuple[Event, ...] = ()
    again_s: float | None = None
    """Look again after so many seconds, whatever happens."""
