"""What cluster tests share: kubectl, waiting, and looking for what a cluster left behind."""

from __future__ import annotations

import json
import os
import subprocess
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable

    from stormjib_local.cluster import Cluster

SYSCTLS = ("vm/overcommit_memory", "vm/panic_on_oom", "kernel/panic", "kernel/panic_on_oops")


@dataclass(frozen=True)
class Kubectl:
    """kubectl as administrator, in one namespace."""

    cluster: Cluster
    namespace: str

    def __call__(self, *arguments: str, stdin: str | None = None, check: bool = True) -> str:
        """Output; with `check=False` also what it complained."""
        head = [str(self.cluster.kubectl), f"--kubeconfig={self.cluster.kubeconfig}", f"-n={self.namespace}"]
        done = subprocess.run(
            [*head, *arguments], input=stdin, capture_output=True, text=True, check=False, timeout=50
        )
        if check and done.returncode:
            raise AssertionError(f"kubectl {' '.join(arguments)}: {done.stdout}{done.stderr}")
        return done.stdout if check else done.stdout + done.stderr

    def get(self, *arguments: str) -> dict[str, Any]:
        """`kubectl get … -o json`, parsed."""
        found: dict[str, Any] = json.loads(self("get", *arguments, "-o", "json"))
        return found

    def apply(self, *documents: dict[str, Any]) -> None:
        """`kubectl apply` of these objects."""
        self("apply", "-f", "-", stdin="\n---\n".join(json.dumps(document) for document in documents))

    def wait(self, condition: str, *what: str, seconds: int = 40) -> None:
        """`kubectl wait`; what never came is described in the failure."""
        try:
            self("wait", f"--for={condition}", *what, f"--timeout={seconds}s")
        except AssertionError as error:
            seen = self("describe", *what, check=False) if condition.startswith("condition") else ""
            raise AssertionError(f"{error}\n{seen}") from error


def eventually(what: str, seconds: float, found: Callable[[], Any]) -> Any:
    """The first true value of `found`."""
    deadline = time.monotonic() + seconds
    while not (value := found()):
        assert time.monotonic() < deadline, f"not within {seconds:g} s: {what}"
        time.sleep(0.1)
    return value


def told(kubectl: Kubectl, *reasons: str, about: str = "") -> None:
    """Wait for events with these reasons, about one object where it is named: they are written after what they tell of."""

    def missing() -> set[str]:
        events = kubectl.get("events")["items"]
        mine = (event for event in events if about in ("", event["involvedObject"]["name"]))
        return set(reasons) - {event["reason"] for event in mine}

    eventually(f"events {', '.join(reasons)}", 20, lambda: not missing())


def inotify_limit() -> int:
    """Instances that all processes of one user may have together."""
    return int(Path("/proc/sys/fs/inotify/max_user_instances").read_text())


def sysctls() -> dict[str, str]:
    """Settings of the whole machine that a kubelet likes to change."""
    return {name: Path("/proc/sys", name).read_text() for name in SYSCTLS}


def footprint(name: str) -> list[str]:
    """All that is on this machine of the cluster called so: asked of the machine, not of our own code."""
    found = [f"process {pid}: {line}" for pid, line in _processes(name)]
    found += [f"namespace {path}" for path in Path("/run").glob(f"netns/sj-{name}-*")]
    links = subprocess.run(["ip", "-details", "link"], capture_output=True, text=True, check=True).stdout
    found += [line.strip() for line in links.splitlines() if f"stormjib-{name}" in line]
    mounts = Path("/proc/self/mountinfo").read_text().splitlines()
    found += [f"mount {line}" for line in mounts if f"stormjib-{name}/" in line or f"sj-{name}-" in line]
    groups = subprocess.run(
        ["find", "/sys/fs/cgroup", "-name", f"sj-{name}-*"], capture_output=True, text=True, check=True
    ).stdout
    found += [f"cgroup {line}" for line in groups.splitlines()]
    return found + [f"folder {path}" for path in Path("/var/lib").glob(f"stormjib-{name}")]


def _processes(name: str) -> list[tuple[int, str]]:
    needles = (f"stormjib-{name}/".encode(), f"sj-{name}-".encode(), f"STORMJIB_LOCAL={name}/".encode())
    found = []
    for pid in (int(entry) for entry in os.listdir("/proc") if entry.isdigit()):
        if pid == os.getpid():
            continue
        try:
            texts = [Path(f"/proc/{pid}/{file}").read_bytes() for file in ("cmdline", "environ", "cgroup")]
            zombie = "State:\tZ" in Path(f"/proc/{pid}/status").read_text()
        except OSError:
            continue
        if not zombie and any(needle in text for needle in needles for text in texts):
            found.append((pid, texts[0].replace(b"\0", b" ").decode(errors="replace")))
    return found
