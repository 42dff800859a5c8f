"""Gives each claim of class `shared` a folder of this machine, and takes it away again.

Started by `up` on the control plane's host: `python -m stormjib_local.provisioner SERVER PKI FOLDER`. It keeps no state:
at each change of a claim or volume it compares what is with what should be.
"""

from __future__ import annotations

import shutil
import sys
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from stormjib_local.api import Api, Json
from stormjib_local.errors import ApiError

if TYPE_CHECKING:
    from collections.abc import Iterable

COMPONENT = "provisioner"
STORAGE_CLASS = "shared"
PROVISIONER = "local.stormjib.io/shared-folder"
USER = "local.stormjib.io:provisioner"
CLAIMS = "/api/v1/persistentvolumeclaims"
VOLUMES = "/api/v1/persistentvolumes"
_WATCH_SECONDS = 300
_RETRY_SECONDS = 1.0


@dataclass(frozen=True)
class Plan:
    """What to do to the volumes."""

    create: tuple[Json, ...]
    remove: tuple[Json, ...]


def plan(claims: Iterable[Json], volumes: Iterable[Json], folder: Path) -> Plan:
    """Pure: claims and volumes as the API lists them."""
    known = list(volumes)
    names = {volume["metadata"]["name"] for volume in known}
    wanted = [_volume(claim, folder) for claim in claims if _is_ours(claim)]
    released = [
        volume
        for volume in known
        if volume["spec"].get("storageClassName") == STORAGE_CLASS
        and volume.get("status", {}).get("phase") == "Released"
        and volume["spec"].get("persistentVolumeReclaimPolicy") == "Delete"
        # Exactly as we made it: a volume that somebody else wrote never leads us to their path.
        and volume["spec"].get("hostPath", {}).get("path") == str(folder / volume["metadata"]["name"])
    ]
    return Plan(tuple(v for v in wanted if v["metadata"]["name"] not in names), tuple(released))


def _is_ours(claim: Json) -> bool:
    spec = claim["spec"]
    return (
        spec.get("storageClassName") == STORAGE_CLASS
        and not spec.get("volumeName")
        and spec.get("volumeMode", "Filesystem") == "Filesystem"
        and "deletionTimestamp" not in claim["metadata"]
    )


def _volume(claim: Json, folder: Path) -> Json:
    meta, spec = claim["metadata"], claim["spec"]
    name = f"pvc-{meta['uid']}"
    return {
        "apiVersion": "v1",
        "kind": "PersistentVolume",
        "metadata": {"name": name, "annotations": {"pv.kubernetes.io/provisioned-by": PROVISIONER}},
        "spec": {
            "storageClassName": STORAGE_CLASS,
            "accessModes": spec["accessModes"],
            "capacity": {"storage": spec["resources"]["requests"]["storage"]},
            "persistentVolumeReclaimPolicy": "Delete",
            "claimRef": {
                "apiVersion": "v1",
                "kind": "PersistentVolumeClaim",
                "namespace": meta["namespace"],
                "name": meta["name"],
                "uid": meta["uid"],
            },
            # One folder that every node sees: a node whose link is cut still reaches it, as it may with real storage.
            "hostPath": {"path": str(folder / name), "type": "Directory"},
        },
    }


def apply(api: Api, wanted: Plan) -> None:
    """Folders first: a volume that exists can be mounted."""
    for volume in wanted.create:
        folder = Path(volume["spec"]["hostPath"]["path"])
        folder.mkdir(parents=True, exist_ok=True)
        # fsGroup does not apply to hostPath, and pods are not root.
        folder.chmod(0o1777)
        api.post(VOLUMES, volume)
        print(
            f"made {folder} for {volume['spec']['claimRef']['namespace']}/{volume['spec']['claimRef']['name']}"
        )
    for volume in wanted.remove:
        shutil.rmtree(volume["spec"]["hostPath"]["path"], ignore_errors=True)
        api.delete(f"{VOLUMES}/{volume['metadata']['name']}")
        print(f"removed {volume['metadata']['name']}")


def _announce(api: Api, path: str, changed: threading.Event) -> None:
    while True:
        try:
            for _ in api.watch(path, _WATCH_SECONDS):
                changed.set()
        except ApiError as error:
            print(f"watching {path}: {error}")
            time.sleep(_RETRY_SECONDS)


def serve(api: Api, folder: Path) -> None:
    """For ever."""
    changed = threading.Event()
    for path in (CLAIMS, VOLUMES):
        threading.Thread(target=_announce, args=(api, path, changed), daemon=True).start()
    while True:
        # With nothing announced, look all the same now and then: an announcement may have been lost.
        changed.wait(_WATCH_SECONDS)
        changed.clear()
        try:
            apply(api, plan(api.get(CLAIMS)["items"], api.get(VOLUMES)["items"], folder))
        except (ApiError, OSError) as error:
            print(f"{error}: trying again")
            time.sleep(_RETRY_SECONDS)
            changed.set()


if __name__ == "__main__":
    sys.stdout.reconfigure(line_buffering=True)  # type: ignore[union-attr]
    serve(Api(sys.argv[1], Path(sys.argv[2]), COMPONENT), Path(sys.argv[3]))
