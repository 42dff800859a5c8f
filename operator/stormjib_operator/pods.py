"""Pods: rendered once when the job starts (`render`), filled in for a slot or an incarnation (`slot_pod`, …).

The template's words win, field by field, over our security defaults; command, restart policy and our
environment are ours, because the pod would not work without them. Filling in adds only names, labels, the slot's environment and where to run, so that a newer
operator makes the same pods from an older rendering.
"""

from __future__ import annotations

import copy
import json
from typing import TYPE_CHECKING, Any

from stormjib_operator import names, storage
from stormjib_operator.observed import Job, Manifest, Render, Rendered
from stormjib_runtime.wire import INTERVAL_AUTO, Env

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from stormjib_operator.spec import Spec

RUNTIME_DIR = "/opt/stormjib"
"""Where the init container puts agent, zygote and the checkpoint child; the same in any image."""
RUN_DIR = "/stormjib/run"
HOME = "/stormjib/home"
_POD_SECURITY: Manifest = {"runAsNonRoot": True, "seccompProfile": {"type": "RuntimeDefault"}}
_SECURITY: Manifest = {
    "allowPrivilegeEscalation": False,
    "readOnlyRootFilesystem": True,
    "capabilities": {"drop": ["ALL"]},
}
_TRAINER_SECURITY = "containers[trainer].securityContext"
_SMALL: Manifest = {"requests": {"cpu": "20m", "memory": "64Mi"}, "limits": {"memory": "256Mi"}}


def render(job: Job, settings: Render) -> tuple[Rendered, tuple[str, ...]]:
    """Both kinds of pods of a job as they will be made from now on, and which security defaults the template overrules."""
    spec, overruled = _slot_spec(job, settings)
    template = job.spec.template.get("metadata", {})
    meta = {key: dict(template[key]) for key in ("labels", "annotations") if key in template}
    slot = {"metadata": meta, "spec": spec}
    return Rendered(
        slot=slot, coordinator={"metadata": {}, "spec": _coordinator_spec(job, settings)}
    ), overruled


def slot_pod(
    job: Job, rendered: Rendered, slot: int, attempt: int, cluster_ip: str, avoid: tuple[str, ...] = ()
) -> Manifest:
    """The pod of one attempt at a slot, kept off the nodes to be avoided."""
    labels = names.labels(job.name, names.Role.SLOT, slot=slot, attempt=attempt)
    pod = _filled(job, rendered.slot, names.slot_pod(job.name, slot, attempt), labels)
    trainer = next(each for each in pod["spec"]["containers"] if each["name"] == names.TRAINER)
    trainer["env"] += _env({Env.SLOT: str(slot), Env.COORDINATOR: coordinator_url(cluster_ip)})
    if avoid:
        pod["metadata"].setdefault("annotations", {})[names.AVOIDS] = ",".join(avoid)
        _keep_off(pod["spec"], avoid)
    return pod


def coordinator_pod(
    job: Job, rendered: Rendered, incarnation: int, avoid_node: str, spare_slots: Iterable[int]
) -> Manifest:
    """The pod of one incarnation of the coordinator: on a node without a slot if there is one, then on a spare's."""
    labels = names.labels(job.name, names.Role.COORDINATOR, incarnation=incarnation)
    pod = _filled(job, rendered.coordinator, names.coordinator_pod(job.name, incarnation), labels)
    pod["spec"]["containers"][0]["env"] += _env({Env.INCARNATION: str(incarnation)})
    pod["spec"]["affinity"] = _coordinator_affinity(
        job.name, avoid_node, sorted(spare_slots)[: names.MAX_TERMS]
    )
    return pod


def coordinator_url(ip: str) -> str:
    """Where a coordinator listens; an address of IPv6 needs brackets."""
    host = f"[{ip}]" if ":" in ip else ip
    return f"http://{host}:{names.COORDINATOR_PORT}"


def owner(job: Job) -> list[Manifest]:
    """Owner references of a child: the garbage collector of Kubernetes removes it with the job."""
    reference = {"apiVersion": names.API_VERSION, "kind": names.KIND, "name": job.name, "uid": job.uid}
    return [reference | {"controller": True, "blockOwnerDeletion": True}]


def _filled(job: Job, template: Manifest, name: str, labels: dict[str, str]) -> Manifest:
    pod = copy.deepcopy(template)
    meta = pod["metadata"]
    meta["labels"] = meta.get("labels", {}) | labels
    meta |= {"name": name, "namespace": job.namespace, "ownerReferences": owner(job)}
    return {"apiVersion": "v1", "kind": "Pod", "metadata": meta, "spec": pod["spec"]}


