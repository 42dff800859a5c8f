"""How long from a fault to the next step, on the local cluster, and what watching costs. Medians of five runs and their spread.

`python -m bench.recovery [--quick] [--cases A,B] [--json FILE]`. Each pair of runs is the same kill under Stormjib and under stock
torchrun, one after the other on the same cluster.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console

from bench import costs, faults, samples
from bench.demo import say
from bench.faults import Scene
from bench.follow import Follower
from bench.stage import Stage, opened, wait_until
from bench.table import Row, show, write_json

if TYPE_CHECKING:
    from collections.abc import Callable

    from bench.report import FaultRecord

NAMESPACE = "bench"


def main() -> None:
    """Run the bench."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="one run of the rank kill, no peer")
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument(
        "--cases", type=lambda text: text.split(","), default=list(CASES), help=",".join(CASES)
    )
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    with opened("bench", nodes=4) as stage:
        stage.reserve_operator_node()
        stage.install()
        stage.make_namespace(NAMESPACE)
        rows = quick(stage) if options.quick else full(stage, options.runs, options.cases)
    Console().print(show(rows))
    if options.json:
        write_json(options.json, rows, ["torch", "kopf", "kubernetes"])


def quick(stage: Stage) -> list[Row]:
    """One rank kill."""
    return [_row("rank-kill", "stormjib", on_jobs(stage, 1, faults.rank_kill))]


def full(stage: Stage, runs: int, cases: list[str]) -> list[Row]:
    """The chosen faults, each `runs` times."""
    unknown = set(cases) - set(CASES)
    if unknown:
        raise SystemExit(f"--cases names {min(unknown)!r}; known: {', '.join(CASES)}")
    return [row for case in cases for row in CASES[case](stage, runs)]


def rank_kill(stage: Stage, runs: int) -> list[Row]:
    """The same kill under Stormjib and under stock torchrun, in pairs; each on a job of its own."""
    ours: list[float] = []
    theirs: list[float] = []
    forks: list[list[float]] = []

    def measure(scene: Scene) -> list[float]:
        again_s = faults.rank_kill(scene).stepping_again_s
        forks.append(samples.forks_to_collective(scene.follower.lines))
        return [again_s]

    for _ in range(runs):
        ours += run_job(stage, measure)
        theirs += run_job(stage, lambda s: [faults.torchrun_rank_kill(s)], "tiny-llama-torchrun.yaml")
    return [
        _row("rank-kill", "stormjib", ours),
        _row("rank-kill", "torchrun", theirs),
        # At a start the spare imports torch beside the ranks.
        Row.of("fork_to_collective_s", "start", "stormjib", [seen[0] for seen in forks], "s"),
        Row.of("fork_to_collective_s", "restart", "stormjib", [seen[-1] for seen in forks], "s"),
    ]


def rank_freeze(stage: Stage, runs: int) -> list[Row]:
    """SIGSTOP."""
    return [_row("rank-freeze", "stormjib", on_jobs(stage, runs, faults.rank_freeze))]


def node_cut(stage: Stage, runs: int) -> list[Row]:
    """A member's node is cut and healed."""
    return [_row("node-cut", "stormjib", on_jobs(stage, runs, faults.node_cut))]


def coordinator_cut(stage: Stage, runs: int) -> list[Row]:
    """The coordinator's node is cut and healed; what counts is when the next one knows every agent."""
    seen = run_job(stage, lambda s: repeat(s, runs, lambda: faults.coordinator_cut(s)[1]))
    return [Row.of("agents_registered_s", "coordinator-cut", "stormjib", seen, "s")]


def watching(stage: Stage, runs: int) -> list[Row]:
    """What operator, coordinator and two agents cost together while a job trains, over 30 s each."""
    percents, memories = [], []

    def measure(scene: Scene) -> list[float]:
        for _ in range(runs):
            percent, memory = costs.measure(scene)
            percents.append(percent)
            memories.append(memory)
        return percents

    run_job(stage, measure, unit="% of a core")
    names = memories[0]
    return [
        Row.of("idle_core_percent", "training", "stormjib", percents, "%"),
        *(Row.of(f"rss_{name}", "training", "stormjib", [m[name] for m in memories], "MB") for name in names),
    ]


CASES: dict[str, Callable[[Stage, int], list[Row]]] = {
    "rank-kill": rank_kill,
    "rank-freeze": rank_freeze,
    "node-cut": node_cut,
    "coordinator-cut": coordinator_cut,
    "watching": watching,
}


def _row(case: str, subject: str, values: list[float]) -> Row:
    return Row.of("stepping_again_s", case, subject, values, "s")


def on_jobs(stage: Stage, runs: int, fault: Callable[[Scene], FaultRecord]) -> list[float]:
    """The fault on one job after the other: a node that hangs one job twice is taken out of that job."""
    return [value for _ in range(runs) for value in run_job(stage, lambda s: [fault(s).stepping_again_s])]


def repeat(scene: Scene, runs: int, fault: Callable[[], float]) -> list[float]:
    """The same fault several times on one job, which settles after each."""
    values = []
    for _ in range(runs):
        values.append(fault())
        faults.settle(scene)
    return values


def run_job(
    stage: Stage, measure: Callable[[Scene], list[float]], sample: str = "tiny-llama.yaml", unit: str = "s"
) -> list[float]:
    """Apply a sample that would train for long, measure once it steps, delete it."""
    job = stage.apply_sample(sample, NAMESPACE, _endless)
    scene = Scene(stage, Follower(stage.cluster.kubeconfig, NAMESPACE, job), NAMESPACE, job)
    try:
        scene.follower.wait_step(15, 120)
        faults.all_ready(scene)
        values = measure(scene)
        say(f"{sample}: {', '.join(f'{v:.2f}' for v in values)} {unit}")
        return values
    finally:
        scene.follower.close()
        gone = f"stormjib.io/job={job}"
        stage.kubectl("delete", "trainingjob", job, "-n", NAMESPACE)
        # Not the leave in order that a plain deletion is: the next run shall have the machine for itself at once.
        stage.kubectl("delete", "pods", "-n", NAMESPACE, "-l", gone, "--force", "--grace-period=0")
        stage.kubectl("delete", "pvc", "--all", "-n", NAMESPACE)
        wait_until(
            lambda: not stage.get("pods", "-n", NAMESPACE, "-l", gone)["items"], 90, "the pods to be gone"
        )


def _endless(job: dict[str, Any]) -> None:
    job["spec"]["launcher"].setdefault("args", []).extend(["--set", "train.steps=100000"])


if __name__ == "__main__":
    main()
