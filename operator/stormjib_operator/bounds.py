"""The one document that tells the coordinator what it may do on its own."""

from __future__ import annotations

from typing import TYPE_CHECKING

from stormjib_health.verdict import Rule
from stormjib_operator import budget, planning
from stormjib_operator.slots import accused, kept_back, registered
from stormjib_operator.spec import HangAction, RecoveryRule, Spec
from stormjib_runtime.wire import Bounds, Hang

if TYPE_CHECKING:
    from stormjib_operator.models import Status
    from stormjib_operator.observed import Now, Observed


def derive(
    seen: Observed, status: Status, now: Now, *, suspend: bool = False, finish: bool = False
) -> Bounds:
    """Bounds from the spec and from a status that has been written. The version is the shell's."""
    spec = seen.job.spec
    steps, keep = _checkpoint(spec)
    sizes, replicate = _sizes(spec)
    return Bounds(
        version=0,
        incarnation=status.incarnation,
        spec_generation=seen.job.generation,
        replicas=max(sizes, default=spec.nodes.replicas),
        min_replicas=min(sizes, default=spec.nodes.least),
        processes=spec.launcher.processes_per_node,
        slots=registered(seen, status.slots),
        excluded=(*kept_back(seen, status.slots, now), *accused(seen, status)),
        restarts_left=budget.left(seen, status),
        counted_above=budget.newest(status),
        backoff_initial_s=float(spec.recovery.backoff.initial_seconds),
        backoff_max_s=float(spec.recovery.backoff.max_seconds),
        shrink_after_s=float(spec.recovery.shrink.after_seconds),
        hang=_hang(spec),
        rules=tuple(_rule(rule) for rule in spec.recovery.rules),
        interval_steps=steps,
        keep_last=keep,
        suspend=suspend,
        finish=finish,
        sizes=sizes,
        replicate=replicate,
    )


def _sizes(spec: Spec) -> tuple[tuple[int, ...], dict[str, int]]:
    """The sizes that the planner has room for, with the degree of each; those that the user allows where it has no answer.

    A job whose model has room nowhere is never started (`decide`). One that trains already keeps the user's sizes: that it trains
    says more than an estimate.
    """
    found = planning.plan(spec)
    if found is None or not found.fits:
        return tuple(sorted(spec.nodes.allowed_replicas or ())), {}
    degrees = {one.nodes: one.layout.replicate for one in reversed(found.fits)}
    return tuple(degrees), {str(size): degree for size, degree in degrees.items()}


def _checkpoint(spec: Spec) -> tuple[int, int]:
    if spec.checkpoint is None:
        return 0, 1
    return spec.checkpoint.interval.steps or 0, spec.checkpoint.retention.keep_last


def _rule(rule: RecoveryRule) -> Rule:
    return Rule(
        action=rule.action,
        syndromes=rule.syndromes,
        scopes=rule.scopes,
        confirmed=rule.confirmed,
        severity=rule.min_severity_percent / 100,
        strikes=rule.min_strikes,
    )


def _hang(spec: Spec) -> Hang:
    hang = spec.health.hang
    return Hang(hang.factor_percent, float(hang.floor_seconds), hang.action is HangAction.RESTART)
