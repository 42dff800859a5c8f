"""The operator's settings, read from the environment once at the start. The chart's values fill it."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from stormjib_operator.errors import SettingsError
from stormjib_operator.observed import Render

if TYPE_CHECKING:
    from collections.abc import Mapping


@dataclass(frozen=True)
class Settings:
    """Everything that may differ between two installations."""

    render: Render
    """What goes into the pods of jobs."""
    namespace: str
    """The operator's own namespace: its Lease and its key live there."""
    identity: str
    """Who holds the Lease: the pod's name, so that a restarted container takes its own Lease at once."""
    port: int = 8080
    """Where /metrics, /healthz and /readyz are served."""
    workers: int = 16
    """Jobs that are looked at side by side."""
    watched: tuple[str, ...] = field(default=())
    """Namespaces that are served; none named is all of them."""
    isolation: bool = False
    """Whether there is an isolator: evidence against nodes is written down for it."""


def from_environment(env: Mapping[str, str] = os.environ) -> Settings:
    """The settings. Raises SettingsError naming what is missing or wrong."""
    namespace = _required(env, "POD_NAMESPACE")
    user = env.get("STORMJIB_RUN_AS_USER", "")
    render = Render(
        image=_required(env, "STORMJIB_RUNTIME_IMAGE"),
        pull_policy=env.get("STORMJIB_RUNTIME_PULL_POLICY", "IfNotPresent"),
        pull_secrets=_words(env, "STORMJIB_PULL_SECRETS"),
        run_as_user=_whole(env, "STORMJIB_RUN_AS_USER") if user else None,
        operator_namespace=namespace,
        monitoring_labels=_labels(env, "STORMJIB_MONITORING_NAMESPACE"),
    )
    return Settings(
        render=render,
        namespace=namespace,
        identity=_required(env, "POD_NAME"),
        port=_whole(env, "STORMJIB_PORT", "8080"),
        watched=_words(env, "STORMJIB_NAMESPACES"),
        isolation=env.get("STORMJIB_ISOLATION", "") == "true",
    )


def _required(env: Mapping[str, str], name: str) -> str:
    value = env.get(name, "")
    if not value:
        raise SettingsError(f"{name} is not set; the chart's Deployment sets it")
    return value


def _words(env: Mapping[str, str], name: str) -> tuple[str, ...]:
    return tuple(word for word in env.get(name, "").split(",") if word)


def _whole(env: Mapping[str, str], name: str, default: str = "") -> int:
    text = env.get(name, default)
    if not text.isdecimal():
        raise SettingsError(f"{name} is {text!r}; wanted a whole number")
    return int(text)


def _labels(env: Mapping[str, str], name: str) -> Mapping[str, str] | None:
    text = env.get(name, "")
    if not text:
        return None
    try:
        labels = json.loads(text)
    except ValueError as error:
        raise SettingsError(f"{name} is {text!r}; wanted a JSON object of labels") from error
    if not isinstance(labels, dict) or not all(isinstance(value, str) for value in labels.values()):
        raise SettingsError(f"{name} is {text!r}; wanted a JSON object of labels")
    return labels
