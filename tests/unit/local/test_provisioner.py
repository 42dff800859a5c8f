"""What the provisioner does to volumes, for given claims and volumes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from stormjib_local.provisioner import plan

FOLDER = Path("/var/lib/somewhere/shared")


def _claim(**spec: Any) -> dict[str, Any]:
    return {
        "metadata": {"name": "c", "namespace": "n", "uid": "u-1"},
        "spec": {
            "storageClassName": "shared",
            "accessModes": ["ReadWriteMany"],
            "resources": {"requests": {"storage": "1Gi"}},
        }
        | spec,
    }


def _volume(phase: str, **spec: Any) -> dict[str, Any]:
    made = plan([_claim()], [], FOLDER).create[0]
    return made | {"spec": made["spec"] | spec, "status": {"phase": phase}}


def test_a_claim_gets_a_folder_of_its_own() -> None:
    (volume,) = plan([_claim()], [], FOLDER).create
    assert volume["metadata"]["name"] == "pvc-u-1"
    assert volume["spec"]["hostPath"]["path"] == str(FOLDER / "pvc-u-1")
    assert volume["spec"]["claimRef"]["uid"] == "u-1"
    assert volume["spec"]["accessModes"] == ["ReadWriteMany"]


def test_looking_twice_makes_nothing_twice() -> None:
    assert plan([_claim()], [_volume("Available")], FOLDER) == plan([], [], FOLDER)


@pytest.mark.parametrize(
    "claim",
    [
        _claim(storageClassName="fast"),
        _claim(storageClassName=None),
        _claim(volumeName="pvc-u-1"),
        _claim(volumeMode="Block"),
        _claim() | {"metadata": _claim()["metadata"] | {"deletionTimestamp": "2026-01-01T00:00:00Z"}},
    ],
)
def test_other_claims_are_left_alone(claim: dict[str, Any]) -> None:
    assert plan([claim], [], FOLDER).create == ()


def test_only_a_released_volume_of_ours_is_removed() -> None:
    released = _volume("Released")
    others = [
        _volume("Bound"),
        _volume("Released", persistentVolumeReclaimPolicy="Retain"),
        _volume("Released", storageClassName="fast"),
        # Written by somebody else with our class: its path is theirs, and we run as root.
        _volume("Released", hostPath={"path": "/etc"}),
        _volume("Released", hostPath={"path": f"{FOLDER}/../../x"}),
        _volume("Released", hostPath={"path": f"{FOLDER}/.."}),
        _volume("Released", hostPath={}, nfs={"path": "/x", "server": "s"}),
    ]
    assert plan([], [released, *others], FOLDER).remove == (released,)
