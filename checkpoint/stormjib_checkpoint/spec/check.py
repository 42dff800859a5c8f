"""Whether a layout is one: every atom is stored exactly once, and every copy counted. Pure."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING

from stormjib_checkpoint.boxes import flaw, intersect
from stormjib_checkpoint.errors import SpecError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from stormjib_checkpoint.boxes import Box
    from stormjib_checkpoint.spec.layout import Layout, Patch


def check(layout: Layout) -> None:
    """Raises SpecError, which names the atom, its shape and its rule."""
    held: dict[str, list[tuple[int, Patch]]] = {atom: [] for atom in layout.atoms}
    for rank in range(layout.world):
        for local in layout.rank(rank).values():
            for patch in local.patches:
                held[patch.atom].append((rank, patch))
    for atom, patches in held.items():
        problem = _problem(layout.atoms[atom], patches)
        if problem is not None:
            raise SpecError(
                f"{layout.rule_of(atom)}, {atom} of shape {list(layout.atoms[atom])} on a mesh of {dict(layout.laid.mesh)}: "
                f"{problem}; mend the rule, or the mesh"
            )


def _problem(shape: Sequence[int], patches: Sequence[tuple[int, Patch]]) -> str | None:
    why = flaw(shape, [patch.box for _, patch in patches if patch.primary])
    if why is not None:
        return f"its primary copies are not the whole once: {why}"
    said = {(patch.box, patch.copies) for _, patch in patches}
    counted = Counter(box for _, box in {(rank, patch.box) for rank, patch in patches})
    for box, copies in said:
        there = sum(_shared(box, other) * times for other, times in counted.items())
        if there != copies * box.volume:
            return f"{copies} copies are said of {box}, and {there} of its {box.volume} elements are there"
    return None


def _shared(one: Box, other: Box) -> int:
    both = intersect(one, other)
    return both.volume if both is not None else 0
