"""Builders for what the operator observes: each test says only what it is about."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

from stormjib_operator import children, names, see
from stormjib_operator.decide import decide
from stormjib_operator.observed import (
    Decision,
    Job,
    Link,
    Now,
    Observed,
    Pod,
    Render,
    Rendered,
    ServiceSeen,
    Tokens,
)
from stormjib_runtime.wire import (
    PROTOCOL,
    AgentPhase,
    AgentView,
    Cause,
    Fault,
    Generation,
    GenerationId,
    HistoryEntry,
    JobPhase,
    JobState,
    Member,
)

if TYPE_CHECKING:
    from stormjib_operator.models import Status

UID = "3f0c2a4e-0000-4000-8000-000000000001"
RENDER = Render(image="stormjib/operator:1", run_as_user=65532)
TOKENS = Tokens(agent="a" * 64, operator="o" * 64)
IP = "10.96.0.7"


def now(seconds: float = 0.0) -> Now:
    """So many seconds after the tests' noon."""
    minute, second = divmod(int(seconds), 60)
    return Now(1_800_000_000.0 + seconds, f"2027-01-15T08:{minute:02d}:{second:02d}Z")


def manifest(**spec: Any) -> dict[str, Any]:
    """A TrainingJob as it comes from the API: two nodes and one spare."""
    trainer = {"name": "trainer", "image": "my/image:1", "resources": {"limits": {"memory": "1Gi"}}}
    base = {
        "template": {"spec": {"containers": [trainer]}},
        "launcher": {"command": ["-m", "my.train"], "processesPerNode": 2},
        "nodes": {"replicas": 2, "minReplicas": 1, "spares": 1},
        "checkpoint": {"storage": {"persistentVolumeClaim": {"claimName": "disk"}}},
    }
    meta = {"name": "j", "namespace": "ns", "uid": UID, "generation": 1, "resourceVersion": "5"}
    return {
        "apiVersion": names.API_VERSION,
        "kind": names.KIND,
        "metadata": meta,
        "spec": base | {key: value for key, value in spec.items() if value is not None},
    }


def job(**spec: Any) -> Job:
    """The same as a record."""
    return see.see_job(manifest(**spec))


def seen(**spec: Any) -> Observed:
    """A job that nobody has looked at yet."""
    return Observed(job=job(**spec), render=RENDER, tokens=TOKENS)


def with_status(before: Observed, **change: Any) -> Observed:
    """The same, with another status."""
    status = before.job.status.model_copy(update=change)
    return replace(before, job=replace(before.job, status=status))


def with_spec(before: Observed, **spec: Any) -> Observed:
    """The same, after the user has changed the spec."""
    fresh = job(**spec)
    return replace(before, job=replace(fresh, status=before.job.status, generation=before.job.generation + 1))


def after(before: Observed, decision: Decision) -> Observed:
    """What a pass would see next if the API server carried the decision out at once."""
    doomed = {pod.uid for pod in decision.delete}
    made = [each for wave in decision.create for each in wave]
    fresh = [_created(each) for each in made if each["kind"] == "Pod"]
    kept = [each["data"] for each in made if each["kind"] == "ControllerRevision"]
    applied = {each["kind"]: children.applied(each) for each in decision.apply}
    service = ServiceSeen(IP, applied["Service"]) if "Service" in applied else before.service
    return replace(
        before,
        job=replace(before.job, status=decision.status),
        pods=(*(pod for pod in before.pods if pod.uid not in doomed), *fresh),
        rendered=Rendered(**kept[0]) if kept else before.rendered,
        service=service,
        policy_applied=applied.get("NetworkPolicy", before.policy_applied),
    )


def _created(manifest: dict[str, Any]) -> Pod:
    meta = manifest["metadata"] | {"uid": f"uid-{manifest['metadata']['name']}"}
    return see.see_pod(manifest | {"metadata": meta})


def started(at: float = 0.0, **spec: Any) -> Observed:
    """A job whose pods have been created and run, each on a node of its own; the coordinator is beside the spare."""
    current = seen(**spec)
    for _ in range(3):
        current = after(current, decide(current, now(at)))
    return replace(current, pods=tuple(placed(pod) for pod in current.pods))


def placed(pod: Pod) -> Pod:
    """The pod as it is when it runs."""
    number = 2 if pod.role == names.Role.COORDINATOR else pod.slot
    created = now().seconds
    return replace(
        pod,
        node=f"node-{number}",
        ip=f"10.1.0.{number}",
        phase="Running",
        ready=True,
        started=True,
        created=created,
    )


def running(**spec: Any) -> Observed:
    """A job that trains as generation 1.1 in slots 0 and 1."""
    current = heard(started(**spec))
    return after(current, decide(current, now(1)))


def heard(current: Observed, **change: Any) -> Observed:
    """With the coordinator's state: generation 1.1 trains in slots 0 and 1, slot 2 is idle."""
    return replace(current, link=Link(coordinator(current).uid, state(current, **change)))


def coordinator(current: Observed) -> Pod:
    """The coordinator's newest pod."""
    return max(current.coordinators(), key=lambda pod: pod.incarnation)


def slot_pod(current: Observed, slot: int) -> Pod:
    """The newest pod of a slot."""
    return max((p for p in current.slot_pods() if p.slot == slot), key=lambda pod: pod.attempt)


def change_pod(current: Observed, pod: Pod, **change: Any) -> Observed:
    """The same, with one pod changed."""
    fresh = tuple(replace(each, **change) if each.uid == pod.uid else each for each in current.pods)
    return replace(current, pods=fresh)


def without(current: Observed, pod: Pod) -> Observed:
    """The same, with one pod gone."""
    return replace(current, pods=tuple(each for each in current.pods if each.uid != pod.uid))


def generation(number: int = 1, slots: tuple[int, ...] = (0, 1), cause: Cause = Cause.START) -> Generation:
    """Generation 1.N."""
    picked = tuple(Member(slot, 1, f"uid-j-{slot}-{slot + 1}", f"10.1.0.{slot}", 2) for slot in slots)
    return Generation(GenerationId(1, number), None, picked, cause)


def entry(number: int, cause: Cause = Cause.RANK_EXIT, message: str = "exit 1", **more: Any) -> HistoryEntry:
    """A generation that began because of a fault in slot 1, rank 3."""
    fault = Fault(cause, slot=1, rank=3, message=message)
    return HistoryEntry(generation(number, cause=cause), None, counted=cause.counted, fault=fault, **more)


def state(current: Observed, **change: Any) -> JobState:
    """What the coordinator says of a healthy job."""
    training = change.pop("generation", generation())
    slots = {member.slot for member in training.members} if training else set()
    views = tuple(
        AgentView(
            slot=pod.slot,
            agent=1,
            pod_uid=pod.uid,
            phase=AgentPhase.RUNNING if pod.slot in slots else AgentPhase.IDLE,
            member=pod.slot in slots,
        )
        for pod in current.slot_pods()
    )
    base = JobState(
        protocol=PROTOCOL,
        job_uid=UID,
        incarnation=current.job.status.incarnation,
        version=7,
        phase=JobPhase.RUNNING,
        bounds_version=1,
        generation=training,
        agents=views,
        step=40,
        loss=2.5,
    )
    return replace(base, **change)


def reason(status: Status, kind: str) -> str:
    """`True/Running`: status and reason of a condition."""
    condition = status.condition(kind)
    return f"{condition.status}/{condition.reason}" if condition else "absent"


def made(decision: Decision) -> list[str]:
    """Names of what is created, in order."""
    return [each["metadata"]["name"] for wave in decision.create for each in wave]
