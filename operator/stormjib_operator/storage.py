"""What a job's checkpoint storage puts into the pods of its slots: the root, a volume or a URL, and credentials.

The operator reads no Secret: the kubelet puts its keys where they are named here. By name and one by one, never a whole Secret
(`envFrom`), so that one which holds LD_PRELOAD, PYTHONPATH or a variable of ours changes nothing.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from stormjib_runtime.wire import Env

if TYPE_CHECKING:
    from collections.abc import Collection

    from stormjib_operator.observed import Job, Manifest
    from stormjib_operator.spec import Checkpoint, ObjectStore, SigningKey

CLAIM = "/stormjib/storage"
KEYS = "/stormjib/keys"
_KEY = "checkpoint"
_READ_BY_ALL = 0o444
"""Without an fsGroup the file is root's, and the pod's user is not. Nobody else sees it: only the trainer's container mounts it."""


class Names(NamedTuple):
    """Keys of a Secret that become environment variables of the same name."""

    needed: tuple[str, ...]
    """Where one is missing, or the Secret is, no container starts, and the kubelet says which: the identity of the pod must not
    stand in for a Secret whose name was mistyped."""
    optional: tuple[str, ...] = ()


_S3 = Names(
    ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"),
    (
        "AWS_SESSION_TOKEN",
        "AWS_REGION",
        "AWS_DEFAULT_REGION",
        "AWS_ENDPOINT_URL",
        "AWS_ENDPOINT_URL_S3",
    ),
)
CREDENTIALS = {
    "s3": _S3,
    "fsspec+s3": _S3,
    "gs": Names(("GOOGLE_SERVICE_ACCOUNT_KEY",)),
    "az": Names(
        ("AZURE_STORAGE_ACCOUNT_NAME",),
        (
            "AZURE_STORAGE_ACCOUNT_KEY",
            "AZURE_STORAGE_SAS_TOKEN",
            "AZURE_STORAGE_ENDPOINT",
            "AZURE_TENANT_ID",
            "AZURE_CLIENT_ID",
            "AZURE_CLIENT_SECRET",
        ),
    ),
}
"""Scheme of a URL -> what may come out of a Secret for it."""


def root(job: Job, checkpoint: Checkpoint) -> str:
    """Where this job's checkpoints are: a folder of its own for each namespace and job, whatever else the storage holds."""
    store = checkpoint.storage.object_store
    above = CLAIM if store is None else store.url.rstrip("/")
    return f"{above}/{job.namespace}/{job.name}"


def volumes(checkpoint: Checkpoint) -> list[tuple[str, str, Manifest]]:
    """Name, path and source of each volume."""
    claim, key = checkpoint.storage.persistent_volume_claim, checkpoint.signing_key
    found: list[tuple[str, str, Manifest]] = []
    if claim is not None:
        found.append(("stormjib-storage", CLAIM, {"persistentVolumeClaim": {"claimName": claim.claim_name}}))
    if key is not None:
        found.append(("stormjib-keys", KEYS, {"secret": _key_file(key)}))
    return found


def environment(checkpoint: Checkpoint) -> dict[str, str]:
    """Variables that nothing may overrule, beside the root."""
    return {} if checkpoint.signing_key is None else {Env.CHECKPOINT_KEY_FILE: f"{KEYS}/{_KEY}"}


def credentials(checkpoint: Checkpoint, named: Collection[str]) -> list[Manifest]:
    """Variables out of the store's Secret, less those that the template names itself."""
    store = checkpoint.storage.object_store
    if store is None or store.secret_name is None:
        return []
    wanted = CREDENTIALS[store.scheme]
    each = [(name, False) for name in wanted.needed] + [(name, True) for name in wanted.optional]
    return [_from_secret(store, name, optional=may) for name, may in each if name not in named]


def _from_secret(store: ObjectStore, name: str, *, optional: bool) -> Manifest:
    reference = {"name": store.secret_name, "key": name} | ({"optional": True} if optional else {})
    return {"name": name, "valueFrom": {"secretKeyRef": reference}}


def _key_file(key: SigningKey) -> Manifest:
    return {
        "secretName": key.secret_name,
        "items": [{"key": key.key, "path": _KEY}],
        "defaultMode": _READ_BY_ALL,
    }
