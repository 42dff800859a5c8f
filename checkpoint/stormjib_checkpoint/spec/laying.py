"""A spec on a mesh: every tensor of the layout with its rule, checked as far as it can be without asking any rank. Pure."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from difflib import get_close_matches
from typing import TYPE_CHECKING

from stormjib_checkpoint.errors import SpecError
from stormjib_checkpoint.spec.globs import compiled
from stormjib_checkpoint.spec.naming import MODEL, Family, Shape, Source, families, sources
from stormjib_checkpoint.spec.rules import Rule
from stormjib_checkpoint.spec.stages import Stages

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from stormjib_checkpoint.spec.rules import Kind, Then
    from stormjib_checkpoint.spec.spec import Spec

_NO_RULE = Rule("")
"""Copies everywhere."""


@dataclass(frozen=True)
class Tensor:
    """A tensor of the layout: a weight, or one state of it."""

    name: str
    source: Source
    rule: Rule
    kind: Kind
    then: Then | None
    buffer: str
    """The flat tensor that it is a part of; empty where it is one by itself."""
    is_state: bool
    atoms: tuple[str, ...]
    """That it is made of."""
    shapes: tuple[Shape, ...]
    weights: tuple[Shape, ...]
    """Shapes of those of its parameter: where a state has one element and the parameter more, nothing is cut."""
    stages: tuple[frozenset[int], ...]
    """That have elements of each atom."""
    form: int
    """Equal where all is, but for names and stages."""
    turn: int
    """Its number among the tensors of its family: those that are never cut are dealt out by it."""

    @property
    def slice(self) -> int | None:
        """The number of the slice of its atom that it is; None where it has all of it."""
        return self.source.number if self.kind != "scalar" else None

    @property
    def is_partial(self) -> bool:
        """Whether each rank has values of its own."""
        return bool(self.rule.partial) and self.kind != "scalar"

    @property
    def shown(self) -> str:
        """For errors."""
        rule = f"rule {self.rule.match!r}" if self.rule.match else "no rule"
        return f"{rule}, {self.name}, made of shapes {[list(shape) for shape in self.shapes]}"

    def reduced(self, dim: int) -> bool:
        """Whether it has one element along a dimension of its atoms, and its parameter more."""
        return any(
            dim < len(shape) and shape[dim] == 1 and weight[dim] != 1
            for shape, weight in zip(self.shapes, self.weights, strict=True)
        )


@dataclass(frozen=True)
class Laid:
    """What a layout is made of."""

    mesh: Mapping[str, int]
    numbers: Mapping[str, int]
    """Sizes and mesh axes by name."""
    tensors: tuple[Tensor, ...]
    stage_axis: str
    """Empty where there are no stages."""
    holders: Mapping[tuple[str, int | None], tuple[int, ...]]
    """The stages that have elements of an atom, or of one slice of it."""
    shared: frozenset[str]
    """Atoms that several tensors hold."""
    atoms: Mapping[str, Shape]
    """As they are stored: those whose values differ from rank to rank have one more dimension, in front."""


def laid(spec: Spec, mesh: Mapping[str, int], shapes: Mapping[str, Sequence[int]]) -> Laid:
    """Raises SpecError."""
    known = _mesh(spec, mesh)
    grouped = families(shapes)
    weights = grouped.get(Family(MODEL, ""), {}) | grouped.get(Family("", ""), {})
    found = sources(spec.views, spec.ties, weights)
    axis = spec.place.over if spec.place is not None else ""
    bare = dict.fromkeys([*weights, *(source.bare for source in found)])
    stages = Stages(spec.place, known[axis] if axis else 1, bare)
    making = _Making(spec, weights, found, _rules(spec, found, weights), stages)
    tensors = tuple(tensor for family, there in grouped.items() for tensor in making.of_family(family, there))
    numbers = {**spec.sizes, **known}
    holding = Counter(atom for tensor in tensors for atom in tensor.atoms)
    shared = frozenset(atom for atom, count in holding.items() if count > 1)
    return Laid(known, numbers, tensors, axis, _holders(tensors), shared, _stored(tensors, known))


def _mesh(spec: Spec, mesh: Mapping[str, int]) -> dict[str, int]:
    for axis, size in mesh.items():
        if axis not in spec.axes:
            raise SpecError(
                f"the mesh has an axis {axis}, of which the spec says nothing: add it to its `axes`"
            )
        if size < 1:
            raise SpecError(f"the mesh has {size} ranks along {axis}; there is one at least")
    return {**mesh, **{axis: 1 for axis in spec.axes if axis not in mesh}}


def _rules(spec: Spec, found: Sequence[Source], weights: Mapping[str, Shape]) -> dict[str, Rule]:
    """The rule of each tensor. Raises SpecError where two match one, or one matches none."""
    of: dict[str, Rule] = {}
    for source in found:
        matching = [rule for rule in spec.rules if compiled(rule.match).fullmatch(source.bare)]
        if len(matching) > 1 and not source.tie:
            first, second = matching[:2]
            raise SpecError(
                f"{source.bare} is matched by two rules, {first.match!r} and {second.match!r} (it is made of shapes "
                f"{_shapes(source, weights)}); make one of them narrower"
            )
        of[source.bare] = of[source.tie] if source.tie else (*matching, _NO_RULE)[0]
    used = set(map(id, of.values()))
    for rule in spec.rules:
        if id(rule) not in used:
            raise SpecError(
                f"rule {rule.match!r} is unused: no tensor is called so{_nearest(rule, found, weights)}; take it out, or mend it"
            )
    return of


def _shapes(source: Source, weights: Mapping[str, Shape]) -> list[list[int]]:
    return [list(weights[name]) for name in source.of]


def _nearest(rule: Rule, found: Sequence[Source], weights: Mapping[str, Shape]) -> str:
    """The tensor whose name is most like the pattern of a rule, for an error."""
    by_name = {source.bare: source for source in found}
    near = get_close_matches(rule.match, by_name, n=1, cutoff=0.0)
    return f", the nearest is {near[0]}, made of shapes {_shapes(by_name[near[0]], weights)}" if near else ""


class _Making:
    """Makes the tensors of a layout, family by family."""

    def __init__(
        self,
        spec: Spec,
        weights: Mapping[str, Shape],
        found: Sequence[Source],
        rules: Mapping[str, Rule],
        stages: Stages,
    ) -> None:
        self._spec, self._weights, self._found, self._rules = spec, weights, found, rules
        self._stages = {source.bare: _stages_of(stages, source) for source in found}
        self._forms: dict[object, int] = {}

    def of_family(self, family: Family, shapes: Mapping[str, Shape]) -> list[Tensor]:
        """Raises SpecError."""
        kind = _kind(self._spec, family)
        for bare in shapes.keys() - self._weights.keys():
            raise SpecError(
                f"{family.name(bare)} is the state of {bare}, and there is no {MODEL}{bare} among the atoms"
            )
        tensors: list[Tensor] = []
        for source in self._found:
            there = [bare for bare in source.of if bare in shapes]
            if len(there) == len(source.of):
                tensors.append(self._tensor(family, source, kind, shapes, len(tensors)))
            elif there:
                lacking = family.name(next(bare for bare in source.of if bare not in shapes))
                raise SpecError(
                    f"{family.name(source.bare)} is made of {len(source.of)} atoms, and {lacking} is missing"
                )
        return tensors

    def _tensor(
        self, family: Family, source: Source, kind: Kind, shapes: Mapping[str, Shape], turn: int
    ) -> Tensor:
        rule = self._rules[source.bare]
        then = _then(self._spec, rule, family, kind)
        buffer = family.name(then.buffer) if then is not None and then.buffer and kind == "like" else ""
        own, weights = (tuple(of[bare] for bare in source.of) for of in (shapes, self._weights))
        key = (own, weights, id(rule), kind, id(then), id(source.view), source.number)
        stages = self._stages[source.bare]
        if source.tie and (family.is_state or buffer):
            # Of two names on one rank an optimizer has one state, and a buffer one place.
            elsewhere = frozenset().union(*self._stages[source.tie])
            stages = tuple(one - elsewhere for one in stages)
        tensor = Tensor(
            family.name(source.bare),
            source,
            rule,
            kind,
            then,
            buffer,
            family.is_state,
            tuple(map(family.name, source.of)),
            own,
            weights,
            stages,
            self._forms.setdefault(key, len(self._forms)),
            turn,
        )
        _check(tensor)
        return tensor


def _kind(spec: Spec, family: Family) -> Kind:
    if not family.is_state:
        return "like"
    if family.key not in spec.state:
        raise SpecError(
            f"the atoms have optimizer state {family.key!r}, of which the spec says nothing: add it to `state` as like, scalar or matrix"
        )
    return spec.state[family.key]


def _then(spec: Spec, rule: Rule, family: Family, kind: Kind) -> Then | None:
    then = rule.then or (spec.then if family.prefix else None)
    if then is None or kind == "scalar" or not (then.weights or family.is_state):
        return None
    return None if {*rule.whole, rule.partial} & {*then.over} else then


def _check(tensor: Tensor) -> None:
    then, cut = tensor.then, {cut.over for cut in tensor.rule.cuts}
    if then is not None and cut & {*then.over}:
        raise SpecError(
            f"{tensor.shown}: {', '.join(sorted(cut & {*then.over}))} cuts it twice; take it out of `then`, or of `shard`"
        )
    if tensor.kind == "scalar":
        return
    for shape, weight in zip(tensor.shapes, tensor.weights, strict=True):
        if len(shape) != len(weight) or any(a not in (1, b) for a, b in zip(shape, weight, strict=True)):
            raise SpecError(
                f"{tensor.shown}: its parameter has shape {list(weight)}, so it is not {tensor.kind} it; call it scalar in `state`"
            )


def _holders(tensors: Sequence[Tensor]) -> dict[tuple[str, int | None], tuple[int, ...]]:
    found: dict[tuple[str, int | None], frozenset[int]] = {}
    for tensor in tensors:
        for atom, stages in zip(tensor.atoms, tensor.stages, strict=True):
            key = (atom, tensor.slice)
            found[key] = found.get(key, frozenset()) | stages
    return {key: tuple(sorted(held)) for key, held in found.items()}


def _stages_of(stages: Stages, source: Source) -> tuple[frozenset[int], ...]:
    """The stages on which a tensor has elements of each of its atoms."""
    own = frozenset(stages.of(source.bare))
    return tuple(own if source.tie else own & {*stages.of(atom)} for atom in source.of)


def _stored(tensors: Sequence[Tensor], mesh: Mapping[str, int]) -> dict[str, Shape]:
    return {
        atom: (mesh[tensor.rule.partial], *shape) if tensor.is_partial else shape
        for tensor in tensors
        for atom, shape in zip(tensor.atoms, tensor.shapes, strict=True)
    }
