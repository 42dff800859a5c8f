"""What every model of the API shares: its base, its bounded types, and how a CEL rule is said."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field
from pydantic.alias_generators import to_camel

MAX_NAME = 40
"""Longest name of a job: children add up to 23 characters, and a Service's name ends at 63."""
MAX_NODES = 4096
MAX_SPARES = 64
MAX_SLOTS = MAX_NODES + MAX_SPARES
MAX_TEXT = 1024


def rule(rule: str, message: str) -> dict[str, str]:
    """One CEL rule of the schema; the message names the fix."""
    return {"rule": rule, "message": message}


def rules(*each: dict[str, str]) -> dict[str, Any]:
    """CEL rules of one object."""
    return {"x-kubernetes-validations": list(each)}


def list_type(kind: str, *keys: str) -> dict[str, Any]:
    """How a list is merged by server-side apply."""
    extra: dict[str, Any] = {"x-kubernetes-list-type": kind}
    return extra | ({"x-kubernetes-list-map-keys": list(keys)} if keys else {})


class Model(BaseModel):
    """Base: camelCase outside, frozen inside, the docstring under a field is its description."""

    model_config = ConfigDict(
        alias_generator=to_camel, populate_by_name=True, frozen=True, use_attribute_docstrings=True
    )


Name = Annotated[str, Field(min_length=1, max_length=253)]
Text = Annotated[str, Field(max_length=MAX_TEXT)]
Count = Annotated[int, Field(ge=0, le=2**31 - 1)]
Step = Annotated[int, Field(ge=-1, le=2**53)]
Time = Annotated[str, Field(max_length=40, json_schema_extra={"format": "date-time"})]
GenerationText = Annotated[str, Field(max_length=41, pattern=r"^[0-9]+\.[0-9]+$")]
Word = Annotated[str, Field(min_length=1, max_length=4096)]
