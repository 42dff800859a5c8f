"""The definition on a real API server: bad jobs are refused by it, in words that say what to do."""

from __future__ import annotations

import json
import re
from typing import TYPE_CHECKING, Any

import pytest
from cluster.operator import install, job

from bench.stage import ROOT
from stormjib_operator.spec import Spec

if TYPE_CHECKING:
    from collections.abc import Callable

    from cluster.kube import Kubectl

    from stormjib_local.cluster import Cluster


SAMPLES = ROOT / "manifests/samples"


@pytest.fixture(scope="module", autouse=True)
def operator(cluster: Cluster) -> None:
    """The chart, with its definition."""
    install(cluster)


def claim(steps: int) -> dict[str, Any]:
    """A checkpoint each so many steps."""
    return {"storage": {"persistentVolumeClaim": {"claimName": "c"}}, "interval": {"steps": steps}}


def bucket(url: str, **more: Any) -> dict[str, Any]:
    """Checkpoints in an object store."""
    return {"storage": {"objectStore": {"url": url}, **more}}


def containers(*names: str) -> dict[str, Any]:
    """A template with containers of these names."""
    return {"spec": {"containers": [{"name": name, "image": f"i{i}"} for i, name in enumerate(names)]}}


MODEL = {"parameters": 8_000_000_000, "layers": 32, "memoryPerRank": "64Gi"}
BAD: dict[str, tuple[dict[str, Any], str]] = {
    "min above replicas": (
        job(nodes={"replicas": 2, "minReplicas": 3}),
        "lower minReplicas or raise replicas",
    ),
    "allowed sizes without the full one": (
        job(nodes={"replicas": 3, "allowedReplicas": [1, 2]}),
        "must name nodes.replicas too",
    ),
    "an allowed size above the full one": (
        job(nodes={"replicas": 3, "allowedReplicas": [3, 4]}),
        "must lie between nodes.minReplicas and nodes.replicas",
    ),
    "an allowed size below the least": (
        job(nodes={"replicas": 3, "minReplicas": 2, "allowedReplicas": [1, 3]}),
        "must lie between nodes.minReplicas and nodes.replicas",
    ),
    "more sizes than are planned": (
        job(nodes={"replicas": 65, "minReplicas": 1}, model=MODEL),
        "name them in nodes.allowedReplicas",
    ),
    "memory that is no quantity": (
        job(model=MODEL | {"memoryPerRank": "lots"}),
        "spec.model.memoryPerRank in body should match",
    ),
    "a model without layers": (
        job(model={"parameters": 8_000_000_000, "memoryPerRank": "64Gi"}),
        "spec.model.layers: Required value",
    ),
    "a model of nothing": (
        job(model=MODEL | {"parameters": 0}),
        "spec.model.parameters in body should be greater than or equal to 1",
    ),
    "no replicas": (
        job(nodes={"replicas": 0}),
        "spec.nodes.replicas in body should be greater than or equal to 1",
    ),
    "two trainers": (job(template=containers("trainer", "trainer")), "exactly one container named trainer"),
    "no trainer": (job(template=containers("main")), "exactly one container named trainer"),
    "unknown field": (job(nodes={"replicas": 2, "sparse": 1}), 'unknown field "spec.nodes.sparse"'),
    "negative interval": (
        job(checkpoint=claim(-5)),
        "interval.steps in body should be greater than or equal to 1",
    ),
    "no storage": (job(checkpoint={"storage": {}}), "exactly one of persistentVolumeClaim and objectStore"),
    "two storages": (
        job(checkpoint=bucket("s3://b", persistentVolumeClaim={"claimName": "c"})),
        "name the one where checkpoints shall be kept",
    ),
    "a folder as a store": (job(checkpoint=bucket("file:///data")), "must begin with s3://, gs://, az://"),
    "an unknown store": (
        job(checkpoint=bucket("https://b.s3.eu/x")),
        "a file system is a persistentVolumeClaim",
    ),
    "credentials in a URL": (job(checkpoint=bucket("s3://k:s/3@b/x")), "no credentials, port or query"),
    "an account in a URL": (job(checkpoint=bucket("s3://k@b/x")), "into the Secret that secretName names"),
    "a query in a URL": (job(checkpoint=bucket("s3://b/x?sig=1")), "no credentials, port or query"),
    "no bucket": (job(checkpoint=bucket("s3:///team")), "write it as s3://bucket/prefix"),
    "an empty name": (job(checkpoint=bucket("s3://b//team")), "write it as s3://bucket/prefix"),
    "a way out": (job(checkpoint=bucket("s3://b/team/..")), "write it as s3://bucket/prefix"),
    "name of 60 characters": (job("j" * 60), "choose a shorter name"),
    "name with a dot": (job("a.b"), "metadata.name must begin with a letter"),
    "command in the template": (
        job(template={"spec": {"containers": [{"name": "trainer", "image": "i", "command": ["sh"]}]}}),
        "put what it shall run into launcher.command",
    ),
    "backoff upside down": (
        job(recovery={"backoff": {"initialSeconds": 9, "maxSeconds": 3}}),
        "lower it or raise maxSeconds",
    ),
    "nothing to run": (
        job(launcher={"command": []}),
        "spec.launcher.command in body should have at least 1 items",
    ),
    "unknown launcher": (
        job(launcher={"kind": "Mpi", "command": ["x"]}),
        'supported values: "Stormjib", "Torchrun"',
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_job_is_refused_and_told_why(kubectl: Kubectl, name: str) -> None:
    manifest, words = BAD[name]
    said = kubectl("create", "-f", "-", stdin=json.dumps(manifest), check=False)
    assert words in said
    assert kubectl.get("trainingjobs")["items"] == []


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (
            lambda spec: spec["launcher"].update(processesPerNode=4),
            "launcher cannot change while the job runs",
        ),
        (
            lambda spec: spec["template"]["spec"]["containers"][0].update(image="other"),
            "template cannot change while the job runs",
        ),
        (
            lambda spec: spec.update(checkpoint=claim(5)),
            "checkpoint.storage cannot change while the job runs",
        ),
        (
            lambda spec: spec.update(checkpoint=bucket("s3://b/x")),
            "checkpoint.storage cannot change while the job runs",
        ),
    ],
)
def test_what_runs_cannot_change_unless_it_is_suspended(
    kubectl: Kubectl, change: Callable[[dict[str, Any]], None], words: str
) -> None:
    held = job(suspend=True)
    kubectl.apply(held)
    changed = job(suspend=True)
    change(changed["spec"])
    kubectl.apply(changed)  # suspended: anything goes
    changed["spec"]["suspend"] = held["spec"]["suspend"] = False
    kubectl.apply(changed)
    said = kubectl("apply", "-f", "-", stdin=json.dumps(held), check=False)
    assert f"{words}: set suspend: true first" in said


