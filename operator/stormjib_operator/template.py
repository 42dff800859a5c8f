"""The schema of the pod template: only what rules or we need is declared, all else of a pod is let through.

A whole pod template would make the definition 450 kB. What is wrong in the rest, the API server says when the first pod
is created, and the condition Scheduled repeats it.
"""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import WithJsonSchema

from stormjib_operator.fields import rule

_CONTAINER = {
    "type": "object",
    "description": "A container as in a pod; every field of a pod's container may be given.",
    "x-kubernetes-preserve-unknown-fields": True,
    "required": ["name"],
    "properties": {
        "name": {"type": "string", "maxLength": 63, "description": "The container's name."},
        "command": {
            "type": "array",
            "maxItems": 256,
            "x-kubernetes-list-type": "atomic",
            "items": {"type": "string", "maxLength": 65536},
            "description": "The entry point; not for the container trainer, which runs launcher.command.",
        },
        "args": {
            "type": "array",
            "maxItems": 256,
            "x-kubernetes-list-type": "atomic",
            "items": {"type": "string", "maxLength": 65536},
            "description": "Arguments of the entry point; not for the container trainer.",
        },
    },
}
_TEMPLATE: dict[str, Any] = {
    "type": "object",
    "required": ["spec"],
    "x-kubernetes-preserve-unknown-fields": True,
    "properties": {
        "metadata": {
            "type": "object",
            "description": "Labels and annotations that every pod of the job gets, beside our own.",
            "properties": {
                key: {
                    "type": "object",
                    "description": f"The {key} of every pod of the job.",
                    "maxProperties": 64,
                    "additionalProperties": {"type": "string", "maxLength": 4096},
                }
                for key in ("labels", "annotations")
            },
        },
        "spec": {
            "type": "object",
            "description": "The pod's specification, as in any pod. The fields that are declared here are checked early.",
            "required": ["containers"],
            "x-kubernetes-preserve-unknown-fields": True,
            "properties": {
                "containers": {
                    "type": "array",
                    "description": "The containers. Exactly one is named trainer: it runs the ranks, and only its end decides.",
                    "minItems": 1,
                    "maxItems": 20,
                    "x-kubernetes-list-type": "atomic",
                    "items": _CONTAINER,
                },
                "restartPolicy": {
                    "type": "string",
                    "enum": ["OnFailure"],
                    "description": "May be left out; a container that was killed is restarted in its pod.",
                },
                "terminationGracePeriodSeconds": {
                    "type": "integer",
                    "format": "int64",
                    "minimum": 10,
                    "maximum": 86400,
                    "description": "How long a pod may take to save and stop when it is told to leave its node.",
                },
                "nodeSelector": {
                    "type": "object",
                    "description": "Labels that a node must have.",
                    "maxProperties": 32,
                    "additionalProperties": {"type": "string", "maxLength": 63},
                },
            },
            "x-kubernetes-validations": [
                rule(
                    "self.containers.filter(c, c.name == 'trainer').size() == 1",
                    "template.spec.containers must hold exactly one container named trainer: "
                    "name the one that trains so, and give every other one a name of its own",
                ),
                rule(
                    "self.containers.all(c, c.name != 'trainer' || (!has(c.command) && !has(c.args)))",
                    "the container trainer must set neither command nor args: "
                    "put what it shall run into launcher.command and launcher.args",
                ),
            ],
        },
    },
}
Template = Annotated[dict[str, Any], WithJsonSchema(_TEMPLATE)]
