"""A pattern spec as JSON has it, strictly into records. Pure: who has a file reads it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from stormjib_checkpoint.errors import FormatError, SpecError
from stormjib_checkpoint.records import parse as parse_json
from stormjib_checkpoint.records import shown
from stormjib_checkpoint.spec import fields as plain
from stormjib_checkpoint.spec.fields import Fields
from stormjib_checkpoint.spec.globs import variables
from stormjib_checkpoint.spec.rules import (
    PARTS,
    Cut,
    Pad,
    Parts,
    Place,
    Rule,
    Size,
    Then,
    Tie,
    View,
)
from stormjib_checkpoint.spec.spec import Spec

if TYPE_CHECKING:
    from collections.abc import Mapping

    from stormjib_checkpoint.records import Json

_KINDS = ("like", "scalar", "matrix")


def parse_text(data: bytes, where: str, sizes: Mapping[str, int] | None = None) -> Spec:
    """As `parse`, of the bytes of a JSON file. Raises SpecError."""
    try:
        return parse(parse_json(data, where), sizes)
    except FormatError as error:
        raise SpecError(str(error)) from error


def parse(value: Mapping[str, Json], sizes: Mapping[str, int] | None = None) -> Spec:
    """A spec as plain data. `sizes` are those that the spec names and leaves open (null), or that differ. Raises SpecError."""
    fields = Fields(value, "spec")
    axes = fields.take("axes", plain.texts)
    known = _sizes(fields.take("sizes", plain.table, {}), sizes or {}, axes)
    names = frozenset(axes), frozenset(known)
    reader = _Reader(*names)
    rules = fields.take("rules", plain.items, [])
    made = [reader.rule(Fields(rule, f"rules[{i}]")) for i, rule in enumerate(rules)]
    views = fields.take("views", plain.items, [])
    place, then = fields.object("place"), fields.object("then")
    found = Spec(
        axes,
        known,
        tuple(rule for rule in made if isinstance(rule, Rule)),
        tuple(rule for rule in made if isinstance(rule, Tie)),
        tuple(reader.view(Fields(view, f"views[{i}]")) for i, view in enumerate(views)),
        reader.place(place) if place is not None else None,
        {
            key: plain.one_of(kind, f"state.{key}", _KINDS)
            for key, kind in fields.take("state", plain.table, {}).items()
        },
        reader.then(then) if then is not None else None,
    )
    fields.end()
    _check_stages(found)
    return found


def _check_stages(spec: Spec) -> None:
    """Nothing else may go over the axis of the stages."""
    for where, rule in (
        (f"rule {rule.match!r}", rule) for rule in (*spec.rules, Rule("then", then=spec.then))
    ):
        then = rule.then.over if rule.then is not None else ()
        over = (rule.partial, *(cut.over for cut in rule.cuts), *then)
        if spec.place is not None and spec.place.over in over:
            raise SpecError(
                f"{where} cuts over {spec.place.over}, which is the axis of the stages; take another one"
            )


def _sizes(declared: dict[str, Json], given: Mapping[str, int], axes: tuple[str, ...]) -> dict[str, int]:
    for name in given.keys() - declared.keys():
        raise SpecError(f"size {name} is given, and the spec has no such name: {plain.listed(declared)}")
    both = {**declared, **given}
    for name, size in both.items():
        if name in axes:
            raise SpecError(f"sizes.{name} is the name of a mesh axis too; rename one of the two")
        if size is None:
            raise SpecError(f"sizes.{name} is left open by the spec; give it in `sizes`")
        plain.positive(size, f"sizes.{name}")
    return both


class _Reader:
    """Knows which axes and sizes there are."""

    def __init__(self, axes: frozenset[str], sizes: frozenset[str]) -> None:
        self._axes, self._sizes = axes, sizes

    def rule(self, fields: Fields) -> Rule | Tie:
        match = fields.take("match", plain.pattern)
        fields.where = f"rule {match!r}"
        of = fields.take("tie", plain.text, "")
        if of:
            fields.end()
            return Tie(match, of)
        parts, pad, partial, then = map(fields.object, ("parts", "pad", "partial", "then"))
        cuts = tuple(
            self._cut(Fields(cut, f"{fields.where}.shard[{i}]"))
            for i, cut in enumerate(fields.take("shard", plain.items, []))
        )
        found = Rule(
            match,
            cuts,
            self._parts(parts) if parts is not None else None,
            self._pad(pad) if pad is not None else None,
            fields.take("replicate", self._some_axes, ()),
            self._partial(partial) if partial is not None else "",
            fields.take("cast", plain.dtype, None),
            self.then(then) if then is not None else None,
        )
        fields.end()
        _check(found, fields.where)
        return found

    def view(self, fields: Fields) -> View:
        to = fields.take("to", plain.pattern)
        fields.where = f"view {to!r}"
        of = fields.take("of", plain.texts)
        for pattern in (to, *of):
            plain.only_variables(plain.pattern(pattern, fields.where), fields.where)
        if not of:
            raise SpecError(f"{fields.where} is made of nothing; name its atoms in `of`")
        alone = frozenset().union(*map(variables, of)) ^ variables(to)
        if len(alone) > 1 or any(variables(pattern) != variables(of[0]) for pattern in of):
            raise SpecError(
                f"{fields.where}: {plain.listed(alone)} may not all stand on one side alone; at most one variable may, in every name of it"
            )
        found = View(
            to,
            of,
            fields.take("dim", plain.count, None),
            fields.take("groups", self._size, None),
            fields.take("rope", self._size, None),
        )
        fields.end()
        if len(of) > 1 and found.dim is None:
            raise SpecError(f"{fields.where} joins {len(of)} tensors, and lacks dim: along which dimension")
        return found

    def place(self, fields: Fields) -> Place:
        layers = fields.take("layers", plain.pattern)
        if variables(layers) != {"i"}:
            raise SpecError(
                f"place.layers {layers!r} has to have {{i}}, the number of the layer, and no other"
            )
        found = Place(
            fields.take("over", self._axis),
            layers,
            fields.take("counts", plain.counts, None),
            fields.take("chunks", plain.positive, 1),
            fields.take("first", plain.patterns, ()),
            fields.take("last", plain.patterns, ()),
        )
        fields.end()
        return found

    def then(self, outer: Fields) -> Then:
        kinds = outer.rest()
        if len(kinds) != 1:
            raise SpecError(f"{outer.where} names {plain.listed(kinds)}; wanted one of fsdp and zero")
        ((name, value),) = kinds.items()
        kind = plain.one_of(name, outer.where, ("fsdp", "zero"))
        fields = Fields(value, f"{outer.where}.{kind}")
        over = fields.take("over", self._some_axes)
        weights = fields.take("of", lambda of, at: plain.one_of(of, at, ("states", "all"))) == "all"
        found = (
            Then("fsdp", over, weights, dim=fields.take("dim", plain.count, 0))
            if kind == "fsdp"
            else Then("zero", over, weights, buffer=fields.take("buffer", plain.text, ""))
        )
        fields.end()
        return found

    def _cut(self, fields: Fields) -> Cut:
        uneven = fields.take("uneven", lambda how, at: plain.one_of(how, at, ("ceil", "front")), "ceil")
        unit, cover = fields.take("unit", self._size, (1,)), fields.take("cover", self._size, None)
        rest = fields.rest()
        if len(rest) != 1:
            raise SpecError(
                f"{fields.where} names {plain.listed(rest)}; wanted one mesh axis and the dimension it cuts"
            )
        ((over, dim),) = rest.items()
        axis = self._axis(over, fields.where)
        if dim != PARTS:
            dim = plain.count(dim, f"{fields.where}.{axis}")
        return Cut(axis, dim, uneven, unit, cover)

    def _parts(self, fields: Fields) -> Parts:
        dim, of = fields.take("dim", plain.count), fields.take("of", self._some_sizes)
        unit = fields.take("unit", self._some_sizes, ((1,),) * len(of))
        fields.end()
        if len(unit) != len(of):
            raise SpecError(f"{fields.where} has {len(of)} parts and units for {len(unit)}")
        return Parts(dim, of, unit)

    def _pad(self, fields: Fields) -> Pad:
        found = Pad(fields.take("dim", plain.count), fields.take("to", self._size))
        fields.end()
        return found

    def _partial(self, fields: Fields) -> str:
        over = fields.take("over", self._axis)
        fields.take("union", lambda union, at: plain.one_of(union, at, ("mean",)))
        fields.end()
        return over

    def _axis(self, value: Json, where: str) -> str:
        if plain.text(value, where) not in self._axes:
            raise SpecError(
                f"{where} names the axis {shown(value)}; the spec's axes are {plain.listed(self._axes)}"
            )
        return str(value)

    def _some_axes(self, value: Json, where: str) -> tuple[str, ...]:
        return tuple(self._axis(one, where) for one in plain.items(value, where))

    def _size(self, value: Json, where: str) -> Size:
        factors = value if isinstance(value, list) else [value]
        for factor in factors:
            if isinstance(factor, str) and factor not in self._axes | self._sizes:
                raise SpecError(
                    f"{where} names {shown(factor)}; the spec knows {plain.listed(self._axes | self._sizes)}"
                )
            if not isinstance(factor, str):
                plain.positive(factor, where)
        return tuple(factors)

    def _some_sizes(self, value: Json, where: str) -> tuple[Size, ...]:
        return tuple(self._size(one, f"{where}[{i}]") for i, one in enumerate(plain.items(value, where)))


def _check(rule: Rule, where: str) -> None:
    """What makes no sense whatever the tensors are."""
    by_parts = [cut for cut in rule.cuts if cut.dim == PARTS]
    if (rule.parts is not None) != (len(by_parts) == 1):
        raise SpecError(f"{where} has to have `parts` and one cut of them, or neither")
    if rule.parts is not None and rule.pad is not None and rule.pad.dim == rule.parts.dim:
        raise SpecError(
            f"{where} pads the dimension of its parts; pad another one, or hold the parts as tensors of their own"
        )
    if any(cut.unit != (1,) for cut in by_parts):
        raise SpecError(f"{where} has a unit for all of its parts; give each its own, as parts.unit")
    for cut in rule.cuts:
        if cut.over in (*rule.whole, rule.partial):
            raise SpecError(f"{where} cuts over {cut.over}, and says that it is whole on each rank of it")
    if len({cut.over for cut in rule.cuts}) < len(rule.cuts):
        raise SpecError(f"{where} cuts twice over one axis")
