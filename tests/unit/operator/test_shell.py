"""Small parts of the shell: settings, tokens, events, what may be imported."""

from __future__ import annotations

import subprocess
import sys

import pytest

from fakes.cluster import FakeCluster
from fakes.job import job, now
from stormjib_operator import see, settings, tokens
from stormjib_operator.errors import SettingsError
from stormjib_operator.events import Recorder, about_job
from stormjib_operator.observed import Event, Problem

ENV = {"POD_NAME": "p", "POD_NAMESPACE": "ns", "STORMJIB_RUNTIME_IMAGE": "i:1"}


def test_settings_come_from_the_environment() -> None:
    more = {
        "STORMJIB_RUN_AS_USER": "7",
        "STORMJIB_NAMESPACES": "a,b",
        "STORMJIB_MONITORING_NAMESPACE": '{"a": "b"}',
        "STORMJIB_PULL_SECRETS": "s",
    }
    read = settings.from_environment(ENV | more)
    assert (read.identity, read.namespace, read.watched, read.port) == ("p", "ns", ("a", "b"), 8080)
    assert (read.render.run_as_user, read.render.pull_secrets) == (7, ("s",))
    assert read.render.monitoring_labels == {"a": "b"}
    assert settings.from_environment(ENV).render.run_as_user is None


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"POD_NAME": ""}, "POD_NAME"),
        ({"STORMJIB_PORT": "http"}, "STORMJIB_PORT"),
        ({"STORMJIB_RUN_AS_USER": "root"}, "STORMJIB_RUN_AS_USER"),
        ({"STORMJIB_MONITORING_NAMESPACE": "[1]"}, "STORMJIB_MONITORING_NAMESPACE"),
        ({"STORMJIB_MONITORING_NAMESPACE": "{"}, "STORMJIB_MONITORING_NAMESPACE"),
    ],
)
def test_a_wrong_setting_is_named(change: dict[str, str], named: str) -> None:
    with pytest.raises(SettingsError, match=named):
        settings.from_environment(ENV | change)


async def test_the_key_is_made_once_and_tokens_follow_from_it() -> None:
    cluster = FakeCluster()
    key = await tokens.ensure_key(cluster, "ns")
    assert len(key) == 32
    assert await tokens.ensure_key(cluster, "ns") == key
    one, other = tokens.derive(key, "uid-1"), tokens.derive(key, "uid-2")
    assert len({one.agent, one.operator, other.agent, other.operator}) == 4
    assert one == tokens.derive(key, "uid-1")


def test_a_token_is_the_hmac_of_uid_and_role() -> None:
    import hashlib
    import hmac

    wanted = hmac.new(b"k", b"uid/agent", hashlib.sha256).hexdigest()
    assert tokens.derive(b"k", "uid").agent == wanted


async def test_an_event_that_keeps_coming_is_counted_up_once_a_minute() -> None:
    cluster = FakeCluster()
    recorder = Recorder(cluster)
    for second in range(0, 150, 10):
        await recorder.record(about_job(job()), Event("Busy", "words", warning=True), now(second))
    (event,) = [m for (kind, _, _), m in cluster.objects.items() if kind == "Event"]
    assert (event["type"], event["count"], event["involvedObject"]["uid"]) == ("Warning", 3, job().uid)


def pod(**status: object) -> dict[str, object]:
    """A pod of the API with this status."""
    return {"metadata": {"name": "p", "uid": "u"}, "spec": {}, "status": status}


WAITING = {"reason": "ImagePullBackOff", "message": 'Back-off pulling image "no/such:1"'}
CRASHED = {"reason": "CrashLoopBackOff", "message": "back-off"}


@pytest.mark.parametrize(
    ("status", "problem"),
    [
        ({}, None),
        (
            {
                "conditions": [
                    {"type": "PodScheduled", "status": "False", "reason": "Unschedulable", "message": "no"}
                ]
            },
            Problem("Unschedulable", "no"),
        ),
        (
            {"initContainerStatuses": [{"name": "i", "state": {"waiting": WAITING}}]},
            Problem("ImagePullBackOff", 'container i: Back-off pulling image "no/such:1"'),
        ),
        (
            {
                "containerStatuses": [
                    {"name": "t", "state": {"waiting": CRASHED}, "lastState": {"terminated": {"exitCode": 3}}}
                ]
            },
            Problem("CrashLoopBackOff", "container t: back-off; it last ended with exit code 3"),
        ),
        ({"containerStatuses": [{"name": "t", "state": {"waiting": {"reason": "ContainerCreating"}}}]}, None),
        (
            {"phase": "Failed", "reason": "Evicted", "message": "low on memory"},
            Problem("Evicted", "low on memory"),
        ),
    ],
)
def test_why_a_pod_does_not_run(status: dict[str, object], problem: Problem | None) -> None:
    assert see.see_pod(pod(**status)).problem == problem


def test_the_operator_imports_without_torch_and_its_core_without_a_client() -> None:
    block = "for n in ('torch', 'numpy'): sys.modules[n] = None"
    core = "for n in ('kubernetes', 'kopf', 'aiohttp', 'torch'): sys.modules[n] = None"
    for code in (f"{block}\nimport stormjib_operator.__main__", f"{core}\nimport stormjib_operator.decide"):
        done = subprocess.run(
            [sys.executable, "-c", f"import sys\n{code}"],
            check=False,
            capture_output=True,
            text=True,
            timeout=50,
        )
        assert done.returncode == 0, done.stderr
