"""Images without a registry: an empty root filesystem, and the machine's own userland bound into it read-only.

Nothing is copied, so torch's 5 GB cost nothing and a change of code is live at the next pod start. containerd's base
runtime spec does the binding. It does not hold for a pod's sandbox, whose image brings its own program.
"""

from __future__ import annotations

import hashlib
import io
import json
import sys
import tarfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stormjib_local import pause
from stormjib_local.errors import BadRequest
from stormjib_local.projects import architecture

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

HOST_IMAGE = "localhost/host:dev"
PAUSE_IMAGE = "localhost/pause:local"
ENVIRONMENT = "/opt/venv"
MOUNTS = "/opt/mounts"
"""Each mount is at MOUNTS/0, MOUNTS/1, ... as well as at its own path."""
_PATH = f"PATH={ENVIRONMENT}/bin:/usr/local/bin:/usr/bin:/bin"
_PASSWD = "root:x:0:0:root:/root:/bin/sh\nuser:x:10001:10001:user:/tmp:/bin/sh\nnobody:x:65534:65534:nobody:/:/bin/false\n"
_GROUP = "root:x:0:\nuser:x:10001:\nnogroup:x:65534:\n"
_USERLAND = ("/usr", "/etc/ssl", "/etc/pki", "/etc/ca-certificates", "/etc/ld.so.cache", "/etc/alternatives")

Json = dict[str, Any]


def archive() -> bytes:
    """Both images as one OCI archive."""
    blobs, manifests = [], []
    for name, layer, command in (
        (HOST_IMAGE, _host_layer(), None),
        (PAUSE_IMAGE, _pause_layer(), ["/pause"]),
    ):
        config = json.dumps(_config(layer, command)).encode()
        manifest = json.dumps(_manifest(config, layer)).encode()
        blobs += [layer, config, manifest]
        annotations = {
            "io.containerd.image.name": name,
            "org.opencontainers.image.ref.name": name.split(":")[1],
        }
        manifests.append(_descriptor("manifest.v1", manifest) | {"annotations": annotations})
    files = {f"blobs/sha256/{_sha256(blob)}": blob for blob in blobs}
    files["oci-layout"] = b'{"imageLayoutVersion":"1.0.0"}'
    files["index.json"] = json.dumps({"schemaVersion": 2, "manifests": manifests}).encode()
    return _tar(files)


def base_spec(mounts: Iterable[Path]) -> Json:
    """What every container starts from. CRI puts the pod's own settings on top."""
    return {
        "ociVersion": "1.0.2",
        "process": {
            "cwd": "/",
            "noNewPrivileges": True,
            "user": {"uid": 0, "gid": 0},
            "capabilities": _capabilities(),
        },
        "root": {"path": "rootfs"},
        "mounts": [*_system_mounts(), *_binds(mounts)],
        "linux": {
            "resources": {"devices": [{"allow": False, "access": "rwm"}]},
            "namespaces": [{"type": kind} for kind in ("pid", "ipc", "uts", "mount", "network")],
            "maskedPaths": [
                f"/proc/{name}"
                for name in (
                    "acpi",
                    "asound",
                    "kcore",
                    "keys",
                    "latency_stats",
                    "timer_list",
                    "sched_debug",
                    "scsi",
                )
            ]
            + ["/sys/firmware"],
            "readonlyPaths": [f"/proc/{name}" for name in ("bus", "fs", "irq", "sys", "sysrq-trigger")],
        },
    }


def check_mounts(mounts: Iterable[str | Path]) -> list[Path]:
    """Absolute, there, and not a part of the system that the container has its own of."""
    checked = []
    for mount in mounts:
        path = Path(mount).absolute()
        if not path.exists():
            raise BadRequest(f"--mount {mount}: there is no such file or folder")
        if path == Path("/") or (
            path.parts[1] in ("proc", "sys", "dev", "run", "tmp") and len(path.parts) == 2
        ):
            raise BadRequest(f"--mount {mount}: every container has a {path} of its own; name a folder in it")
        checked.append(path)
    return sorted(set(checked))


def _binds(mounts: Iterable[Path]) -> list[Json]:
    mounts = list(mounts)
    sources = {path: path for path in map(Path, _USERLAND) if path.exists()}
    sources |= {path: path for path in (Path(sys.base_prefix), Path(sys.prefix), *mounts)}
    # What lies in another bind is there already, and its mount point could not be made on a read-only one.
    top = [path for path in sources if not any(other in path.parents for other in sources)]
    # Also at a place of its own each: a checkout below /tmp is hidden where a pod mounts a volume on /tmp.
    again = [_bind(path, Path(MOUNTS) / str(i)) for i, path in enumerate(mounts)]
    return [_bind(path, path) for path in sorted(top)] + [_bind(Path(sys.prefix), Path(ENVIRONMENT)), *again]