@pytest.mark.parametrize("url", ["s3://b", "s3://b/", "gs://b/a.b/c..d", "az://box/x@y", "fsspec+s3://b/x"])
def test_the_urls_that_the_library_takes_are_accepted(kubectl: Kubectl, url: str) -> None:
    kubectl.apply(job(suspend=True, checkpoint=bucket(url)))


@pytest.mark.parametrize("key", [{"secretName": "other", "key": "k"}, None])
def test_a_signing_key_neither_changes_nor_goes_while_the_job_runs(
    kubectl: Kubectl, key: dict[str, Any] | None
) -> None:
    kubectl.apply(job(checkpoint=claim(5) | {"signingKey": {"secretName": "k", "key": "k"}}))
    changed = job(checkpoint=claim(5) | ({"signingKey": key} if key else {}))
    said = kubectl("apply", "-f", "-", stdin=json.dumps(changed), check=False)
    assert "checkpoint.signingKey cannot change while the job runs: set suspend: true first" in said


@pytest.mark.parametrize(
    ("path", "words"),
    [
        ("tj.spec.nodes.minReplicas", "The smallest number of nodes with which the job goes on"),
        ("tj.spec.launcher.command", "What follows torchrun on a command line"),
        ("tj.spec.template.spec.containers", "Exactly one is named trainer"),
        ("tj.spec.recovery.maxRestarts", "before the job is Failed"),
        ("tj.status.conditions", "The facts about the job"),
    ],
)
def test_explain_reads_like_a_manual(kubectl: Kubectl, path: str, words: str) -> None:
    assert words in " ".join(kubectl("explain", path).split())


def test_the_table_of_jobs_says_what_matters(kubectl: Kubectl) -> None:
    kubectl.apply(job(suspend=True))
    assert kubectl("get", "tj").splitlines()[0].split() == [
        "NAME",
        "STATE",
        "NODES",
        "STEP",
        "RESTARTS",
        "CKPT",
        "AGE",
    ]
    assert {"GEN", "LASTFAULT"} <= set(kubectl("get", "training", "-o", "wide").splitlines()[0].split())


def test_the_server_fills_in_the_defaults_that_the_models_state(kubectl: Kubectl) -> None:
    kubectl.apply(job(suspend=True))
    stored = kubectl.get("tj", "job")["spec"]
    bare = {key: stored[key] for key in ("template", "launcher", "nodes", "suspend")}
    assert Spec.model_validate(stored) == Spec.model_validate(bare)


def test_the_definition_is_accepted_without_a_complaint(kubectl: Kubectl) -> None:
    definition = kubectl.get("crd", "trainingjobs.stormjib.io")
    met = {each["type"]: each["status"] for each in definition["status"]["conditions"]}
    assert met["Established"] == "True"
    assert met.get("NonStructuralSchema", "False") == "False"


@pytest.mark.parametrize("sample", sorted(path.name for path in SAMPLES.glob("*.yaml")))
def test_a_sample_is_accepted_as_it_is(kubectl: Kubectl, sample: str) -> None:
    said = kubectl("apply", "--dry-run=server", "-f", str(SAMPLES / sample), check=False)
    assert "trainingjob.stormjib.io" in said
    assert "Warning" not in said
    assert "rror" not in said


def test_the_example_of_the_page_about_stores_is_accepted_as_it_is(kubectl: Kubectl) -> None:
    (text,) = re.findall(
        r"^```yaml\n(.*?)^```$", (ROOT / "docs/stores.md").read_text(), re.MULTILINE | re.DOTALL
    )
    said = kubectl("apply", "--dry-run=server", "-f", "-", stdin=text, check=False).splitlines()
    assert said == [
        "secret/bucket created (server dry run)",
        "trainingjob.stormjib.io/llama created (server dry run)",
    ]
