"""How ranks share a model, and how much memory that takes: the part of the layout planner that is plain arithmetic."""

from __future__ import annotations

from dataclasses import dataclass
from math import ceil
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Iterator

OPTIMIZER_BYTES = 12
"""Of each parameter: a master weight and the two moments of Adam, four bytes each."""
SLACK = 0.10
"""What allocators and communication take on top, as a share."""
GATHERED_LAYERS = 2
"""Of sharded weights: the layer that is computed and the one that is fetched meanwhile are whole."""


class Layout(NamedTuple):
    """How ranks share a model: `pp` stages of `tp` ranks, their state cut into `shard` parts, and all that `replicate` times."""

    pp: int = 1
    replicate: int = 1
    shard: int = 1
    tp: int = 1

    @property
    def world(self) -> int:
        return self.pp * self.replicate * self.shard * self.tp

    @property
    def data(self) -> int:
        """On how many parts the batch is spread."""
        return self.replicate * self.shard

    def __str__(self) -> str:
        return f"pp{self.pp}.dp{self.replicate}.fsdp{self.shard}.tp{self.tp}"


@dataclass(frozen=True)
class Model:
    """What is trained. Bytes count one parameter; the optimizer takes `OPTIMIZER_BYTES` beside them."""

    parameters: int
    layers: int
    heads: int
    weight_bytes: int = 4
    gradient_bytes: int = 4
    activation_bytes: int = 0
    """Of one micro-batch in the whole model."""
    micro_batches: int = 1
    """Logical ones in a step: their number does not depend on the layout."""
    uneven_heads: bool = False
    """Whether tensor ranks may hold different numbers of heads."""

    @property
    def stored_bytes(self) -> int:
        """What another layout must find again: weights and optimizer."""
        return self.parameters * (self.weight_bytes + OPTIMIZER_BYTES)


def with_copies(world: int, pp: int, tp: int, replicate: int) -> Iterator[Layout]:
    """The layouts of `world` ranks, those with the most copies of each shard first: all that divide the data ranks, up to `replicate`."""
    data = world // (pp * tp)
    for copies in range(min(replicate, data), 0, -1):
        if data % copies == 0:
            yield Layout(pp, copies, data // copies, tp)


def memory_bytes(model: Model, layout: Layout) -> int:
    """Of the fullest rank: its share of the state, the gathered layers, activations, and slack."""
    stage = ceil(model.layers / layout.pp) / model.layers
    heads = ceil(model.heads / layout.tp) / model.heads
    held = model.parameters * stage * heads
    state = held * (model.weight_bytes + model.gradient_bytes + OPTIMIZER_BYTES) / layout.shard
    gathered = 0.0
    if layout.shard > 1:
        gathered = GATHERED_LAYERS * model.parameters / model.layers * heads * model.weight_bytes
    # A stage has as many micro-batches under way as there are stages, and of each its own part of the layers.
    activations = model.activation_bytes * heads
    return ceil((state + gathered + activations) * (1 + SLACK))
