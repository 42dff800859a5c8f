"""A whole pattern spec, and what puts it on a mesh. Pure."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from stormjib_checkpoint.spec.laying import laid
from stormjib_checkpoint.spec.layout import Layout

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from stormjib_checkpoint.spec.rules import Kind, Place, Rule, Then, Tie, View


@dataclass(frozen=True)
class Spec:
    """How the tensors of a model and its optimizer are made of atoms, and how the ranks of any mesh hold them."""

    axes: tuple[str, ...]
    """All that it speaks of; a mesh may lack some, which then have one rank."""
    sizes: Mapping[str, int]
    rules: tuple[Rule, ...]
    ties: tuple[Tie, ...]
    views: tuple[View, ...]
    place: Place | None
    state: Mapping[str, Kind]
    """How the optimizer's state is held, by its key."""
    then: Then | None

    def on(self, mesh: Mapping[str, int], shapes: Mapping[str, Sequence[int]]) -> Layout:
        """The layout of these atoms on a mesh, whose axes are in the order of its ranks, the last the fastest.

        `shapes` has every atom by its full name: `model.w`, `optim.w.exp_avg`. Raises SpecError.
        """
        return Layout(laid(self, mesh, shapes))
