"""The slow faults of the demo: a rank that gets a part of its time, a link that lets less through. Measured until the verdict.

They stop nothing, so what counts is what the coordinator says of them, and how many steps later.
"""

from __future__ import annotations

import re
import statistics
import time
from contextlib import contextmanager
from itertools import pairwise
from typing import TYPE_CHECKING

from bench import pods
from bench.faults import latest
from bench.lab.grade import NOTES
from bench.report import VerdictRecord
from bench.stage import StageError
from stormjib_fault import catalogue, shell
from stormjib_fault.network import DEVICE
from stormjib_fault.words import Draw
from stormjib_fault.world import Place, Traffic, World
from stormjib_health.verdict import SURE

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from bench.faults import Scene

RANK_SEVERITY = 2.5
"""The rank runs for two fifths of the time."""
LINK_SEVERITY = 2.5
NAMED_S = 30.0
MEASURE_S = 1.0
AFTERMATH_S = 30.0
"""A fault that was healed is still seen by its traces: a lost node comes back, a spare imports torch."""
VERDICT = re.compile(r"verdict \d+: (\w+), (\w+) ([\d ]+|nobody) \(([\d.]+)")


def rank_slow(scene: Scene) -> VerdictRecord:
    """One rank is stopped for most of the time, again and again."""
    places = _places(scene)
    # Of the first node: the other faults strike the last one, and whoever is named twice is left out.
    victim = [place for place in places if place.slot == places[0].slot][-1]
    world = World(tuple(places))
    draw = Draw("duty-cycle", victim.rank, severity=RANK_SEVERITY)
    return _until_named(
        scene,
        world,
        draw,
        "rank-slow",
        "NonCommunicationSlow",
        {f"Rank {victim.rank}", f"Node {victim.slot}"},
    )


def link_slow(scene: Scene) -> VerdictRecord:
    """What one node sends to the other is let through so slowly that steps last longer."""
    places = _places(scene)
    victim, peer = places[-1], places[0]
    world = World(tuple(places), traffic=_traffic(scene, victim))
    draw = Draw("link-rate", victim.rank, peer.rank, LINK_SEVERITY)
    here, there = ([p.rank for p in places if p.slot == slot] for slot in (victim.slot, peer.slot))
    # Between two nodes alone nobody can tell a link from its ends.
    right = {f"Link {a} {b}" for one, two in ((here, there), (there, here)) for a in one for b in two}
    right |= {f"Node {victim.slot}", f"Node {peer.slot}"}
    return _until_named(scene, world, draw, "link-slow", "CommunicationSlow", right)


def _until_named(
    scene: Scene, world: World, draw: Draw, kind: str, syndrome: str, right: set[str]
) -> VerdictRecord:
    """Inject, wait for a verdict of that syndrome, heal."""
    before = latest(scene)
    with _injected(world, draw) as at:
        line = scene.follower.wait(lambda: _verdict(scene, at, syndrome), NAMED_S, f"a verdict on {kind}")
        step = latest(scene).step
    found = VERDICT.match(line.text)
    who = f"{found[2]} {found[3].strip()}" if found else "nobody"
    return VerdictRecord(kind, before.step, line.at - at, step - before.step, line.text, who in right)


@contextmanager
def _injected(world: World, draw: Draw) -> Iterator[float]:
    """The fault is there while the block runs; it is shown to have fired."""
    fault = catalogue.make(world, draw)
    try:
        fault.arm()
        at = time.time()
        fault.inject()
        yield at
        fault.prove()
    finally:
        fault.heal()


def _verdict(scene: Scene, at: float, syndrome: str) -> object:
    said = (line for line in list(scene.follower.lines) if line.at > at and "-coord-" in line.pod)
    return next((line for line in said if (m := VERDICT.match(line.text)) and m[1] == syndrome), None)


def without_fault(scene: Scene, marks: Sequence[tuple[float, str]]) -> list[str]:
    """Verdicts that are more than a note, though nothing was done to the job for a while: (time, fault) of what was done."""
    found = []
    for line in list(scene.follower.lines):
        verdict = VERDICT.match(line.text) if "-coord-" in line.pod else None
        caused = any(at <= line.at <= at + AFTERMATH_S for at, _ in marks)
        if verdict and float(verdict[4]) >= SURE and verdict[1] not in NOTES and not caused:
            found.append(line.text)
    return found


def _places(scene: Scene) -> list[Place]:
    """Every rank with its node's network namespace and its pod's address."""
    layout, found = scene.stage.cluster.layout, []
    for pod in scene.member_pods():
        slot = int(pod["metadata"]["labels"]["stormjib.io/slot"])
        netns, address = layout.netns(pod["spec"]["nodeName"]), pod["status"]["podIP"]
        for process in pods.ranks_of(pod["metadata"]["uid"]):
            rank = int(process.name.removeprefix("rank"))
            found.append(Place(rank, process.pid, slot, netns, address))
    if len({place.slot for place in found}) < 2:
        raise StageError(f"the ranks of {scene.job} are not on two nodes: there is no link to slow")
    return sorted(found, key=lambda place: place.rank)


def _traffic(scene: Scene, victim: Place) -> Traffic:
    """What a step is like now: its time, and the bytes that leave the victim's node in it."""
    first, sent = latest(scene), _sent(victim)
    began = time.monotonic()
    scene.follower.wait(lambda: time.monotonic() - began > MEASURE_S, 10, "steps to go on")
    last, more = latest(scene), _sent(victim) - sent
    steps = [s for s in list(scene.follower.steps) if first.step <= s.step <= last.step]
    step_s = statistics.median(b.at - a.at for a, b in pairwise(steps))
    return Traffic(step_s, more // max(1, last.step - first.step))


def _sent(place: Place) -> int:
    return int(shell.link(place.netns, DEVICE)["stats64"]["tx"]["bytes"])
