"""The definition keeps the rules of the Kubernetes API reviewers, and what is checked in is what the models say."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from fakes.job import now, running
from stormjib_operator import bounds, crd
from stormjib_operator.models import Status
from stormjib_operator.spec import Spec

if TYPE_CHECKING:
    from collections.abc import Iterator

CHART = Path(__file__).resolve().parents[3] / "charts/stormjib/templates"
KINDS = [pytest.param(kind, id=kind.name) for kind in crd.KINDS]


def fields(part: dict[str, Any], path: str = "") -> Iterator[tuple[str, dict[str, Any]]]:
    """Every field of a schema with its path."""
    yield path, part
    for name, each in part.get("properties", {}).items():
        yield from fields(each, f"{path}.{name}".lstrip("."))
    if "items" in part:
        yield from fields(part["items"], f"{path}[]")


def known(kind: crd.Kind) -> list[tuple[str, dict[str, Any]]]:
    """Every field of a kind, but metadata, which the API server describes."""
    return [(path, each) for path, each in fields(crd.schema(kind)) if path and path != "metadata"]


ALL = [(f"{kind.name}.{path}", each) for kind in crd.KINDS for path, each in known(kind)]
OURS = [(path, each) for path, each in ALL if path.partition(".")[2] not in ("apiVersion", "kind")]


def of(kind: str) -> list[Any]:
    """Fields of a type as parameters of a test."""
    return [pytest.param(each, id=path) for path, each in OURS if each.get("type") == kind]


@pytest.mark.parametrize("kind", KINDS)
def test_the_chart_holds_what_the_models_say(kind: crd.Kind) -> None:
    written = (CHART / kind.file).read_text()
    assert written == crd.chart_template(kind), "run `make verify` and commit the result"


@pytest.mark.parametrize("kind", KINDS)
def test_the_definition_survives_an_uninstall_and_has_no_templating_of_its_own(kind: crd.Kind) -> None:
    definition = crd.definition(kind)
    assert definition["metadata"]["annotations"] == {"helm.sh/resource-policy": "keep"}
    assert "{{" not in repr(definition)


@pytest.mark.parametrize("part", [pytest.param(e, id=p) for p, e in ALL if not p.endswith("[]")])
def test_every_field_is_described_in_a_sentence(part: dict[str, Any]) -> None:
    text = part.get("description", "")
    assert len(text.split()) >= 3
    assert text[0].isupper()
    assert text.endswith(".")
    assert "\n" not in text


@pytest.mark.parametrize("part", of("string"))
def test_every_string_is_bounded(part: dict[str, Any]) -> None:
    assert "maxLength" in part or "enum" in part


@pytest.mark.parametrize("part", of("integer"))
def test_every_number_is_bounded_on_both_sides(part: dict[str, Any]) -> None:
    assert part["minimum"] <= part["maximum"] <= 2**53  # beyond it the API server takes no status at all
    assert part["format"] in ("int32", "int64")


@pytest.mark.parametrize("part", of("array"))
def test_every_list_is_bounded_and_says_how_it_merges(part: dict[str, Any]) -> None:
    assert part["maxItems"] > 0
    kind = part["x-kubernetes-list-type"]
    assert kind in ("atomic", "set", "map")
    assert ("x-kubernetes-list-map-keys" in part) == (kind == "map")


def test_there_are_no_floats_no_nulls_and_no_phase() -> None:
    assert {each.get("type") for _, each in ALL} == {"string", "integer", "boolean", "array", "object"}
    assert not [path for path, each in ALL if "nullable" in each or "anyOf" in each or "$ref" in each]
    assert not [path for path, _ in ALL if path.endswith("phase")]


@pytest.mark.parametrize("kind", [crd.TRAINING_JOB, crd.NODE_ISOLATION])
def test_conditions_come_first_in_the_status(kind: crd.Kind) -> None:
    assert next(iter(crd.schema(kind)["properties"]["status"]["properties"])) == "conditions"


@pytest.mark.parametrize("kind", KINDS)
def test_nothing_in_the_status_is_required_or_has_a_default(kind: crd.Kind) -> None:
    status = crd.schema(kind)["properties"]["status"]
    assert "required" not in status
    assert not [path for path, each in fields(status) if "default" in each]


def test_every_rule_says_what_to_do() -> None:
    every = [each for kind in crd.KINDS for _, each in fields(crd.schema(kind))]
    rules = [rule for each in every for rule in each.get("x-kubernetes-validations", ())]
    assert len(rules) == 20
    for rule in rules:
        assert ": " in rule["message"], rule


def test_the_fields_are_these() -> None:
    """A golden list: a new field is a promise and comes with what keeps it."""
    fields_of_a_job = known(crd.TRAINING_JOB)
    spec = [path.removeprefix("spec.") for path, _ in fields_of_a_job if path.startswith("spec.")]
    own = [path for path in spec if not path.startswith("template.") and not path.endswith("[]")]
    assert own == [
        "suspend",
        "template",
        "launcher",
        "launcher.kind",
        "launcher.processesPerNode",
        "launcher.command",
        "launcher.args",
        "nodes",
        "nodes.replicas",
        "nodes.minReplicas",
        "nodes.allowedReplicas",
        "nodes.spares",
        "model",
        "model.parameters",
        "model.layers",
        "model.memoryPerRank",
        "model.replicate",
        "recovery",
        "recovery.maxRestarts",
        "recovery.backoff",
        "recovery.backoff.initialSeconds",
        "recovery.backoff.maxSeconds",
        "recovery.shrink",
        "recovery.shrink.afterSeconds",
        "recovery.rules",
        "recovery.rules[].syndromes",
        "recovery.rules[].scopes",
        "recovery.rules[].confirmed",
        "recovery.rules[].minSeverityPercent",
        "recovery.rules[].minStrikes",
        "recovery.rules[].action",
        "health",
        "health.hang",
        "health.hang.factorPercent",
        "health.hang.floorSeconds",
        "health.hang.action",
        "health.preflight",
        "health.integrity",
        "health.integrity.norms",
        "health.integrity.digests",
        "health.integrity.onSpike",
        "health.integrity.onRecurrence",
        "checkpoint",
        "checkpoint.storage",
        "checkpoint.storage.persistentVolumeClaim",
        "checkpoint.storage.persistentVolumeClaim.claimName",
        "checkpoint.storage.objectStore",
        "checkpoint.storage.objectStore.url",
        "checkpoint.storage.objectStore.secretName",
        "checkpoint.interval",
        "checkpoint.interval.steps",
        "checkpoint.retention",
        "checkpoint.retention.keepLast",
        "checkpoint.signingKey",
        "checkpoint.signingKey.secretName",
        "checkpoint.signingKey.key",
        "checkpoint.peers",
    ]


def test_the_smallest_job_gets_the_defaults_that_the_schema_states() -> None:
    spec = Spec.model_validate(
        {"template": {"spec": {}}, "launcher": {"command": ["a.py"]}, "nodes": {"replicas": 2}}
    )
    stated = crd.schema(crd.TRAINING_JOB)["properties"]["spec"]["properties"]["recovery"]["default"]
    assert spec.recovery.model_dump(mode="json", by_alias=True) == stated
    assert (spec.nodes.least, spec.nodes.slots) == (2, 2)


def test_allowed_sizes_go_into_the_bounds_and_say_what_is_least() -> None:
    for nodes, sizes, least in (
        ({"replicas": 5, "allowedReplicas": [5, 3, 4]}, (3, 4, 5), 3),
        ({"replicas": 5, "minReplicas": 2}, (), 2),
    ):
        job = running(nodes=nodes)
        given = bounds.derive(job, job.job.status, now(5))
        assert (given.sizes, given.min_replicas, given.replicas) == (sizes, least, 5)


def test_a_status_goes_out_and_comes_back_the_same() -> None:
    status = Status.model_validate({"generation": "2.7", "slots": [{"slot": 0, "attempt": 3}]})
    wire = status.model_dump(mode="json", by_alias=True, exclude_none=True)
    assert Status.model_validate(wire) == status
