"""The CustomResourceDefinitions, made from the models: `python -m stormjib_operator.crd FOLDER` writes them there.

A CRD's schema must be structural: no references, no `anyOf` that carries a type, no nullable twin of an optional
field. `structural` brings pydantic's JSON schema into that form; nothing else is added but what an API reviewer asks
for (a format on each integer) and the root rule on the name.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from stormjib_operator import names
from stormjib_operator.fields import MAX_NAME, rule
from stormjib_operator.isolation.models import IsolationPolicy, NodeIsolation
from stormjib_operator.models import TrainingJob

if TYPE_CHECKING:
    from stormjib_operator.fields import Model

_DROPPED = ("title", "$defs", "const", "additionalProperties")
_Column = tuple[str, str, int, str, str]
_AGE: _Column = ("AGE", "date", 0, ".metadata.creationTimestamp", "How long ago it was made.")


@dataclass(frozen=True)
class Kind:
    """One kind of the API: its names, its model, what a table of it shows, and the rules about the whole object."""

    name: str
    plural: str
    short: str
    category: str
    """What `kubectl get CATEGORY` shows it with."""
    scope: str
    model: type[Model]
    file: str
    """The file in the chart."""
    columns: tuple[_Column, ...]
    rules: tuple[dict[str, str], ...]


_JOB_COLUMNS: tuple[_Column, ...] = (
    ("STATE", "string", 0, '.status.conditions[?(@.type=="Running")].reason', "What the job is doing."),
    ("NODES", "string", 0, ".status.nodes.summary", "Active and desired nodes, and spares."),
    ("STEP", "integer", 0, ".status.progress.step", "The last step."),
    ("RESTARTS", "integer", 0, ".status.restarts.total", "Restarts after faults."),
    ("CKPT", "integer", 0, ".status.checkpoint.lastCommittedStep", "The newest committed step."),
    ("GEN", "string", 1, ".status.generation", "The newest generation."),
    ("LASTFAULT", "string", 1, ".status.faults[0].cause", "The newest fault."),
    _AGE,
)
_JOB_RULES = (
    rule(
        f"self.metadata.name.size() <= {MAX_NAME}",
        f"metadata.name must not be longer than {MAX_NAME} characters, because pods are named after it: "
        "choose a shorter name",
    ),
    rule(
        "self.metadata.name.matches('^[a-z]([-a-z0-9]*[a-z0-9])?$')",
        "metadata.name must begin with a letter and hold only lower-case letters, digits and '-', because a "
        "Service is named after it: choose such a name",
    ),
)
TRAINING_JOB = Kind(
    names.KIND,
    names.PLURAL,
    "tj",
    "training",
    "Namespaced",
    TrainingJob,
    "crd.yaml",
    _JOB_COLUMNS,
    _JOB_RULES,
)
NODE_ISOLATION = Kind(
    names.NODE_ISOLATION,
    "nodeisolations",
    "ni",
    "isolation",
    "Cluster",
    NodeIsolation,
    "crd-nodeisolations.yaml",
    (
        ("STATE", "string", 0, ".status.state", "Where the node stands."),
        ("WEIGHT", "integer", 0, ".status.weightPercent", "What speaks against it; 100 isolates."),
        ("SINCE", "date", 0, ".status.since", "How long it has stood there."),
        ("REASON", "string", 0, ".status.reason", "Why it stands there."),
        ("STRIKES", "integer", 1, ".status.strikes", "How often it has been isolated."),
        _AGE,
    ),
    (
        rule(
            "self.metadata.name == self.spec.nodeName",
            "metadata.name must be spec.nodeName, because a node has one NodeIsolation: give it the node's name",
        ),
    ),
)
ISOLATION_POLICY = Kind(
    names.ISOLATION_POLICY,
    "isolationpolicies",
    "isp",
    "isolation",
    "Cluster",
    IsolationPolicy,
    "crd-isolationpolicies.yaml",
    (
        ("MODE", "string", 0, ".spec.mode", "What the isolator may do."),
        ("BREAKER", "boolean", 0, ".status.breaker.open", "Whether a human has to look first."),
        _AGE,
    ),
    (
        rule(
            f"self.metadata.name == '{names.POLICY}'",
            f"metadata.name must be {names.POLICY}, because there is one policy: edit that one",
        ),
    ),
)
KINDS = (TRAINING_JOB, NODE_ISOLATION, ISOLATION_POLICY)


def structural(schema: dict[str, Any], definitions: dict[str, Any] | None = None) -> dict[str, Any]:
    """A pydantic JSON schema as a structural schema of Kubernetes."""
    known = schema.get("$defs", {}) if definitions is None else definitions
    flat = _inline(_without_null(schema), known)
    kept = {key: value for key, value in flat.items() if not _dropped(key, value)}
    if "properties" in kept:
        kept["properties"] = {name: structural(each, known) for name, each in kept["properties"].items()}
    if "items" in kept:
        kept["items"] = structural(kept["items"], known)
    if "description" in kept:
        kept["description"] = " ".join(kept["description"].split())  # `kubectl explain` breaks lines itself
    if kept.get("type") == "integer":
        kept.setdefault("format", "int32" if kept.get("maximum", 2**63) < 2**31 else "int64")
    return kept


def _dropped(key: str, value: Any) -> bool:
    # A map of strings keeps its additionalProperties (a schema); pydantic's booleans only repeat the default.
    return key in _DROPPED and not (key == "additionalProperties" and isinstance(value, dict))


def _without_null(schema: dict[str, Any]) -> dict[str, Any]:
    """`X | None` as an optional X: in Kubernetes an absent field says it, never a null."""
    if schema.get("default", "") is None:
        schema = {key: value for key, value in schema.items() if key != "default"}
    if isinstance(schema.get("default"), dict):  # what a model leaves open is left out: null is no integer
        given = {key: value for key, value in schema["default"].items() if value is not None}
        schema = schema | {"default": given}
    choices = [each for each in schema.get("anyOf", ()) if each.get("type") != "null"]
    if len(choices) != 1:
        return schema
    chosen: dict[str, Any] = choices[0]
    return chosen | {key: value for key, value in schema.items() if key != "anyOf"}


def _inline(schema: dict[str, Any], definitions: dict[str, Any]) -> dict[str, Any]:
    """The definition that a reference names, with what stands beside the reference on top of it."""
    if "$ref" not in schema:
        return schema
    target = definitions[schema["$ref"].rpartition("/")[2]]
    beside = {key: value for key, value in schema.items() if key != "$ref"}
    return _inline(target, definitions) | beside


def schema(kind: Kind) -> dict[str, Any]:
    """The structural schema of the whole object."""
    body = structural(kind.model.model_json_schema(by_alias=True))
    body["properties"]["status"].pop("default", None)
    _drop_defaults(body["properties"]["status"])
    head = {
        "apiVersion": {"type": "string", "description": "The version of this form of the object."},
        "kind": {"type": "string", "description": f"The kind of the object, {kind.name}."},
        "metadata": {"type": "object"},
    }
    body["properties"] = head | body["properties"]
    body["x-kubernetes-validations"] = list(kind.rules)
    return body


def _drop_defaults(part: dict[str, Any]) -> None:
    """The status is written whole by the operator: a default there would only be noise in `kubectl explain`."""
    part.pop("default", None)
    for each in part.get("properties", {}).values():
        _drop_defaults(each)
    if "items" in part:
        _drop_defaults(part["items"])


def definition(kind: Kind) -> dict[str, Any]:
    """The whole CustomResourceDefinition."""
    version: dict[str, Any] = {
        "name": names.VERSION,
        "served": True,
        "storage": True,
        "subresources": {"status": {}},
        "additionalPrinterColumns": [_column(*column) for column in kind.columns],
        "schema": {"openAPIV3Schema": schema(kind)},
    }
    called: dict[str, Any] = {
        "kind": kind.name,
        "listKind": f"{kind.name}List",
        "plural": kind.plural,
        "singular": kind.name.lower(),
        "shortNames": [kind.short],
        "categories": [kind.category],
    }
    return {
        "apiVersion": "apiextensions.k8s.io/v1",
        "kind": "CustomResourceDefinition",
        "metadata": {
            "name": f"{kind.plural}.{names.GROUP}",
            "annotations": {"helm.sh/resource-policy": "keep"},
            "labels": {"app.kubernetes.io/name": "stormjib", "app.kubernetes.io/part-of": "stormjib"},
        },
        "spec": {"group": names.GROUP, "scope": kind.scope, "names": called, "versions": [version]},
    }


def _column(name: str, kind: str, priority: int, path: str, text: str) -> dict[str, Any]:
    return {"name": name, "type": kind, "priority": priority, "jsonPath": path, "description": text}


def chart_template(kind: Kind) -> str:
    """The definition as a template of the chart. No text in it holds `{{`, so only the switch is templating."""
    text = yaml.safe_dump(definition(kind), sort_keys=False, width=110, allow_unicode=True)
    return (
        f"# Made by `make verify` from operator/{kind.model.__module__.replace('.', '/')}.py; do not edit.\n"
        "{{- if .Values.crds.enabled }}\n" + text + "{{- end }}\n"
    )


def write(folder: Path) -> None:
    """All definitions as templates of the chart whose templates lie in `folder`."""
    for kind in KINDS:
        (folder / kind.file).write_text(chart_template(kind))


if __name__ == "__main__":
    write(Path(sys.argv[1]))
