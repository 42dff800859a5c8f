"""A pattern spec as frozen records: how the tensors of a layout are made of atoms, and how its ranks hold them. Pure.

Sizes may be numbers, names (of the spec's `sizes` or of mesh axes), or lists of them, which are multiplied.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from stormjib_checkpoint.spec.globs import variables

if TYPE_CHECKING:
    from stormjib_checkpoint.spec.shares import Uneven

Size = tuple[int | str, ...]
"""A product."""

PARTS = "parts"
"""Written where a cut names a dimension: the one that the rule's `parts` are along, each part by itself."""


@dataclass(frozen=True)
class Cut:
    """One mesh axis along one dimension of a tensor, as earlier cuts have left it."""

    over: str
    dim: int | Literal["parts"]
    uneven: Uneven = "ceil"
    unit: Size = (1,)
    """Elements that stay together, such as those of a head; for parts each one has its own."""
    cover: Size | None = None
    """So many other things are dealt out, and each rank holds the units that its own need (key-value heads by query heads)."""


@dataclass(frozen=True)
class Parts:
    """A dimension that several tensors share, one behind the other: query, key and value, or gate and up."""

    dim: int
    of: tuple[Size, ...]
    """Their lengths, in any measure: only how they compare counts."""
    unit: tuple[Size, ...]
    """As `Cut.unit`, of each."""


@dataclass(frozen=True)
class Pad:
    """The tensor is longer than the atom along a dimension: its length is rounded up."""

    dim: int
    to: Size


@dataclass(frozen=True)
class Then:
    """What is done last, to what the cuts have left: cut once more along a dimension (`fsdp`), or flat (`zero`)."""

    kind: Literal["fsdp", "zero"]
    over: tuple[str, ...]
    """Mesh axes, taken as one, the last the fastest."""
    weights: bool
    """Whether weights are cut too, or the optimizer's state alone (ZeRO-1)."""
    dim: int = 0
    """Of `fsdp`."""
    buffer: str = ""
    """Of `zero`: the name of the one tensor that holds all; empty where each is flat by itself."""


@dataclass(frozen=True)
class Rule:
    """How the tensors whose names match are held. An axis that nothing is said of has copies."""

    match: str
    cuts: tuple[Cut, ...] = ()
    parts: Parts | None = None
    pad: Pad | None = None
    whole: tuple[str, ...] = ()
    """`replicate`: axes that are not cut over, whatever comes last."""
    partial: str = ""
    """The axis on whose ranks each has values of its own. Their union is the mean."""
    cast: str | None = None
    """Type of the weights on the ranks, where it may differ from what is stored."""
    then: Then | None = None
    """In place of the spec's own."""


@dataclass(frozen=True)
class Tie:
    """Another name of a tensor: the same atom, with placements of its own."""

    name: str
    of: str


@dataclass(frozen=True)
class View:
    """A tensor of the layout that is made of other atoms, or goes by another name.

    A variable that stands in `of` alone counts tensors that are put together: along `dim`, or on a new dimension in front. One that stands
    in `to` alone counts the slices that a tensor is taken apart into.
    """

    to: str
    of: tuple[str, ...]
    dim: int | None = None
    groups: Size | None = None
    """Joined group by group: queries, key and value of one head group, then those of the next."""
    rope: Size | None = None
    """Of so many heads, each has its rows from pairs side by side to halves."""

    @property
    def counted(self) -> frozenset[str]:
        """The variable that counts tensors which are put together, if there is one."""
        return variables(self.of[0]) - variables(self.to)

    @property
    def slices(self) -> frozenset[str]:
        """The variable that counts slices, if there is one."""
        return variables(self.to) - variables(self.of[0])


@dataclass(frozen=True)
class Place:
    """Pipeline stages: which tensors which of them has. What nothing is said of is on all."""

    over: str
    layers: str
    """A pattern with the number of the layer as `{i}`."""
    counts: tuple[int, ...] | None
    """Layers of each chunk; None: alike, the first ones longer."""
    chunks: int
    """Of each stage: chunk c is on stage c mod stages."""
    first: tuple[str, ...]
    last: tuple[str, ...]


Kind = Literal["like", "scalar", "matrix"]
"""`like`: held as its parameter is, but for dimensions in which it has one element only (factored states). `scalar`: whole, with all who have
the parameter. `matrix`: never cut; where the state is shared out, one rank has the whole."""
