"""One real cluster for each worker's session; every test gets a namespace of its own under the `restricted` profile."""

from __future__ import annotations

import hashlib
import os
import sys
import time
import uuid
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from cluster.kube import Kubectl, footprint, sysctls

from bench.stage import Stage
from stormjib_local.cluster import Cluster
from stormjib_local.projects import binaries
from stormjib_local.tools import Tools

if TYPE_CHECKING:
    from collections.abc import Iterator

ROOT = Path(__file__).resolve().parents[2]
NODES = 4
# Two checkouts, and two workers of one, may run their tests at the same time.
WHO = f"{ROOT} {os.environ.get('PYTEST_XDIST_WORKER', '')}"
NAME = f"t{hashlib.sha256(WHO.encode()).hexdigest()[:8]}"


def pytest_collection_finish(session: pytest.Session) -> None:
    """Get the binaries before the first test: with nothing cached they take minutes, which no test's time-out pays."""
    here = Path(__file__).parent
    if session.config.option.collectonly or not any(here in item.path.parents for item in session.items):
        return
    tools = Tools(say=lambda line: print(f"tools: {line}", file=sys.stderr, flush=True))
    for binary in binaries():
        tools.find(binary)


@dataclass(frozen=True)
class Up:
    """The session's cluster, how long it took to come up, and what the machine was like before."""

    cluster: Cluster
    seconds: float
    sysctls: dict[str, str]


@pytest.fixture(scope="session")
def up() -> Iterator[Up]:
    """The session's cluster. Not root: it fails, and says so."""
    cluster, before = Cluster(NAME), sysctls()
    cluster.down()  # what a killed session may have left
    begin = time.monotonic()
    try:
        cluster.up(nodes=NODES, mounts=[ROOT])
        yield Up(cluster, time.monotonic() - begin, before)
    finally:
        cluster.down()
    assert footprint(NAME) == []


@pytest.fixture(scope="session")
def cluster(up: Up) -> Cluster:
    """The session's cluster."""
    return up.cluster


@pytest.fixture
def kubectl(cluster: Cluster) -> Iterator[Kubectl]:
    """kubectl in a fresh namespace under the `restricted` profile."""
    ours = Kubectl(cluster, f"test-{uuid.uuid4().hex[:8]}")
    labels = {"pod-security.kubernetes.io/enforce": "restricted"}
    ours.apply(
        {"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": ours.namespace, "labels": labels}}
    )
    ours.wait("create", "serviceaccount/default")
    yield ours
    ours("delete", "namespace", ours.namespace, "--wait=false")


@pytest.fixture(scope="session")
def stage(cluster: Cluster) -> Stage:
    """The session's cluster with the chart installed by helm: the operator runs on the last node."""
    made = Stage(cluster)
    made.install()
    return made


@pytest.fixture(scope="module")
def quiet_stage(stage: Stage) -> Iterator[Stage]:
    """The stage with the operator's node kept free of jobs, so that cutting any other node spares the operator."""
    stage.reserve_operator_node()
    yield stage
    stage.reserve_operator_node(reserved=False)