# --- a slot ---------------------------------------------------------------------------------------------------------


def _slot_spec(job: Job, settings: Render) -> tuple[Manifest, tuple[str, ...]]:
    spec = copy.deepcopy(job.spec.template["spec"])
    trainer = next(each for each in spec["containers"] if each["name"] == names.TRAINER)
    spec["restartPolicy"] = "OnFailure"
    spec.setdefault("automountServiceAccountToken", False)
    spec.setdefault("enableServiceLinks", False)
    spec.setdefault("terminationGracePeriodSeconds", 30)
    overruled = [
        *_defaults(spec.setdefault("securityContext", {}), _POD_SECURITY, "securityContext"),
        *_defaults(
            trainer.setdefault("securityContext", {}), _container_security(trainer), _TRAINER_SECURITY
        ),
    ]
    if trainer["securityContext"].get("privileged"):
        overruled.append(f"{_TRAINER_SECURITY}.privileged: true")
    if spec["automountServiceAccountToken"]:
        overruled.append("automountServiceAccountToken: true")
    _pull_secrets(spec, spec, settings)
    spec["initContainers"] = [_install(spec, settings), *spec.get("initContainers", [])]
    _volumes(spec, trainer, job.spec)
    trainer["command"] = ["python3", "-m", "stormjib_runtime.agent"]
    trainer["env"] = _trainer_env(job, spec, trainer.get("env", []))
    _affinity(spec, job.name, apart=not _wants_devices(spec))
    return spec, tuple(overruled)


def _defaults(given: Manifest, defaults: Manifest, path: str) -> Iterator[str]:
    """Fill in the defaults that the template does not name, and say which ones it names otherwise."""
    for key, value in defaults.items():
        if given.setdefault(key, copy.deepcopy(value)) != value:
            yield f"{path}.{key}: {json.dumps(given[key])}"


def _container_security(trainer: Manifest) -> Manifest:
    """Our defaults; without the one that the API server does not take beside powers that the template asks for."""
    given = trainer.get("securityContext", {})
    powerful = given.get("privileged") or "SYS_ADMIN" in given.get("capabilities", {}).get("add", ())
    return _SECURITY | ({"allowPrivilegeEscalation": True} if powerful else {})


def _pull_secrets(spec: Manifest, template: Manifest, settings: Render) -> None:
    """Our image and the template's are both pulled in the job's namespace."""
    secrets = [*template.get("imagePullSecrets", []), *({"name": name} for name in settings.pull_secrets)]
    if secrets:
        spec["imagePullSecrets"] = secrets


def _install(spec: Manifest, settings: Render) -> Manifest:
    security = copy.deepcopy(_SECURITY)
    if settings.run_as_user is not None and "runAsUser" not in spec["securityContext"]:
        security["runAsUser"] = settings.run_as_user
    return {
        "name": "stormjib-install",
        "image": settings.image,
        "imagePullPolicy": settings.pull_policy,
        "command": ["python3", "-m", "stormjib_runtime.install", RUNTIME_DIR],
        "securityContext": security,
        "resources": copy.deepcopy(_SMALL),
        "volumeMounts": [{"name": "stormjib-runtime", "mountPath": RUNTIME_DIR}],
    }


def _volumes(spec: Manifest, trainer: Manifest, wanted: Spec) -> None:
    """Writable places for a read-only root file system; a path that the template mounts itself stays the template's."""
    volumes, mounts = spec.setdefault("volumes", []), trainer.setdefault("volumeMounts", [])
    # What lies there counts as the container's memory anyway, and ranks stage their checkpoints in it.
    limit = trainer.get("resources", {}).get("limits", {}).get("memory")
    nodes = 1 + (wanted.checkpoint.peers if wanted.checkpoint else 0)  # whose steps lie there
    room = limit or f"{nodes * wanted.launcher.processes_per_node}Gi"
    shared_memory = {"medium": "Memory", "sizeLimit": room}
    places: list[tuple[str, str, Manifest]] = [
        ("stormjib-runtime", RUNTIME_DIR, {"emptyDir": {}}),
        ("stormjib-run", RUN_DIR, {"emptyDir": {}}),
        ("stormjib-home", HOME, {"emptyDir": {}}),
        ("stormjib-tmp", "/tmp", {"emptyDir": {}}),
        ("stormjib-shm", "/dev/shm", {"emptyDir": shared_memory}),
    ]
    if wanted.checkpoint is not None:
        places += storage.volumes(wanted.checkpoint)
    taken = {mount["mountPath"].rstrip("/") for mount in mounts}
    for name, path, source in places:
        if path not in taken:
            volumes.append({"name": name} | source)
            read_only = {"readOnly": True} if "secret" in source else {}
            mounts.append({"name": name, "mountPath": path} | read_only)


