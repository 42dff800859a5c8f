"""Images made here, and what their containers see of this machine."""

from __future__ import annotations

import hashlib
import io
import json
import os
import platform
import signal
import subprocess
import sys
import tarfile
from pathlib import Path
from typing import Any

import pytest

from stormjib_local import images, pause
from stormjib_local.errors import BadRequest


def _files() -> dict[str, bytes]:
    with tarfile.open(fileobj=io.BytesIO(images.archive())) as tar:
        return {entry.name: tar.extractfile(entry).read() for entry in tar}  # type: ignore[union-attr]


def _blob(files: dict[str, bytes], descriptor: dict[str, Any]) -> bytes:
    blob = files[f"blobs/sha256/{descriptor['digest'].removeprefix('sha256:')}"]
    assert len(blob) == descriptor["size"]
    assert hashlib.sha256(blob).hexdigest() == descriptor["digest"].removeprefix("sha256:")
    return blob


def test_the_archive_holds_both_images_whole() -> None:
    files = _files()
    names = set()
    for descriptor in json.loads(files["index.json"])["manifests"]:
        names.add(descriptor["annotations"]["io.containerd.image.name"])
        manifest = json.loads(_blob(files, descriptor))
        config = json.loads(_blob(files, manifest["config"]))
        layer = _blob(files, manifest["layers"][0])
        assert config["rootfs"]["diff_ids"] == [f"sha256:{hashlib.sha256(layer).hexdigest()}"]
    assert names == {images.HOST_IMAGE, images.PAUSE_IMAGE}


def test_the_same_machine_makes_the_same_archive() -> None:
    assert images.archive() == images.archive()


def test_the_machine_is_bound_read_only_and_nothing_twice() -> None:
    repository = Path(__file__).resolve().parents[3]
    spec = images.base_spec([repository, repository / "tests", Path("/usr/bin")])
    binds = {m["destination"]: m for m in spec["mounts"] if m["type"] == "bind"}
    assert {"/usr", str(repository), images.ENVIRONMENT} <= set(binds)
    assert all("ro" in bind["options"] for bind in binds.values())
    assert binds[images.ENVIRONMENT]["source"] == sys.prefix
    # A mount point inside another read-only bind could not be made.
    assert str(repository / "tests") not in binds
    assert "/usr/bin" not in binds


@pytest.mark.parametrize(
    ("mount", "why"),
    [
        ("/no/such/folder", "no such file"),
        ("/", "of its own"),
        ("/proc", "of its own"),
        ("/tmp", "of its own"),
    ],
)
def test_a_mount_that_cannot_work_is_refused(mount: str, why: str) -> None:
    with pytest.raises(BadRequest, match=why):
        images.check_mounts([mount])


@pytest.mark.skipif(platform.machine() != "x86_64", reason="the bytes tested here are this processor's")
def test_the_sandbox_program_waits_and_reaps(tmp_path: Path) -> None:
    program = tmp_path / "pause"
    program.write_bytes(pause.program("amd64"))
    program.chmod(0o755)
    with subprocess.Popen([program]) as process:
        try:
            with pytest.raises(subprocess.TimeoutExpired):
                process.wait(0.2)
            status = Path(f"/proc/{process.pid}/status").read_text()
            ignored = int(
                next(line.split()[1] for line in status.splitlines() if line.startswith("SigIgn")), 16
            )
            assert ignored >> (signal.SIGCHLD - 1) & 1, "children would stay as zombies"
        finally:
            os.kill(process.pid, signal.SIGKILL)


def test_an_unknown_processor_is_refused() -> None:
    with pytest.raises(BadRequest, match="amd64 and arm64"):
        pause.program("riscv64")
