"""Pipeline stages: which of them has which tensor. Pure."""

from __future__ import annotations

from typing import TYPE_CHECKING

from stormjib_checkpoint.errors import SpecError
from stormjib_checkpoint.spec.globs import bound, compiled
from stormjib_checkpoint.spec.shares import stretch

if TYPE_CHECKING:
    from collections.abc import Iterable

    from stormjib_checkpoint.spec.rules import Place


class Stages:
    """The stages of a mesh, for the tensors whose bare names are these."""

    def __init__(self, place: Place | None, count: int, names: Iterable[str]) -> None:
        """Raises SpecError where a pattern matches nothing, or the layers do not come out even with what the spec says."""
        self._place, self._every = place, tuple(range(count))
        self._stage_of: list[int] = []
        if place is None:
            return
        names = list(names)
        for pattern in (place.layers, *place.first, *place.last):
            if not any(compiled(pattern).fullmatch(name) for name in names):
                raise SpecError(
                    f"place: {pattern!r} is unused: no tensor is called so; take it out, or mend it"
                )
        layers = 1 + max(number for name in names if (number := _layer(place, name)) is not None)
        chunks = count * place.chunks
        dealt_out = (stretch(layers, chunks, chunk, "front") for chunk in range(chunks))
        counts = place.counts or [end - start for start, end in dealt_out]
        if len(counts) != chunks or sum(counts) != layers:
            raise SpecError(
                f"place.counts are {list(counts)}, which is {sum(counts)} layers in {len(counts)} chunks; there are {layers} layers, "
                f"and {chunks} chunks on {count} stages"
            )
        self._stage_of = [chunk % count for chunk, size in enumerate(counts) for _ in range(size)]

    def of(self, name: str) -> tuple[int, ...]:
        """The stages that have a tensor. Raises SpecError where the spec says two things."""
        if self._place is None:
            return self._every
        found = set()
        number = _layer(self._place, name)
        if number is not None:
            found.add(self._stage_of[number])
        for patterns, stage in ((self._place.first, self._every[0]), (self._place.last, self._every[-1])):
            if any(compiled(pattern).fullmatch(name) for pattern in patterns):
                found.add(stage)
        return tuple(sorted(found)) or self._every


def _layer(place: Place, name: str) -> int | None:
    binding = bound(place.layers, name)
    if binding is None:
        return None
    if not binding["i"].isdecimal():
        raise SpecError(f"place: the layer of {name} is {binding['i']!r}; wanted a number")
    return int(binding["i"])
