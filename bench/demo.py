"""`make demo`: the whole chain on one machine, through faults. A cluster, the chart, a job, eight faults, the same
training across sizes, the figures.

KEEP=1 keeps the cluster. The exit code is not zero when a promise was broken.
"""

from __future__ import annotations

import contextlib
import os
import re
import sys
import threading
import time
from typing import TYPE_CHECKING, Any

from rich.console import Console

from bench import costs, faults, resize, samples, slowness
from bench.curves import Curve, draw_curves
from bench.faults import Scene
from bench.follow import Follower
from bench.report import (
    FaultRecord,
    Report,
    fault_table,
    promise_table,
    promises,
    resize_table,
    verdict_table,
)
from bench.stage import ROOT, Stage, opened, wait_until

if TYPE_CHECKING:
    from collections.abc import Iterator

    from bench.follow import Step

NAMESPACE = "demo"
OUT = ROOT / "build/demo"
PAUSE_STEPS = 20
"""Between two faults."""
console = Console(highlight=False)


def main() -> int:
    """Run the demo; 0 when every promise was kept."""
    started = time.monotonic()
    with opened("demo", nodes=4, keep=bool(os.environ.get("KEEP"))) as stage:
        prepare(stage)
        report = Report()
        faulty = train_through_faults(stage, report)
        report.torchrun_rank_kill_s = torchrun_rank_kill(stage)
        resized = train_across_sizes(stage, report, faulty)
    show(report, faulty, resized)
    found = promises(report)
    console.print(promise_table(found))
    times = ", ".join(f"{key} {ms:g}" for key, ms in report.saves_ms.items())
    console.print(f"{report.saves} saves in {report.steps} steps; of rank 0, medians: {times}")
    console.print(
        f"report: {OUT / 'report.json'}\nloss curve: {OUT / 'loss.png'}\n{time.monotonic() - started:.0f} s in all"
    )
    return 0 if all(p.ok for p in found) else 1


def show(report: Report, faulty: Curve, resized: Curve) -> None:
    """Tables on the terminal; `report.json` and the curves in the folder."""
    report.write(OUT / "report.json")
    draw_curves(faulty, resized, OUT / "loss.png")
    changes = report.resized.changes if report.resized else ()
    console.print(fault_table(report.faults), verdict_table(report.verdicts), resize_table(changes), sep="\n")


def prepare(stage: Stage) -> None:
    """Install the chart on the node kept for the operator, make the namespace."""
    stage.reserve_operator_node()
    say("installing the chart with helm")
    stage.install()
    stage.make_namespace(NAMESPACE)


def train_through_faults(stage: Stage, report: Report) -> Curve:
    """Apply the sample, break things, wait for Complete, fill the report. Returns its loss."""
    job = stage.apply_sample("tiny-llama.yaml", NAMESPACE)
    say(
        f"applied TrainingJob {NAMESPACE}/{job}; every pod imports torch once, that takes a while on two cores"
    )
    scene = Scene(stage, Follower(stage.cluster.kubeconfig, NAMESPACE, job), NAMESPACE, job)
    marks: list[tuple[float, str]] = []
    with live(scene.follower):
        scene.follower.wait_step(2 * PAUSE_STEPS, 120)
        report.idle_core_percent, report.rss_mb = costs.measure(scene)
        for kind, slow in (("rank-slow", slowness.rank_slow), ("link-slow", slowness.link_slow)):
            # First, because what is slow is told by what steps were like before, in the same generation.
            marks.append((time.time(), kind))
            say(f"[bold]{kind}[/bold]")
            report.verdicts.append(slow(scene))
            say(f"  {report.verdicts[-1].told_s:.2f} s until: {report.verdicts[-1].text}")
            faults.settle(scene, 3 * PAUSE_STEPS)
        for kind in ("rank-kill", "rank-freeze", "operator-kill", "coordinator-cut", "node-cut"):
            marks.append((time.time(), kind))
            report.faults.append(break_something(scene, kind, report))
            faults.settle(scene, PAUSE_STEPS)
        wait_until(lambda: is_true(stage.condition(NAMESPACE, job, "Complete")), 600, "Complete", every=1)
    finish(scene, report, marks)
    return Curve(list(scene.follower.steps), marks)


