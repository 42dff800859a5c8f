"""Objects of the API as records: the only functions that know the key names of pods, Services and jobs."""

from __future__ import annotations

from stormjib_operator import names
from stormjib_operator.models import Status
from stormjib_operator.observed import FOREIGN, Job, Manifest, Pod, Problem, ServiceSeen, moment
from stormjib_operator.spec import Spec


def owned(manifest: Manifest, uid: str) -> bool:
    """Whether the job of that uid owns the object."""
    return any(owner.get("uid") == uid for owner in manifest["metadata"].get("ownerReferences", ()))


def see_job(manifest: Manifest) -> Job:
    """The TrainingJob of an object of the API. Raises pydantic's ValidationError where it does not fit the models."""
    meta = manifest["metadata"]
    return Job(
        namespace=meta["namespace"],
        name=meta["name"],
        uid=meta["uid"],
        generation=meta.get("generation", 0),
        resource_version=meta["resourceVersion"],
        deleting="deletionTimestamp" in meta,
        spec=Spec.model_validate(manifest["spec"]),
        status=Status.model_validate(manifest.get("status", {})),
    )


def see_pod(manifest: Manifest) -> Pod:
    """The record of a pod."""
    meta, status = manifest["metadata"], manifest.get("status", {})
    labels = meta.get("labels", {})
    return Pod(
        name=meta["name"],
        uid=meta["uid"],
        role=labels.get(names.ROLE, ""),
        slot=_number(labels.get(names.SLOT)),
        attempt=_number(labels.get(names.ATTEMPT)),
        incarnation=_number(labels.get(names.INCARNATION)),
        node=manifest["spec"].get("nodeName", ""),
        ip=status.get("podIP", ""),
        phase=status.get("phase", "Pending"),
        ready=_condition(status, "Ready").get("status") == "True",
        started=any(_has_run(each) for each in status.get("containerStatuses", ())),
        deleting="deletionTimestamp" in meta,
        created=moment(meta["creationTimestamp"]) if "creationTimestamp" in meta else 0.0,
        problem=_problem(status),
        avoids=tuple(filter(None, meta.get("annotations", {}).get(names.AVOIDS, "").split(","))),
    )


def _number(text: str | None) -> int:
    return int(text) if text is not None and text.isdecimal() else -1


def _condition(status: Manifest, kind: str) -> Manifest:
    return next((each for each in status.get("conditions", ()) if each["type"] == kind), {})


def _has_run(container: Manifest) -> bool:
    state, last = container.get("state", {}), container.get("lastState", {})
    return "running" in state or "startedAt" in state.get("terminated", {}) or "terminated" in last


def _problem(status: Manifest) -> Problem | None:
    scheduled = _condition(status, "PodScheduled")
    if scheduled.get("status") == "False":
        return Problem(scheduled.get("reason", "Unschedulable"), scheduled.get("message", ""))
    for container in (*status.get("initContainerStatuses", ()), *status.get("containerStatuses", ())):
        problem = _container_problem(container)
        if problem is not None:
            return problem
    if status.get("phase") == "Failed":
        return Problem(status.get("reason", "PodFailed"), status.get("message", "the pod failed"))
    return None


_HARMLESS = ("PodInitializing", "ContainerCreating")


def _container_problem(container: Manifest) -> Problem | None:
    waiting = container.get("state", {}).get("waiting")
    if waiting is None or waiting.get("reason") in _HARMLESS:
        return None
    ended = container.get("lastState", {}).get("terminated", {})
    last = f"; it last ended with exit code {ended['exitCode']}" if "exitCode" in ended else ""
    text = waiting.get("message") or "the container cannot start"
    return Problem(waiting.get("reason", "Waiting"), f"container {container['name']}: {text}{last}")


def see_service(manifest: Manifest, uid: str) -> ServiceSeen:
    """The record of the Service that the job of that uid owns, or should own."""
    ours = owned(manifest, uid)
    return ServiceSeen(manifest["spec"].get("clusterIP", "") if ours else "", see_applied(manifest, uid))


def see_applied(manifest: Manifest, uid: str) -> str:
    """The digest of an object as we applied it."""
    if not owned(manifest, uid):
        return FOREIGN
    return str(manifest["metadata"].get("annotations", {}).get(names.APPLIED, ""))


def name_of(manifest: Manifest) -> str:
    """What a refusal is remembered under."""
    return f"{manifest['kind']} {manifest['metadata']['name']}"
