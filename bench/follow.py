"""What a running job says, as a person would see it: the log lines of its pods, with the times that the nodes gave them.

Everything runs on one machine, so the times of two pods may be compared here (a rule of the product never does that).
"""

from __future__ import annotations

import json
import re
import threading
from dataclasses import dataclass
from datetime import datetime
from typing import TYPE_CHECKING, Any

from kubernetes import client, config, watch
from kubernetes.client.exceptions import ApiException
from urllib3.exceptions import HTTPError

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

JOB_LABEL = "stormjib.io/job"


@dataclass(frozen=True)
class Step:
    """One training step as rank 0 printed it. `at` is seconds since the epoch."""

    at: float
    step: int
    loss: float
    tokens_per_s: float
    time_ms: float
    generation: str
    world: int


@dataclass(frozen=True)
class Line:
    """One log line of one pod."""

    at: float
    pod: str
    text: str


class Follower:
    """Follows the logs of every pod of one job, also of pods that come later. Threads end with the process."""

    def __init__(self, kubeconfig: Path, namespace: str, job: str) -> None:
        self._api = client.CoreV1Api(config.new_client_from_config(str(kubeconfig)))
        self._namespace, self._job = namespace, job
        self._seen: set[str] = set()
        self._changed = threading.Condition()
        self._stop = threading.Event()
        self.steps: list[Step] = []
        self.lines: list[Line] = []
        threading.Thread(target=self._watch_pods, daemon=True).start()

    def close(self) -> None:
        """Stop following. A read that is blocked ends at its next line, or with the process."""
        self._stop.set()

    def wait(self, found: Callable[[], Any], seconds: float, what: str) -> Any:
        """The first true value of `found()`, asked again after every new line. Raises TimeoutError naming `what`."""
        with self._changed:
            if not self._changed.wait_for(found, timeout=seconds):
                last = "\n".join(f"  {line.pod}: {line.text}" for line in self.lines[-15:])
                raise TimeoutError(f"not seen within {seconds:.0f} s: {what}. The last lines were:\n{last}")
            return found()

    def wait_step(self, step: int, seconds: float) -> Step:
        """The first record of a step at or above `step`."""
        found: Step = self.wait(
            lambda: next((s for s in reversed(self.steps) if s.step >= step), None), seconds, f"step {step}"
        )
        return found

    def first_step_after(self, at: float, seconds: float, *, newer_than: str | None = None) -> Step:
        """The first step finished after `at`; with `newer_than`, of another generation than that."""

        def found() -> Step | None:
            return next(
                (s for s in self.steps if s.at > at and (newer_than is None or s.generation != newer_than)),
                None,
            )

        step: Step = self.wait(found, seconds, "a step after the fault")
        return step

    @property
    def latest(self) -> Step | None:
        """The newest step, or None before the first."""
        return self.steps[-1] if self.steps else None

    def _watch_pods(self) -> None:
        while not self._stop.is_set():
            try:
                stream = watch.Watch().stream(
                    self._api.list_namespaced_pod,
                    self._namespace,
                    label_selector=f"{JOB_LABEL}={self._job}",
                    timeout_seconds=60,
                )
                for event in stream:
                    self._follow_once(event["object"])
            except (ApiException, HTTPError):
                self._stop.wait(0.5)

    def _follow_once(self, pod: Any) -> None:
        started = any(s.state.running or s.state.terminated for s in pod.status.container_statuses or [])
        if started and pod.metadata.uid not in self._seen:
            self._seen.add(pod.metadata.uid)
            threading.Thread(target=self._read, args=(pod.metadata.name,), daemon=True).start()

    def _read(self, pod: str) -> None:
        """Read one pod's log to its end; a container that restarts begins a new log, so ask again from there on."""
        since: datetime | None = None
        while not self._stop.is_set():
            try:
                response: Any = self._api.read_namespaced_pod_log(
                    pod, self._namespace, follow=True, timestamps=True, _preload_content=False
                )
                for raw in response:
                    since = self._take(pod, raw.decode(errors="replace").rstrip("\n"), since)
            except ApiException as error:
                if error.status == 404:
                    return
            except HTTPError:
                pass
            self._stop.wait(0.3)

    def _take(self, pod: str, raw: str, since: datetime | None) -> datetime | None:
        stamp, _, text = raw.partition(" ")
        at = _time(stamp)
        if at is None or (since is not None and at <= since):
            return since
        with self._changed:
            self.lines.append(Line(at.timestamp(), pod, text))
            step = parse_step(at.timestamp(), text)
            if step is not None:
                self.steps.append(step)
            self._changed.notify_all()
        return at


def parse_step(at: float, text: str) -> Step | None:
    """The step record in a line such as `[0] {"step": 3, "loss": 5.1, ...}`, or None. torchrun writes no `[0]`."""
    match = re.match(r"(?:\[\d+\] )?(\{.*\})$", text)
    if not match:
        return None
    try:
        record = json.loads(match[1])
    except ValueError:
        return None
    if "step" not in record or "loss" not in record:
        return None
    return Step(
        at,
        record["step"],
        record["loss"],
        record["tokens_per_s"],
        record["time_ms"],
        str(record["generation"]),
        record["world"],
    )


def _time(stamp: str) -> datetime | None:
    """RFC 3339 with nanoseconds; Python reads six digits."""
    try:
        return datetime.fromisoformat(re.sub(r"(\.\d{6})\d*", r"\1", stamp))
    except ValueError:
        return None
