"""What watching over a job costs: CPU and memory of operator, coordinator and agents while the job trains."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from bench import pods
from bench.stage import StageError

if TYPE_CHECKING:
    from bench.faults import Scene
    from bench.pods import Process

SECONDS = 30.0
AGENTS = 2


def measure(scene: Scene) -> tuple[float, dict[str, float]]:
    """Percent of one core that operator, coordinator and two agents use together, and each one's memory in MB."""
    processes = _watchers(scene)
    before = {name: p.cpu_s for name, p in processes.items()}
    start = time.monotonic()
    scene.follower.wait(
        lambda: time.monotonic() - start >= SECONDS, SECONDS + 30, "thirty seconds of training"
    )
    elapsed = time.monotonic() - start
    used = sum(p.cpu_s - before[name] for name, p in processes.items())
    rss = {name: round(p.rss_mb, 1) for name, p in processes.items()}
    agents = [value for name, value in rss.items() if name.startswith("agent")]
    memory = {"operator": rss["operator"], "coordinator": rss["coordinator"], "agent": max(agents)}
    return round(100 * used / elapsed, 2), memory


def _watchers(scene: Scene) -> dict[str, Process]:
    """Operator, coordinator and the agents of two members, without their zygotes and ranks."""
    found = {
        "operator": _one(scene.stage.operator_pod()["metadata"]["uid"], "stormjib_operator"),
        "coordinator": _one(scene.coordinator()["metadata"]["uid"], "stormjib_runtime.coordinator"),
    }
    for pod in scene.member_pods()[:AGENTS]:
        name = pod["metadata"]["name"]
        found[f"agent {name}"] = _one(pod["metadata"]["uid"], "stormjib_runtime.agent")
    return found


def _one(uid: str, module: str) -> Process:
    process = next((p for p in pods.of_pod(uid) if module in p.command), None)
    if process is None:
        raise StageError(f"no process of {module} in pod {uid}")
    return process