def _trainer_env(job: Job, spec: Manifest, given: list[Manifest]) -> list[Manifest]:
    """The template's environment, defaults where it says nothing, then ours, which nothing may overrule."""
    named = {each["name"]: each for each in given}
    home = named.get("HOME", {}).get("value", HOME)
    path = named.pop("PYTHONPATH", {}).get("value", "")
    defaults = {
        "HOME": home,
        "USER": "trainer",
        "TORCHINDUCTOR_CACHE_DIR": f"{home}/.cache/torchinductor",
        "TRITON_CACHE_DIR": f"{home}/.cache/triton",
        "HF_HOME": f"{home}/.cache/huggingface",
    }
    ours = _env(
        {"PYTHONPATH": f"{RUNTIME_DIR}/runtime" + (f":{path}" if path else "")} | _settings(job, spec)
    )
    ours += [
        _secret_env(Env.TOKEN, job, "agent"),
        {"name": Env.POD_UID.value, "valueFrom": {"fieldRef": {"fieldPath": "metadata.uid"}}},
        {"name": Env.POD_IP.value, "valueFrom": {"fieldRef": {"fieldPath": "status.podIP"}}},
    ]
    reserved = {each["name"] for each in ours} | {Env.SLOT, Env.COORDINATOR}
    theirs = [each for name, each in named.items() if name not in reserved]
    checkpoint = job.spec.checkpoint
    secret = storage.credentials(checkpoint, named) if checkpoint is not None else []
    return _env({k: v for k, v in defaults.items() if k not in named}) + theirs + secret + ours


def _settings(job: Job, spec: Manifest) -> dict[str, str]:
    launcher, checkpoint, integrity = job.spec.launcher, job.spec.checkpoint, job.spec.health.integrity
    settings: dict[str, str] = {
        Env.JOB_UID: job.uid,
        Env.NAMESPACE: job.namespace,
        Env.JOB: job.name,
        Env.PROCESSES: str(launcher.processes_per_node),
        Env.LAUNCHER: launcher.kind,
        Env.COMMAND: json.dumps([*launcher.command, *launcher.args]),
        Env.RUN_DIR: RUN_DIR,
        Env.GRACE_S: str(spec["terminationGracePeriodSeconds"]),
        Env.PREFLIGHT: "On" if job.spec.health.preflight else "Off",
        Env.INTEGRITY_NORMS: integrity.norms,
        Env.INTEGRITY_DIGESTS: integrity.digests,
        Env.INTEGRITY_ON_SPIKE: integrity.on_spike,
        Env.INTEGRITY_ON_RECURRENCE: integrity.on_recurrence,
    }
    if checkpoint is not None:
        settings |= {
            Env.CHECKPOINT_ROOT: storage.root(job, checkpoint),
            Env.CHECKPOINT_INTERVAL: str(checkpoint.interval.steps or INTERVAL_AUTO),
            Env.CHECKPOINT_KEEP: str(checkpoint.retention.keep_last),
            **storage.environment(checkpoint),
            Env.CHECKPOINT_PEERS: str(checkpoint.peers),
        }
    return settings


def _env(values: dict[Any, str]) -> list[Manifest]:
    return [{"name": str(name), "value": value} for name, value in values.items()]


def _secret_env(name: Env, job: Job, key: str) -> Manifest:
    reference = {"name": names.token_secret(job.name, job.uid), "key": key}
    return {"name": name.value, "valueFrom": {"secretKeyRef": reference}}


def _wants_devices(spec: Manifest) -> bool:
    """Whether slots ask for GPUs or other devices: those are what keeps slots apart, not the host."""
    asked = [each.get("resources", {}) for each in spec["containers"]]
    extended = (name for each in asked for kind in ("limits", "requests") for name in each.get(kind, ()))
    return any("/" in name for name in extended) or any("claims" in each for each in asked)


# --- where pods run ---------------------------------------------------------------------------------------------------


