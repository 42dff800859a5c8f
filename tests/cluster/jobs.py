"""What the tests of whole jobs share: small changes to the sample, waiting for a calm job, reading the history."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from bench import faults, samples
from bench.follow import Follower

if TYPE_CHECKING:
    from collections.abc import Callable

    from bench.faults import Scene
    from bench.stage import Stage

Change = "Callable[[dict[str, Any]], None]"


def endless(job: dict[str, Any]) -> None:
    """Train for longer than any test, and save often."""
    job["spec"]["launcher"]["args"] = ["--set", "train.steps=100000"]
    job["spec"]["checkpoint"]["interval"] = {"steps": 10}


def sized(replicas: int, minimum: int, spares: int, processes: int = 1) -> Callable[[dict[str, Any]], None]:
    """An endless job of that size."""

    def change(job: dict[str, Any]) -> None:
        endless(job)
        job["spec"]["nodes"] = {"replicas": replicas, "minReplicas": minimum, "spares": spares}
        job["spec"]["launcher"]["processesPerNode"] = processes

    return change


def start(
    stage: Stage,
    namespace: str,
    change: Callable[[dict[str, Any]], None],
    step: int = 12,
    sample: str = "tiny-llama.yaml",
) -> Scene:
    """Apply the sample and wait until it has made some steps."""
    job = stage.apply_sample(sample, namespace, change)
    scene = faults.Scene(stage, Follower(stage.cluster.kubeconfig, namespace, job), namespace, job)
    scene.follower.wait_step(step, 120)
    return scene


def decisions(scene: Scene) -> list[str]:
    """The coordinators' decisions, `generation 1.3: RankExit, ...`, in the order in which they were taken."""
    return [x.text for x in sorted(scene.follower.lines, key=lambda x: x.at) if _is_decision(x.text)]


def story(scene: Scene) -> str:
    """Decisions and starts of ranks, a line each with its seconds since the first: what a test says that has waited too long."""
    starts = [line for line, _ in samples.events(scene.follower.lines, "start")]
    told = sorted([x for x in scene.follower.lines if _is_decision(x.text)] + starts, key=lambda x: x.at)
    return "\n".join(f"{x.at - told[0].at:.2f} {x.pod}: {x.text[:160]}" for x in told)


def _is_decision(text: str) -> bool:
    return text.startswith("generation ") and ": " in text


def cause_of(scene: Scene, generation: str) -> str:
    """Why a generation began, by its coordinator's own words."""
    return next(
        text.split(": ", 1)[1].split(",")[0].split(";")[0]
        for text in decisions(scene)
        if text.startswith(f"generation {generation}:")
    )
