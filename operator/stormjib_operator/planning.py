"""On which of the allowed numbers of nodes the model of a job has room, and with how many copies of each shard."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from stormjib_checkpoint.layouts import Fit, Limits, Machine, Rejected, fitting, size_text
from stormjib_checkpoint.sizing import Model

if TYPE_CHECKING:
    from stormjib_operator.spec import Spec


class Plan(NamedTuple):
    """The planner's answer, largest sizes first."""

    fits: tuple[Fit, ...]
    rejected: tuple[Rejected, ...]

    @property
    def text(self) -> str:
        """Every allowed size with its layout, or with the reason against it; reasons first, because a condition has an end."""
        against = [f"not {_nodes(one.nodes)}: {one.reason}" for one in self.rejected]
        return "; ".join([*against, *(_fit(one) for one in self.fits)])


def plan(spec: Spec) -> Plan | None:
    """What the planner says of every allowed size, all nodes alike; None where the spec says nothing of its model."""
    if spec.model is None:
        return None
    model = Model(spec.model.parameters, spec.model.layers, heads=1)  # no tensor degree, so no head is cut
    machine = Machine(spec.model.memory_bytes)
    limits = Limits(spec.nodes.sizes, replicate=spec.model.replicate)
    return Plan(*fitting(model, machine, limits, [spec.launcher.processes_per_node] * spec.nodes.replicas))


def _fit(one: Fit) -> str:
    layout = one.layout
    return (
        f"{_nodes(one.nodes)}: dp{layout.replicate}.fsdp{layout.shard}, {size_text(one.memory_bytes)} a rank"
    )


def _nodes(count: int) -> str:
    return f"{count} node" if count == 1 else f"{count} nodes"
