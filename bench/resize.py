"""A job across odd sizes: on four nodes, on three when one is cut off, on five when that is asked for and a new node comes.

Its script, seed and schedule are those of the demo's other job, so their losses can be laid on each other: the number of ranks
is not in them.
"""

from __future__ import annotations

import itertools
import json
import time
from typing import TYPE_CHECKING

from bench import samples
from bench.faults import latest
from bench.report import SIZES, Resize, Resized
from bench.stage import wait_until

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from typing import Any

    from bench.faults import Scene
    from bench.follow import Step

SAMPLE = "tiny-llama-sizes.yaml"
GROWN = {"replicas": SIZES[2], "allowedReplicas": [SIZES[1], SIZES[2]]}
"""Without four, so that the job does not stop for the first of two nodes and again for the second."""
CHANGED_S = 120.0
"""A node joins the cluster and two pods import torch."""


def shrink_and_grow(scene: Scene, steps: int, say: Callable[[str], None] = lambda text: None) -> list[Resize]:
    """Both changes of a job that trains on four nodes, with so many steps after each."""
    node, cluster = bystander(scene), scene.stage.cluster
    try:
        shrunk = _change(scene, "a node was cut off", lambda: cluster.cut(node))
        say(told(shrunk))
        _go_on(scene, steps)
        asked = time.time()
        _patch(scene, GROWN)  # before the node is back, or it would make four
    finally:
        cluster.heal(node)
    grown = _change(scene, "asked for by kubectl patch", lambda: cluster.up(nodes=SIZES[2]), asked)
    say(told(grown))
    _go_on(scene, steps)
    return [shrunk, grown]


def bystander(scene: Scene) -> str:
    """The node of the last rank that has neither the coordinator nor the operator beside it."""
    busy = {scene.coordinator()["spec"]["nodeName"], scene.stage.operator_pod()["spec"]["nodeName"]}
    nodes = [str(pod["spec"]["nodeName"]) for pod in scene.member_pods()]
    return next(node for node in reversed(nodes) if node not in busy)


def figures(scene: Scene, changes: Sequence[Resize], others: Sequence[Step] = ()) -> Resized:
    """What the ledger says of all steps so far, which sizes the steps had, and how far their losses are from `others`."""
    last = latest(scene).step
    audit = wait_until(lambda: (a := samples.audit(scene)).steps >= last and a, 60, f"step {last} committed")
    steps = list(scene.follower.steps)
    return Resized(
        steps=steps[-1].step,
        sizes=sizes_of(steps),
        changes=list(changes),
        samples_missing=audit.missing,
        samples_twice=audit.twice,
        loss_apart=apart(steps, others),
    )


def sizes_of(steps: Sequence[Step]) -> list[int]:
    """The numbers of ranks in the order in which they were."""
    return [world for world, _ in itertools.groupby(s.world for s in sorted(steps, key=lambda s: s.at))]


def apart(steps: Sequence[Step], others: Sequence[Step]) -> float | None:
    """The largest difference of two jobs' losses at the same step; None where they have no step in common."""
    theirs = {s.step: s.loss for s in others}
    return max((abs(s.loss - theirs[s.step]) for s in steps if s.step in theirs), default=None)


def told(change: Resize) -> str:
    """A change in a sentence."""
    return (
        f"  {change.why}: {change.before} -> {change.after} ranks after {change.changed_s:.2f} s, "
        f"of which {change.still_s:.2f} s without a step, {change.lost_steps} steps lost"
    )


def _patch(scene: Scene, nodes: dict[str, Any]) -> None:
    change = json.dumps({"spec": {"nodes": nodes}})
    scene.stage.kubectl(
        "patch", "trainingjob", scene.job, "-n", scene.namespace, "--type=merge", "-p", change
    )


def _change(scene: Scene, why: str, begin: Callable[[], None], asked: float | None = None) -> Resize:
    """From `asked` (now, where it is not given) to the first step on another number of ranks."""
    before, asked = latest(scene), asked or time.time()
    begin()
    first: Step = scene.follower.wait(
        lambda: next((s for s in scene.follower.steps if s.at > asked and s.world != before.world), None),
        CHANGED_S,
        f"another number of ranks than {before.world}",
    )
    earlier = [s for s in list(scene.follower.steps) if s.world == before.world and s.at < first.at]
    reached, at = max(s.step for s in earlier), max(s.at for s in earlier)
    lost = max(0, reached - first.step + 1)
    return Resize(
        before.world, first.world, why, reached, first.at - asked, first.at - at, lost, first.generation
    )


def _go_on(scene: Scene, steps: int) -> None:
    scene.follower.wait_step(latest(scene).step + steps, 90)
