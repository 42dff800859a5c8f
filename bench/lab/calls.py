"""What the laboratory asks of its coordinator, as the operator would: bounds in, state out."""

from __future__ import annotations

import http.client
import threading
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

from bench.lab.network import COORDINATOR_ADDRESS, connect
from stormjib_fault.words import FaultError
from stormjib_runtime.codec import decode, encode
from stormjib_runtime.coordinator import PORT
from stormjib_runtime.wire import JobState

if TYPE_CHECKING:
    from collections.abc import Callable

    from stormjib_health.verdict import Verdict
    from stormjib_runtime.wire import Bounds

CALL_S = 5.0
RETRY_S = 0.02
OPERATOR_TOKEN = "laboratory-operator"
AGENT_TOKEN = "laboratory-agent"


class Unreachable(FaultError):
    """The coordinator does not answer, or refuses; the text says which."""


class Refusal(Unreachable):
    """It answers, and refuses."""


class Line:
    """One connection to the coordinator, made anew when it breaks. For one thread."""

    def __init__(self, netns: str) -> None:
        self._netns = netns
        self._http: http.client.HTTPConnection | None = None

    def call(self, method: str, path: str, body: bytes | None = None) -> JobState:
        """The state that comes back. Raises Unreachable."""
        kept = self._http is not None
        try:
            return self._ask(method, path, body)
        except Refusal:
            raise
        except Unreachable:
            if not kept:
                raise
        return self._ask(method, path, body)  # the server had closed the line; every call may be repeated

    def _ask(self, method: str, path: str, body: bytes | None) -> JobState:
        try:
            connection = self._http or self._open()
            headers = {"Authorization": f"Bearer {OPERATOR_TOKEN}", "Content-Type": "application/json"}
            connection.request(method, path, body, headers)
            answer = connection.getresponse()
            data = answer.read()
        except (OSError, http.client.HTTPException) as error:
            self.close()
            raise Unreachable(f"{method} {path}: {error}") from error
        if answer.status != http.client.OK:
            raise Refusal(f"{method} {path}: {answer.status} {data[:200]!r}")
        return decode(JobState, data)

    def state(self, after: int = -1) -> JobState:
        """The state, at once or when it differs from version `after` (a second at the most)."""
        return self.call("GET", "/v1/state" + (f"?after={after}" if after >= 0 else ""))

    def put(self, bounds: Bounds) -> JobState:
        """Give the coordinator its bounds."""
        return self.call("PUT", "/v1/bounds", encode(bounds))

    def close(self) -> None:
        """Hang up."""
        if self._http is not None:
            self._http.close()
            self._http = None

    def _open(self) -> http.client.HTTPConnection:
        connection = http.client.HTTPConnection(COORDINATOR_ADDRESS, PORT, timeout=CALL_S)
        connection.sock = connect(self._netns, COORDINATOR_ADDRESS, PORT, CALL_S)
        self._http = connection
        return connection


@dataclass(frozen=True)
class Sight:
    """A verdict as it was first seen, on the laboratory's own monotonic clock."""

    at: float
    verdict: Verdict


class Watcher:
    """Follows the state by long polls in a thread of its own, and notes when each verdict came into sight."""

    def __init__(self, netns: str) -> None:
        self.latest: JobState | None = None
        self._line = Line(netns)
        self._news = threading.Condition()
        self._sights: list[Sight] = []
        self._over = False
        self._thread = threading.Thread(target=self._follow, daemon=True)
        self._thread.start()

    def sights(self, since: float) -> list[Sight]:
        """Verdicts that came into sight after a moment, oldest first."""
        with self._news:
            return [sight for sight in self._sights if sight.at > since]

    def until(self, holds: Callable[[JobState], bool], limit_s: float) -> JobState:
        """The state as soon as it holds. Raises Unreachable after `limit_s`."""
        with self._news:
            if not self._news.wait_for(lambda: self.latest is not None and holds(self.latest), limit_s):
                raise Unreachable(f"waited {limit_s:.0f} s in vain; state: {self.latest}")
            assert self.latest is not None
            return self.latest

    def wait_verdict(self, since: float, limit_s: float) -> Sight | None:
        """The first verdict that comes into sight after a moment, or None after `limit_s`."""
        with self._news:
            self._news.wait_for(lambda: any(s.at > since for s in self._sights), limit_s)
            return next((sight for sight in self._sights if sight.at > since), None)

    def close(self) -> None:
        """Stop following."""
        self._over = True
        self._thread.join()
        self._line.close()

    def _follow(self) -> None:
        seen: set[Verdict] = set()
        version = -1
        while not self._over:
            try:
                state = self._line.state(version)
            except Unreachable:
                version = -1  # another coordinator counts from another number
                time.sleep(RETRY_S)
                continue
            now = time.monotonic()
            version = state.version
            with self._news:
                self.latest = state
                self._sights += [Sight(now, verdict) for verdict in state.verdicts if verdict not in seen]
                seen = set(state.verdicts)
                self._news.notify_all()
