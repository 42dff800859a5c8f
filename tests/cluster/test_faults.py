"""One job on the real cluster through every fault of the promise table.

The tests of this file share the job and run in order; each leaves it training with every agent ready.
"""

from __future__ import annotations

import signal
import time
from typing import TYPE_CHECKING

import pytest
from cluster.jobs import cause_of, endless, start, story

from bench import faults, samples
from bench.stage import SYSTEM, Stage, kill_rank, wait_until

if TYPE_CHECKING:
    from collections.abc import Iterator

    from bench.faults import Scene

# CI's machines are slow and shared: three times the bound that the benchmark holds.
SLACK = 3.0
INTERVAL = 10

pytestmark = [pytest.mark.alone, pytest.mark.timeout(240)]


@pytest.fixture(scope="module")
def scene(quiet_stage: Stage) -> Iterator[Scene]:
    """A job of two nodes with two processes each and one spare, that steps."""
    quiet_stage.make_namespace("faults")
    found = start(quiet_stage, "faults", endless)
    faults.settle(found)
    yield found
    found.follower.close()
    quiet_stage.kubectl("delete", "namespace", "faults", "--wait=false")


def test_a_killed_rank_costs_seconds_and_is_counted(scene: Scene) -> None:
    record = faults.rank_kill(scene)
    assert record.stepping_again_s <= 1.5 * SLACK, story(scene)
    assert record.lost_steps <= INTERVAL + 1
    assert cause_of(scene, record.generation) == "RankExit"
    wait_until(lambda: restarts(scene)["counted"] >= 1, 20, "the restart in the status")
    faults.settle(scene)


def test_a_frozen_rank_is_found_and_replaced(scene: Scene) -> None:
    record = faults.rank_freeze(scene)
    assert record.stepping_again_s <= 4 * SLACK, story(scene)
    assert record.lost_steps <= INTERVAL + 1
    assert cause_of(scene, record.generation) == "RankHang"
    faults.settle(scene)


def test_a_killed_operator_stops_nothing_and_a_rank_killed_meanwhile_is_recovered(scene: Scene) -> None:
    record = faults.operator_kill(scene)
    assert record.lost_steps == 0
    scene.stage.kubectl("scale", "deployment", "stormjib", "-n", SYSTEM, "--replicas=0")
    try:
        wait_until(lambda: not scene.stage.operator_pods(), 30, "the operator to be gone")
        killed = faults.rank_kill(scene)
        assert killed.stepping_again_s <= 1.5 * SLACK, story(scene)
    finally:
        scene.stage.kubectl("scale", "deployment", "stormjib", "-n", SYSTEM, "--replicas=1")
        wait_until(scene.stage.operator_pods, 60, "the operator to be back")
    faults.settle(scene)


def test_an_upgrade_of_the_chart_stops_nothing(scene: Scene) -> None:
    before = scene.stage.operator_pod()["metadata"]["uid"]
    record = faults.helm_upgrade(scene)
    assert record.lost_steps == 0
    assert scene.stage.operator_pod()["metadata"]["uid"] != before, "the upgrade replaced no pod"
    faults.settle(scene)


def test_a_rank_killed_while_the_coordinator_is_cut_is_recovered_by_the_next_one(scene: Scene) -> None:
    node = faults.seat_coordinator(scene)
    generation = faults.latest(scene).generation
    at = time.time()
    scene.stage.cluster.cut(node)
    try:
        kill_rank(scene.member_pods()[-1], signal.SIGKILL)
        again = scene.follower.first_step_after(at, 60, newer_than=generation)
        assert again.generation.split(".")[0] > generation.split(".")[0], "a new incarnation recovered it"
        assert again.at - at <= 10 * SLACK
    finally:
        scene.stage.cluster.heal(node)
    faults.settle(scene)


def test_a_cut_coordinator_costs_no_step(scene: Scene) -> None:
    record, registered_s = faults.coordinator_cut(scene)
    assert record.lost_steps == 0
    assert registered_s <= 10 * SLACK
    faults.settle(scene)


def test_a_cut_node_is_replaced_by_the_spare(scene: Scene) -> None:
    record = faults.node_cut(scene)
    assert record.stepping_again_s <= 6 * SLACK, story(scene)
    assert record.lost_steps <= INTERVAL + 1
    assert cause_of(scene, record.generation) == "AgentSilent"
    faults.settle(scene)


def test_a_drained_node_leaves_in_order(scene: Scene) -> None:
    victim = scene.member_pods()[0]["spec"]["nodeName"]
    before, counted = faults.latest(scene), restarts(scene)["counted"]
    at = time.time()
    scene.stage.kubectl(
        "drain", victim, "--ignore-daemonsets", "--delete-emptydir-data", "--force", "--timeout=60s"
    )
    try:
        again = scene.follower.first_step_after(at, 60, newer_than=before.generation)
        reached = max(s.step for s in list(scene.follower.steps) if s.generation == before.generation)
        assert again.step == reached + 1, "a planned leave loses no step"
        assert cause_of(scene, again.generation) == "Leave"
    finally:
        scene.stage.kubectl("uncordon", victim)
    faults.settle(scene)
    assert restarts(scene)["counted"] == counted


def test_no_sample_was_lost_or_fed_twice(scene: Scene) -> None:
    last = faults.latest(scene).step
    wait_until(lambda: samples.audit(scene).steps > last, 60, "another commit")
    found = samples.audit(scene)
    assert (found.missing, found.twice) == (0, 0)


def restarts(scene: Scene) -> dict[str, int]:
    """Restarts as the status counts them."""
    status = scene.stage.job(scene.namespace, scene.job).get("status", {})
    found: dict[str, int] = {"total": 0, "counted": 0, **status.get("restarts", {})}
    return found
