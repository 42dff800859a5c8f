"""Metrics of the operator, and the small server for them and for the probes.

No label holds a job's name on a counter: jobs come and go, and a counter's series stay.
"""

from __future__ import annotations

from aiohttp import web
from prometheus_client import CONTENT_TYPE_LATEST, Counter, Gauge, Histogram, generate_latest

PASSES = Counter("stormjib_controller_passes_total", "Passes over a job, by how they ended.", ["result"])
PASS_SECONDS = Histogram(
    "stormjib_controller_reconcile_seconds",
    "How long a pass over a job took.",
    buckets=(0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 10),
)
WAITING = Gauge("stormjib_controller_queue_depth", "Jobs that wait for a look.")
STREAMS = Gauge("stormjib_controller_streams", "Coordinators that are listened to.")
ACCUSATIONS = Counter(
    "stormjib_isolation_accusations_total", "Accusations by coordinators, by what became of them.", ["result"]
)
LEADING = Gauge("stormjib_controller_is_leader", "1 while this operator holds the Lease.")


class Endpoint:
    """Serves /metrics, /healthz and /readyz."""

    def __init__(self, port: int) -> None:
        self._port = port
        app = web.Application()
        app.router.add_get("/metrics", self._metrics)
        app.router.add_get("/healthz", self._health)
        app.router.add_get("/readyz", self._health)
        self._runner = web.AppRunner(app, access_log=None)

    async def start(self) -> None:
        """Listen."""
        await self._runner.setup()
        await web.TCPSite(self._runner, None, self._port).start()

    async def stop(self) -> None:
        """Stop listening."""
        await self._runner.cleanup()

    async def _metrics(self, _: web.Request) -> web.Response:
        return web.Response(body=generate_latest(), headers={"Content-Type": CONTENT_TYPE_LATEST})

    async def _health(self, _: web.Request) -> web.Response:
        # That this answers says that the loop turns; everything else that fails ends the process. A standby is ready
        # too: it would take over, and a rollout must not wait for it to lead.
        return web.Response(text="ok")
