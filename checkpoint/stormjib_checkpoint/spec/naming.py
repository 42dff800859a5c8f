"""Which tensors a layout has: names of atoms on one side, names of the ranks' own tensors on the other. Pure."""

from __future__ import annotations

from dataclasses import dataclass
from math import prod
from typing import TYPE_CHECKING, NamedTuple

from stormjib_checkpoint.errors import SpecError
from stormjib_checkpoint.spec.globs import bound, filled, variables

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from stormjib_checkpoint.spec.rules import Size, Tie, View

Shape = tuple[int, ...]
MODEL, OPTIM = "model.", "optim."


class Family(NamedTuple):
    """The tensors that have one for each parameter at most: the weights themselves, or one key of the optimizer's state."""

    prefix: str
    key: str

    @property
    def is_state(self) -> bool:
        return bool(self.key)

    def name(self, bare: str) -> str:
        """The full name."""
        return f"{self.prefix}{bare}.{self.key}" if self.key else f"{self.prefix}{bare}"


@dataclass(frozen=True)
class Source:
    """A tensor of the layout, by its bare name, and the atoms that it is made of."""

    bare: str
    of: tuple[str, ...]
    view: View | None = None
    number: int | None = None
    """Of the slice that it is, where an atom is taken apart."""
    tie: str = ""
    """The tensor that it is another name of."""


def families(shapes: Mapping[str, Sequence[int]]) -> dict[Family, dict[str, Shape]]:
    """The atoms by family and bare name, in their order."""
    found: dict[Family, dict[str, Shape]] = {}
    for name, shape in shapes.items():
        family, bare = _split(name)
        found.setdefault(family, {})[bare] = tuple(shape)
    return found


def _split(name: str) -> tuple[Family, str]:
    if name.startswith(MODEL):
        return Family(MODEL, ""), name.removeprefix(MODEL)
    if name.startswith(OPTIM):
        bare, _, key = name.removeprefix(OPTIM).rpartition(".")
        return Family(OPTIM, key), bare
    return Family("", ""), name


def sources(views: Sequence[View], ties: Sequence[Tie], weights: Mapping[str, Shape]) -> list[Source]:
    """The tensors of a layout whose weights are these atoms. Raises SpecError."""
    used: dict[str, View] = {}
    found = [source for view in views for source in _viewed(view, weights, used)]
    found += [Source(name, (name,)) for name in weights if name not in used]
    known: dict[str, Source] = {}
    for source in found:
        if known.setdefault(source.bare, source) is not source:
            raise SpecError(f"two views make a tensor {source.bare}; rename one of them")
    for tie in ties:
        if tie.of not in known or tie.name in known:
            why = f"there is no {tie.of}" if tie.of not in known else "it is an atom of its own; leave it out"
            raise SpecError(f"rule {tie.name!r}: it is tied to {tie.of}, and {why}")
        own = known[tie.of]
        found.append(Source(tie.name, own.of, own.view, own.number, tie.of))
    return found


def _viewed(view: View, weights: Mapping[str, Shape], used: dict[str, View]) -> Iterator[Source]:
    ours = variables(view.to)
    members: dict[tuple[str, ...], list[list[str]]] = {}
    for number, pattern in enumerate(view.of):
        for name in weights:
            binding = bound(pattern, name)
            if binding is None:
                continue
            if used.setdefault(name, view) is not view:
                raise SpecError(
                    f"{name} is part of two views, {used[name].to!r} and {view.to!r}; it can be in one"
                )
            key = tuple(binding[one] for one in sorted(ours & binding.keys()))
            members.setdefault(key, [[] for _ in view.of])[number].append(name)
    if not members:
        raise SpecError(
            f"view {view.to!r} is unused: no atom is called {view.of[0]!r}; take it out, or mend it"
        )
    for key, lists in members.items():
        yield from _put_together(
            view, dict(zip(sorted(ours & variables(view.of[0])), key, strict=True)), lists, weights
        )


def _put_together(
    view: View, binding: dict[str, str], lists: list[list[str]], weights: Mapping[str, Shape]
) -> Iterator[Source]:
    if any(len(one) != len(lists[0]) for one in lists) or not lists[0]:
        raise SpecError(f"view {filled_as_far(view.to, binding)!r}: of {', '.join(view.of)} some are missing")
    for name in view.counted:
        lists = [sorted(one, key=lambda n: _place(view.of[i], name, n)) for i, one in enumerate(lists)]
    of = tuple(name for row in zip(*lists, strict=True) for name in row)
    if not view.slices:
        yield Source(filled(view.to, binding), of, view)
        return
    (name,) = view.slices
    for number in range(weights[of[0]][0] if weights[of[0]] else 0):
        yield Source(filled(view.to, {**binding, name: str(number)}), of, view, number)


def filled_as_far(pattern: str, binding: Mapping[str, str]) -> str:
    """A pattern with those variables put in that are known."""
    for name, value in binding.items():
        pattern = pattern.replace(f"{{{name}}}", value)
    return pattern


def _place(pattern: str, variable: str, name: str) -> tuple[int, str]:
    value = (bound(pattern, name) or {})[variable]
    return (int(value), "") if value.isdecimal() else (-1, value)


def product(size: Size, numbers: Mapping[str, int]) -> int:
    """A size in numbers."""
    return prod(numbers[one] if isinstance(one, str) else one for one in size)
