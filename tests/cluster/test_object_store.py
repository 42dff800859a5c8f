"""Jobs on the real cluster whose checkpoints are in a real S3 server, which pods reach over the network."""

from __future__ import annotations

import base64
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from cluster.jobs import start
from cluster.kube import Kubectl, eventually, told
from cluster.operator import condition, wait_for

from bench import faults, samples
from fakes.gateway import KEY, Gateway, environment, gateway
from stormjib_local.addresses import Addresses

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from bench.stage import Stage
    from stormjib_local.cluster import Cluster

pytestmark = pytest.mark.timeout(300)
SAMPLE = "tiny-llama-s3.yaml"
JOB = "tiny-llama-s3"
LAST = 300
SIGNING = b"32 bytes that nobody else knows."


@pytest.fixture(scope="module")
def server(cluster: Cluster, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Gateway]:
    """The server, on this machine's leg in the cluster's network."""
    record = cluster.record
    assert record is not None
    with gateway(tmp_path_factory.mktemp("gateway"), str(Addresses(record.index).machine)) as running:
        yield running


def secret(kubectl: Kubectl, name: str, values: dict[str, str]) -> None:
    """A Secret of the test's namespace."""
    encoded = {key: base64.b64encode(value.encode()).decode() for key, value in values.items()}
    kubectl.apply({"apiVersion": "v1", "kind": "Secret", "metadata": {"name": name}, "data": encoded})


def small(url: str, **checkpoint: Any) -> Callable[[dict[str, Any]], None]:
    """Two nodes with one rank each, which save each tenth step below `url`."""

    def change(job: dict[str, Any]) -> None:
        spec = job["spec"]
        spec["launcher"]["args"] = ["--set", f"train.steps={LAST}"]
        spec["launcher"]["processesPerNode"] = 1
        spec["checkpoint"]["interval"] = {"steps": 10}
        spec["checkpoint"]["storage"]["objectStore"]["url"] = url
        spec["checkpoint"] |= checkpoint

    return change


def test_a_job_trains_into_a_bucket_and_goes_on_from_it_after_a_rank_was_killed(
    stage: Stage, kubectl: Kubectl, server: Gateway, tmp_path: Path
) -> None:
    """A signed job: the key's file is read by the pod's user as well, and a Secret's other keys change nothing."""
    url = f"s3://{server.bucket()}/team"
    bad = {"PYTHONPATH": "/nowhere", "LD_PRELOAD": "/nowhere.so", "STORMJIB_SLOT": "7"}
    secret(kubectl, "bucket", environment(server.address) | bad)
    secret(kubectl, "signing", {"hmac": SIGNING.decode()})
    change = small(url, signingKey={"secretName": "signing", "key": "hmac"}, retention={"keepLast": 100})
    scene = start(stage, kubectl.namespace, change, step=25, sample=SAMPLE)
    try:
        eventually(
            "a committed step",
            60,
            lambda: kubectl.get("tj", JOB)["status"]["checkpoint"]["lastCommittedStep"] >= 10,
        )
        killed = faults.rank_kill(scene)
        resumed = next(r for _, r in samples.events(scene.follower.lines, "resumed"))
        assert (resumed["generation"], resumed["of"]) == (killed.generation, "1.1")
        assert resumed["step"] >= 10
        wait_for(kubectl, JOB, "Complete", "True", seconds=150)
    finally:
        scene.follower.close()
    assert condition(kubectl, JOB, "CheckpointHealthy")["reason"] == "Committed"
    key = tmp_path / "key"
    key.write_bytes(SIGNING)
    env = environment(server.address) | {"STORMJIB_CHECKPOINT_KEY_FILE": str(key)}
    rows = json.loads(ckpt("ls", "--json", f"{url}/{kubectl.namespace}/{JOB}", env=env))
    steps = {row["step"]: row["generation"] for row in rows if row["state"] == "committed"}
    assert {LAST: killed.generation, resumed["step"]: "1.1"}.items() <= steps.items(), rows
    ckpt("verify", f"{url}/{kubectl.namespace}/{JOB}", env=env)


def ckpt(*words: str, env: dict[str, str]) -> str:
    """What `stormjib ckpt` says here, outside of the cluster."""
    done = subprocess.run(
        [str(Path(sys.executable).parent / "stormjib"), "ckpt", *words],
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
        env=os.environ | env,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_a_store_that_refuses_the_credentials_is_named_with_the_fix_before_the_first_step(
    stage: Stage, kubectl: Kubectl, server: Gateway
) -> None:
    url = f"s3://{server.bucket()}/team"
    secret(kubectl, "bucket", environment(server.address) | {"AWS_SECRET_ACCESS_KEY": "wrong"})
    stage.apply_sample(SAMPLE, kubectl.namespace, small(url))
    failed = wait_for(kubectl, JOB, "CheckpointHealthy", "False", "StorageFailed", seconds=120)
    assert f"{url}/{kubectl.namespace}/{JOB}" in failed["message"]
    assert "Give valid credentials" in failed["message"]
    assert KEY not in failed["message"]
    assert "wrong" not in failed["message"]
    told(kubectl, "StorageScanFailed", about=JOB)
    assert kubectl.get("tj", JOB)["status"]["progress"]["step"] == -1


def test_a_secret_that_is_not_there_is_named_and_nothing_else_stands_in_for_it(
    stage: Stage, kubectl: Kubectl
) -> None:
    stage.apply_sample(SAMPLE, kubectl.namespace, small("s3://bucket/team"))
    waits = wait_for(kubectl, JOB, "Running", "False", "CreateContainerConfigError", seconds=60)
    assert 'secret "bucket" not found' in waits["message"]