def _bind(source: Path, destination: Path) -> Json:
    options = ["rbind", "ro", "nosuid", "nodev"]
    return {"destination": str(destination), "type": "bind", "source": str(source), "options": options}


def _capabilities() -> Json:
    """What a container has that asks for nothing and drops nothing: the list that containerd itself starts from."""
    names = "CHOWN DAC_OVERRIDE FSETID FOWNER MKNOD NET_RAW SETGID SETUID SETFCAP SETPCAP NET_BIND_SERVICE SYS_CHROOT"
    granted = [f"CAP_{name}" for name in (*names.split(), "KILL", "AUDIT_WRITE")]
    return {kind: granted for kind in ("bounding", "effective", "permitted")}


def _system_mounts() -> list[Json]:
    nothing = ["nosuid", "noexec", "nodev"]
    table: Sequence[tuple[str, str, str, list[str]]] = (
        ("/proc", "proc", "proc", nothing),
        ("/dev", "tmpfs", "tmpfs", ["nosuid", "strictatime", "mode=755", "size=65536k"]),
        (
            "/dev/pts",
            "devpts",
            "devpts",
            ["nosuid", "noexec", "newinstance", "ptmxmode=0666", "mode=0620", "gid=5"],
        ),
        ("/dev/shm", "tmpfs", "shm", [*nothing, "mode=1777", "size=65536k"]),
        ("/dev/mqueue", "mqueue", "mqueue", nothing),
        ("/sys", "sysfs", "sysfs", [*nothing, "ro"]),
        ("/run", "tmpfs", "tmpfs", ["nosuid", "strictatime", "mode=755", "size=65536k"]),
    )
    return [
        {"destination": to, "type": kind, "source": source, "options": o} for to, kind, source, o in table
    ]


def _pause_layer() -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        _add(tar, "pause", pause.program(architecture()), 0o755)
    return buffer.getvalue()


def _host_layer() -> bytes:
    """The root filesystem: mount points, and the links into /usr that this machine has."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        # /root too is open to all: the Python that is bound into the container may lie below it.
        for folder, mode in (
            ("tmp", 0o1777),
            ("root", 0o755),
            ("etc", 0o755),
            ("usr", 0o755),
            ("opt", 0o755),
        ):
            entry = tarfile.TarInfo(folder)
            entry.type, entry.mode = tarfile.DIRTYPE, mode
            tar.addfile(entry)
        for name in ("bin", "sbin", "lib", "lib32", "lib64", "libx32"):
            if (link := Path("/", name)).is_symlink():
                entry = tarfile.TarInfo(name)
                entry.type, entry.linkname = tarfile.SYMTYPE, str(link.readlink())
                tar.addfile(entry)
        for name, text in (("etc/passwd", _PASSWD), ("etc/group", _GROUP)):
            _add(tar, name, text.encode())
    return buffer.getvalue()


def _config(layer: bytes, command: list[str] | None) -> Json:
    return {
        "architecture": architecture(),
        "os": "linux",
        "config": {"Env": [_PATH], "WorkingDir": "/"} | ({"Entrypoint": command} if command else {}),
        "rootfs": {"type": "layers", "diff_ids": [f"sha256:{_sha256(layer)}"]},
    }


def _manifest(config: bytes, layer: bytes) -> Json:
    return {
        "schemaVersion": 2,
        "mediaType": "application/vnd.oci.image.manifest.v1+json",
        "config": _descriptor("config.v1", config),
        "layers": [_descriptor("layer.v1.tar", layer, "")],
    }


def _descriptor(kind: str, blob: bytes, suffix: str = "+json") -> Json:
    return {
        "mediaType": f"application/vnd.oci.image.{kind}{suffix}",
        "digest": f"sha256:{_sha256(blob)}",
        "size": len(blob),
    }


def _sha256(blob: bytes) -> str:
    return hashlib.sha256(blob).hexdigest()


def _tar(files: Mapping[str, bytes]) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        for name, content in files.items():
            _add(tar, name, content)
    return buffer.getvalue()


def _add(tar: tarfile.TarFile, name: str, content: bytes, mode: int = 0o644) -> None:
    entry = tarfile.TarInfo(name)
    entry.size, entry.mode = len(content), mode
    tar.addfile(entry, io.BytesIO(content))