def break_something(scene: Scene, kind: str, report: Report) -> FaultRecord:
    """Inject one fault and say what came of it."""
    say(f"[bold]{kind}[/bold]")
    if kind == "coordinator-cut":
        record, report.coordinator_registered_s = faults.coordinator_cut(scene)
    else:
        inject = {"rank-kill": faults.rank_kill, "rank-freeze": faults.rank_freeze}
        inject |= {"operator-kill": faults.operator_kill, "node-cut": faults.node_cut}
        record = inject[kind](scene)
    say(
        f"  {record.stepping_again_s:.2f} s until the next step, {record.lost_steps} steps lost, generation {record.generation}"
    )
    return record


def finish(scene: Scene, report: Report, marks: list[tuple[float, str]]) -> None:
    """The figures of the whole run."""
    steps = list(scene.follower.steps)
    report.steps, report.loss_first, report.loss_last = steps[-1].step, steps[0].loss, steps[-1].loss
    report.val_nats_per_byte = samples.validation(scene.follower.lines)
    report.saves_ms = samples.save_times(scene.follower.lines)
    report.saves = len([*samples.events(scene.follower.lines, "saved")])
    report.lost_to_saves_percent = samples.lost_to_saves(scene.follower.lines, steps)
    report.fork_to_collective_s = samples.fork_to_collective(scene.follower.lines)
    report.goodput = samples.goodput(steps)
    report.verdicts_without_fault = slowness.without_fault(scene, marks)
    audit = samples.audit(scene)
    report.samples_missing, report.samples_twice = audit.missing, audit.twice
    scene.follower.close()


def torchrun_rank_kill(stage: Stage) -> float:
    """The same job under stock torchrun, one rank killed: seconds to the next step."""
    job = stage.apply_sample("tiny-llama-torchrun.yaml", NAMESPACE)
    say(f"the same with kind: Torchrun, {NAMESPACE}/{job}")
    scene = Scene(stage, Follower(stage.cluster.kubeconfig, NAMESPACE, job), NAMESPACE, job)
    with live(scene.follower):
        scene.follower.wait_step(10, 120)
        seconds = faults.torchrun_rank_kill(scene)
    say(f"  {seconds:.2f} s until the next step under torchrun")
    stage.kubectl("delete", "trainingjob", job, "-n", NAMESPACE, "--wait=false")
    scene.follower.close()
    return seconds


def train_across_sizes(stage: Stage, report: Report, one_size: Curve) -> Curve:
    """The same training on 4, 3 and 5 ranks, a node each, into the report. Returns its loss."""
    stage.reserve_operator_node(reserved=False)  # four nodes are needed
    job = stage.apply_sample(resize.SAMPLE, NAMESPACE)
    say(f"[bold]sizes[/bold]: the same training on nodes with a rank each, {NAMESPACE}/{job}")
    scene = Scene(stage, Follower(stage.cluster.kubeconfig, NAMESPACE, job), NAMESPACE, job)
    with live(scene.follower):
        scene.follower.wait_step(3 * PAUSE_STEPS, 120)
        changes = resize.shrink_and_grow(scene, 3 * PAUSE_STEPS, say)
    report.resized = resize.figures(scene, changes, one_size.steps)
    scene.follower.close()
    return Curve(sorted(scene.follower.steps, key=lambda s: s.at))


def is_true(condition: dict[str, Any] | None) -> bool:
    """Whether a condition is there and true; a job that failed ends the demo with its words."""
    return condition is not None and condition["status"] == "True"


@contextlib.contextmanager
def live(follower: Follower) -> Iterator[None]:
    """Show step, loss, speed and generation while the block runs: one changing line, or plain lines without a terminal."""
    done = threading.Event()
    thread = threading.Thread(target=_show, args=(follower, done), daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join(timeout=2)


def _show(follower: Follower, done: threading.Event) -> None:
    if console.is_terminal:
        with console.status("waiting for the first step") as status:
            while not done.wait(0.5):
                if follower.latest:
                    status.update(_line(follower, follower.latest))
        return
    while not done.wait(5):
        if follower.latest:
            say(_line(follower, follower.latest))


def _line(follower: Follower, step: Step) -> str:
    return (
        f"step {step.step:5d}  loss {step.loss:.3f}  {step.tokens_per_s:7.0f} tokens/s  "
        f"generation {step.generation}  {step.world} ranks on {_nodes(follower)}"
    )


def _nodes(follower: Follower) -> str:
    """The slots that train, by the coordinator's newest word."""
    told = (re.search(r"; members ([\d,]+)", line.text) for line in reversed(follower.lines))
    members = next((match[1] for match in told if match), "?")
    return f"slots {members}"


def say(text: str) -> None:
    """One line of the story."""
    console.print(f"[dim]{time.strftime('%H:%M:%S')}[/dim] {text}")


if __name__ == "__main__":
    sys.exit(main())
