"""What clusters share on a machine: locks that leave nothing, and a limit that is raised and given back."""

from __future__ import annotations

import json
import threading
from typing import TYPE_CHECKING

import pytest

from stormjib_local import machine

if TYPE_CHECKING:
    from pathlib import Path


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A machine whose /var/lib is empty and whose limit is the usual one."""
    library = tmp_path / "lib"
    library.mkdir()
    (tmp_path / "limit").write_text("128\n")
    monkeypatch.setattr(machine, "ROOT", library)
    monkeypatch.setattr(
        "stormjib_local.layout.Layout.state", property(lambda layout: library / f"stormjib-{layout.name}")
    )
    monkeypatch.setattr(machine, "_INOTIFY", tmp_path / "limit")
    monkeypatch.setattr(machine, "MOUNT_POINTS", (library / "cni", library / "kubelet"))
    return library


def _up(root: Path, name: str) -> int:
    before = machine.raise_limits()
    (root / f"stormjib-{name}").mkdir()
    (root / f"stormjib-{name}" / "cluster.json").write_text(json.dumps({"index": 0, "inotify": before}))
    return before


def _down(root: Path, name: str, before: int) -> None:
    (root / f"stormjib-{name}" / "cluster.json").unlink()
    machine.restore(before)


def test_the_limit_is_given_back_when_the_last_cluster_goes(root: Path) -> None:
    limit = root.parent / "limit"
    first, second = _up(root, "a"), _up(root, "b")
    assert first == second == 128
    assert int(limit.read_text()) > 1000
    _down(root, "a", first)
    assert int(limit.read_text()) > 1000, "the other one still needs it"
    _down(root, "b", second)
    assert int(limit.read_text()) == 128


def test_a_higher_limit_stays_as_it_is(root: Path) -> None:
    (root.parent / "limit").write_text("5000\n")
    _down(root, "a", _up(root, "a"))
    assert (root.parent / "limit").read_text().strip() == "5000"


def test_a_mount_point_that_somebody_else_uses_stays(root: Path) -> None:
    (root / "cni").mkdir()
    (root / "kubelet" / "theirs").mkdir(parents=True)
    machine.restore(None)
    assert [path.name for path in root.iterdir()] == ["kubelet"]


def test_a_lock_leaves_nothing_and_lets_one_in_at_a_time(tmp_path: Path) -> None:
    folder, inside, most = tmp_path / "stormjib-x", [], []

    def turn() -> None:
        for _ in range(30):
            with machine.locked(folder):
                inside.append(1)
                most.append(len(inside))
                (folder / "file").write_text("x")
                machine.empty(folder)
                inside.pop()

    threads = [threading.Thread(target=turn) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert max(most) == 1
    assert len(most) == 120
    assert not folder.exists()
