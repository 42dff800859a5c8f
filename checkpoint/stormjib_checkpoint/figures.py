"""An engine's figures for Prometheus, in a script of one's own. Needs `prometheus_client`, which the library does without."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily

if TYPE_CHECKING:
    from collections.abc import Iterator

    from prometheus_client.core import Metric

    from stormjib_checkpoint.engine import Engine

_PREFIX = "stormjib_checkpoint_"


def collector(engine: Engine) -> Any:
    """For `prometheus_client.REGISTRY.register`: what this rank's saves cost, by the names of docs/metrics.md."""
    return _Collector(engine)


class _Collector:
    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    def collect(self) -> Iterator[Metric]:
        sums = self._engine.totals.now()
        yield _counter("saves", "Parts of steps that have become durable.", sums.saves)
        yield _counter("failures", "Parts of steps that could not be saved.", sums.failures)
        yield _counter("lost_seconds", "Training time lost in calls and waits.", sums.lost_s)
        yield _counter("bytes", "Bytes of the parts that have become durable.", sums.bytes)
        yield _gauge("in_flight", "Saves that are on their way.", sums.in_flight)
        if sums.age_s is None:
            return
        yield _gauge("age_seconds", "Since the newest save became durable.", sums.age_s)
        stages = GaugeMetricFamily(
            f"{_PREFIX}duration_seconds", "What the newest save took, by stage.", labels=["stage"]
        )
        last = sums.last
        for stage, seconds in (
            ("call", last.call_s),
            ("wait", last.waited_s),
            ("staged", last.staged_s),
            ("durable", last.durable_s),
        ):
            stages.add_metric([stage], seconds)
        yield stages


def _counter(name: str, text: str, value: float) -> Metric:
    return CounterMetricFamily(f"{_PREFIX}{name}", text, value=value)


def _gauge(name: str, text: str, value: float) -> Metric:
    return GaugeMetricFamily(f"{_PREFIX}{name}", text, value=value)
