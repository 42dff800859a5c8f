"""A spec on a mesh: every tensor of the layout with its rule, checked as far as it can be without asking any rank. Pure."""

from __future__ import annotations

from dataclasses import dataclass
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


@dataclass(frozen=True)
class Tensor:
    """A tensor of the layout: a weight, or one state of it."""

    family: Family
    source: Source
    rule: Rule
    kind: Kind
    then: Then | None
    shapes: tuple[Shape, ...]
    """Of the atoms that it is made of."""
    weights: tuple[Shape, ...]
    """Of those of its parameter: where a state has one element and the parameter more, nothing is cut."""
    turn: int
    """Counts the tensors that are never cut, so that they can be dealt out."""

    @property
    def name(self) -> str:
        return self.family.name(self.source.bare)

    @property
    def atoms(self) -> tuple[str, ...]:
        return tuple(self.family.name(bare) for bare in self.source.of)

    @property
    def slice(self) -> int | None:
        """The number of the slice of its atom that it is; None where it has all of it."""
        return self.source.number if self.kind != "scalar" else None

    @property
    def shown(self) -> str:
        """For errors."""
        return (
            f"rule {self.rule.match!r}, {self.name}, made of shapes {[list(shape) for shape in self.shapes]}"
        )


@dataclass(frozen=True)
class Laid:
    """What a layout is made of."""

    mesh: Mapping[str, int]
    numbers: Mapping[str, int]
    """Sizes and mesh axes by name."""
    tensors: tuple[Tensor, ...]
    stages: Stages
    stage_axis: str
    """Empty where there are no stages."""
    holders: Mapping[tuple[str, int | None], tuple[int, ...]]
    """The stages that have elements of an atom, or of one slice of it."""
    atoms: Mapping[str, Shape]
    """As they are stored: those whose values differ from rank to rank have one more dimension, in front."""


def laid(spec: Spec, mesh: Mapping[str, int], shapes: Mapping[str, Sequence[int]]) -> Laid:
    """Raises SpecError."""
    known = _mesh(spec, mesh)
    grouped = families(shapes)
    weights = grouped.get(Family(MODEL, ""), {}) | grouped.get(Family("", ""), {})
    found = sources(spec.views, spec.ties, weights)
    rules = _rules(spec, found)
    tensors = tuple(
        tensor
        for family, of_family in grouped.items()
        for tensor in _of_family(spec, family, of_family, found, rules, weights)
    )
    axis = spec.place.over if spec.place is not None else ""
    bare = dict.fromkeys([*weights, *(source.bare for source in found)])
    stages = Stages(spec.place, known[axis] if axis else 1, bare)
    return Laid(
        known,
        {**spec.sizes, **known},
        tensors,
        stages,
        axis,
        _holders(tensors, stages),
        _stored(tensors, known),
    )


def _mesh(spec: Spec, mesh: Mapping[str, int]) -> dict[str, int]:
    for axis, size in mesh.items():
        if axis not in spec.axes:
            raise SpecError(
                f"the mesh has an axis {axis}, of which the spec says nothing: add it to its `axes`"
            )
        if size < 1:
            raise SpecError(f"the mesh has {size} ranks along {axis}; there is one at least")
    return {**mesh, **{axis: 1 for axis in spec.axes if axis not in mesh}}


def _rules(spec: Spec, found: Sequence[Source]) -> dict[str, Rule]:
    """The rule of each tensor. Raises SpecError where two match one, or one matches none."""
    of: dict[str, Rule] = {}
    for source in found:
        matching = [rule for rule in spec.rules if compiled(rule.match).fullmatch(source.bare)]
        if len(matching) > 1 and not source.tie:
            first, second = matching[:2]
            raise SpecError(
                f"{source.bare} is matched by two rules, {first.match!r} and {second.match!r}; make one of them narrower"
            )
        of[source.bare] = of[source.tie] if source.tie else (*matching, Rule(source.bare))[0]
    for rule in spec.rules:
        if rule not in of.values():
            raise SpecError(f"rule {rule.match!r} is unused: no tensor is called so; take it out, or mend it")
    return of


def _of_family(
    spec: Spec,
    family: Family,
    shapes: Mapping[str, Shape],
    found: Sequence[Source],
    rules: Mapping[str, Rule],
    weights: Mapping[str, Shape],
) -> list[Tensor]:
    kind = _kind(spec, family)
    for bare in shapes.keys() - weights.keys():
        raise SpecError(
            f"{family.name(bare)} is the state of {bare}, and there is no {MODEL}{bare} among the atoms"
        )
    tensors: list[Tensor] = []
    for source in found:
        there = [bare for bare in source.of if bare in shapes]
        if not there:
            continue  # a frozen weight has no state
        if len(there) < len(source.of):
            lacking = family.name(next(bare for bare in source.of if bare not in shapes))
            raise SpecError(
                f"{family.name(source.bare)} is made of {len(source.of)} atoms, and {lacking} is missing"
            )
        rule = rules[source.bare]
        then = _then(spec, rule, family, kind)
        own = tuple(shapes[bare] for bare in source.of)
        tensor = Tensor(
            family, source, rule, kind, then, own, tuple(weights[bare] for bare in source.of), len(tensors)
        )
        _check(tensor)
        tensors.append(tensor)
    return tensors


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


def _holders(tensors: Sequence[Tensor], stages: Stages) -> dict[tuple[str, int | None], tuple[int, ...]]:
    found: dict[tuple[str, int | None], set[int]] = {}
    for tensor in tensors:
        for atom, bare in zip(tensor.atoms, tensor.source.of, strict=True):
            found.setdefault((atom, tensor.slice), set()).update(stages_of(stages, tensor.source, bare))
    return {key: tuple(sorted(held)) for key, held in found.items()}


def stages_of(stages: Stages, source: Source, atom: str) -> set[int]:
    """The stages on which a tensor has elements of an atom (by bare name)."""
    own = {*stages.of(source.bare)}
    return own if source.tie else own & {*stages.of(atom)}


def _stored(tensors: Sequence[Tensor], mesh: Mapping[str, int]) -> dict[str, Shape]:
    return {
        atom: (mesh[tensor.rule.partial], *shape) if is_partial(tensor) else shape
        for tensor in tensors
        for atom, shape in zip(tensor.atoms, tensor.shapes, strict=True)
    }


def is_partial(tensor: Tensor) -> bool:
    """Whether each rank has values of its own."""
    return bool(tensor.rule.partial) and tensor.kind != "scalar"