def _term(job: str, role: str, *more: Manifest) -> Manifest:
    selector: Manifest = {"matchLabels": {names.JOB: job, names.ROLE: role}}
    return {
        "topologyKey": names.HOSTNAME,
        "labelSelector": selector | ({"matchExpressions": [*more]} if more else {}),
    }


def _affinity(spec: Manifest, job: str, apart: bool) -> None:
    anti = spec.setdefault("affinity", {}).setdefault("podAntiAffinity", {})
    if apart:
        anti.setdefault("requiredDuringSchedulingIgnoredDuringExecution", []).append(
            _term(job, names.Role.SLOT)
        )


def _keep_off(spec: Manifest, nodes: tuple[str, ...]) -> None:
    """Beside whatever the template asks of nodes: its terms are alternatives, so each of them gets our fields."""
    required = (
        spec.setdefault("affinity", {})
        .setdefault("nodeAffinity", {})
        .setdefault("requiredDuringSchedulingIgnoredDuringExecution", {"nodeSelectorTerms": [{}]})
    )
    for term in required["nodeSelectorTerms"]:
        term["matchFields"] = [*term.get("matchFields", []), *(_other_than(name) for name in nodes)]


def _other_than(node: str) -> Manifest:
    # By field, not by the hostname label: the label need not be the node's name. A field takes one value only.
    return {"key": "metadata.name", "operator": "NotIn", "values": [node]}


def _coordinator_affinity(job: str, avoid_node: str, spare_slots: list[int]) -> Manifest:
    weighted = [{"weight": 50, "podAffinityTerm": _term(job, names.Role.SLOT)}]
    if spare_slots:
        trains = {"key": names.SLOT, "operator": "NotIn", "values": [str(slot) for slot in spare_slots]}
        weighted.append({"weight": 50, "podAffinityTerm": _term(job, names.Role.SLOT, trains)})
    affinity: Manifest = {
        "podAntiAffinity": {"preferredDuringSchedulingIgnoredDuringExecution": weighted},
    }
    if avoid_node:
        required = {"nodeSelectorTerms": [{"matchFields": [_other_than(avoid_node)]}]}
        affinity["nodeAffinity"] = {"requiredDuringSchedulingIgnoredDuringExecution": required}
    return affinity


# --- the coordinator --------------------------------------------------------------------------------------------------


def _coordinator_spec(job: Job, settings: Render) -> Manifest:
    template = job.spec.template["spec"]
    pod_security = copy.deepcopy(_POD_SECURITY)
    if settings.run_as_user is not None:
        pod_security["runAsUser"] = settings.run_as_user
    spec: Manifest = {
        "restartPolicy": "OnFailure",
        "terminationGracePeriodSeconds": 2,
        "automountServiceAccountToken": False,
        "enableServiceLinks": False,
        "securityContext": pod_security,
        "containers": [_coordinator_container(job, settings)],
        "volumes": [{"name": "stormjib-run", "emptyDir": {}}],
    }
    _pull_secrets(spec, template, settings)
    # No nodeSelector: it usually asks for GPUs, of which a coordinator needs none.
    kept = ("priorityClassName", "tolerations")
    return spec | {key: copy.deepcopy(template[key]) for key in kept if key in template}


def _coordinator_container(job: Job, settings: Render) -> Manifest:
    env = {Env.JOB_UID: job.uid, Env.NAMESPACE: job.namespace, Env.JOB: job.name, Env.RUN_DIR: RUN_DIR}
    # Ready for longer than the operator waits for a heartbeat: a coordinator that hangs is replaced, one whose
    # container restarts is not Ready at once, and is waited for.
    probe = {"httpGet": {"path": "/healthz", "port": names.COORDINATOR_PORT}, "failureThreshold": 10}
    return {
        "name": "coordinator",
        "image": settings.image,
        "imagePullPolicy": settings.pull_policy,
        "command": ["python3", "-m", "stormjib_runtime.coordinator"],
        "env": [
            *_env(env),
            _secret_env(Env.TOKEN, job, "agent"),
            _secret_env(Env.OPERATOR_TOKEN, job, "operator"),
        ],
        "ports": [{"name": "coordinator", "containerPort": names.COORDINATOR_PORT}],
        "readinessProbe": probe | {"periodSeconds": 1, "timeoutSeconds": 1},
        "securityContext": copy.deepcopy(_SECURITY),
        "resources": copy.deepcopy(_SMALL),
        "volumeMounts": [{"name": "stormjib-run", "mountPath": RUN_DIR}],
    }
