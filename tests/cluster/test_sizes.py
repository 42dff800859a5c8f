"""A job with allowed sizes across 4, 3 and 5 ranks: a cluster of its own, because a node joins it. Real training."""

from __future__ import annotations

from contextlib import closing
from typing import TYPE_CHECKING, Any

import pytest
from cluster.conftest import NAME, ROOT
from cluster.jobs import cause_of, endless, start
from cluster.kube import footprint

from bench import resize
from bench.stage import Stage, wait_until
from stormjib_local.cluster import Cluster

if TYPE_CHECKING:
    from collections.abc import Iterator

    from bench.faults import Scene

pytestmark = [pytest.mark.alone, pytest.mark.timeout(240)]


@pytest.fixture
def growing_stage() -> Iterator[Stage]:
    """Four nodes, the chart, and room for a fifth."""
    cluster = Cluster(f"{NAME}s")
    cluster.down()  # what a killed session may have left
    try:
        cluster.up(nodes=4, mounts=[ROOT])
        stage = Stage(cluster)
        stage.install()
        yield stage
    finally:
        cluster.down()
    assert footprint(cluster.name) == []


def test_a_job_shrinks_and_grows_across_odd_sizes(growing_stage: Stage) -> None:
    growing_stage.make_namespace("sizes")
    scene = start(growing_stage, "sizes", endless, sample=resize.SAMPLE)
    with closing(scene.follower):
        crosses_odd_sizes(scene)


def crosses_odd_sizes(scene: Scene) -> None:
    wait_until(lambda: summary(scene) == "4/4", 20, "four nodes in the status")
    shrunk, grown = resize.shrink_and_grow(scene, steps=15)
    wait_until(lambda: summary(scene) == "5/5", 20, "five nodes in the status")
    found = resize.figures(scene, [shrunk, grown])
    assert found.sizes == [4, 3, 5]
    assert (found.samples_missing, found.samples_twice) == (0, 0)
    assert (cause_of(scene, shrunk.generation), cause_of(scene, grown.generation)) == ("AgentSilent", "Grow")
    assert shrunk.lost_steps <= 11, "one interval of ten, and the step in progress"
    assert grown.lost_steps == 0, "growing is planned"


def summary(scene: Scene) -> str:
    """How many nodes train of those that are wanted, as `kubectl get` shows it."""
    status: dict[str, Any] = scene.stage.job(scene.namespace, scene.job).get("status", {})
    return str(status.get("nodes", {}).get("summary", ""))
