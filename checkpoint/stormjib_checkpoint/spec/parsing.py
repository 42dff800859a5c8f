"""A pattern spec as JSON has it, strictly into records. Pure: who has a file reads it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, TypeVar

from stormjib_checkpoint.errors import FormatError, SpecError
from stormjib_checkpoint.format import ITEM_BYTES
from stormjib_checkpoint.records import parse as parse_json
from stormjib_checkpoint.records import shown
from stormjib_checkpoint.spec.globs import compiled, variables
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
    from collections.abc import Callable, Mapping

    from stormjib_checkpoint.records import Json

T = TypeVar("T")
_KINDS = ("like", "scalar", "matrix")


def parse_text(data: bytes, where: str, sizes: Mapping[str, int] | None = None) -> Spec:
    """As `parse`, of the bytes of a JSON file. Raises SpecError."""
    try:
        return parse(parse_json(data, where), sizes)
    except FormatError as error:
        raise SpecError(str(error)) from error


def parse(value: Mapping[str, Json], sizes: Mapping[str, int] | None = None) -> Spec:
    """A spec as plain data. `sizes` are those that the spec names and leaves open (null), or that differ. Raises SpecError."""
    fields = _Fields(value, "spec")
    axes = fields.take("axes", _texts)
    known = _sizes(fields.take("sizes", _dict, {}), sizes or {}, axes)
    names = frozenset(axes), frozenset(known)
    reader = _Reader(*names)
    rules = fields.take("rules", _list, [])
    made = [reader.rule(_Fields(rule, f"rules[{i}]")) for i, rule in enumerate(rules)]
    views = fields.take("views", _list, [])
    place, then = fields.object("place"), fields.object("then")
    found = Spec(
        axes,
        known,
        tuple(rule for rule in made if isinstance(rule, Rule)),
        tuple(rule for rule in made if isinstance(rule, Tie)),
        tuple(reader.view(_Fields(view, f"views[{i}]")) for i, view in enumerate(views)),
        reader.place(place) if place is not None else None,
        {key: _one_of(kind, f"state.{key}", _KINDS) for key, kind in fields.take("state", _dict, {}).items()},
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
        raise SpecError(f"size {name} is given, and the spec has no such name: {_names(declared)}")
    both = {**declared, **given}
    for name, size in both.items():
        if name in axes:
            raise SpecError(f"sizes.{name} is the name of a mesh axis too; rename one of the two")
        if size is None:
            raise SpecError(f"sizes.{name} is left open by the spec; give it in `sizes`")
        _positive(size, f"sizes.{name}")
    return both


class _Fields:
    """An object whose keys are taken one by one; what is left over is unknown."""

    def __init__(self, value: Json, where: str) -> None:
        self.where = where
        self._left = dict(_dict(value, where))
        self._known: list[str] = []

    def take(self, key: str, read: Callable[[Json, str], T], default: Any = ...) -> T:
        """What stands under a key. Raises SpecError where it is missing and there is no default."""
        self._known.append(key)
        if key in self._left:
            return read(self._left.pop(key), f"{self.where}.{key}")
        if default is ...:
            raise SpecError(f"{self.where} lacks {key}")
        return default  # type: ignore[no-any-return]

    def object(self, key: str) -> _Fields | None:
        """The object that stands under a key; None where there is none."""
        return self.take(key, _Fields.at, None)

    @classmethod
    def at(cls, value: Json, where: str) -> _Fields:
        return cls(value, where)

    def rest(self) -> dict[str, Json]:
        """What nobody has taken."""
        left, self._left = self._left, {}
        return left

    def end(self) -> None:
        """Raises SpecError where something is left."""
        for key in self._left:
            raise SpecError(f"{self.where} has an unknown key {shown(key)}; known are {_names(self._known)}")


class _Reader:
    """Knows which axes and sizes there are."""

    def __init__(self, axes: frozenset[str], sizes: frozenset[str]) -> None:
        self._axes, self._sizes = axes, sizes

    def rule(self, fields: _Fields) -> Rule | Tie:
        match = fields.take("match", _pattern)
        fields.where = f"rule {match!r}"
        of = fields.take("tie", _text, "")
        if of:
            fields.end()
            return Tie(match, of)
        parts, pad, partial, then = map(fields.object, ("parts", "pad", "partial", "then"))
        cuts = tuple(
            self._cut(_Fields(cut, f"{fields.where}.shard[{i}]"))
            for i, cut in enumerate(fields.take("shard", _list, []))
        )
        found = Rule(
            match,
            cuts,
            self._parts(parts) if parts is not None else None,
            self._pad(pad) if pad is not None else None,
            fields.take("replicate", self._some_axes, ()),
            self._partial(partial) if partial is not None else "",
            fields.take("cast", _dtype, None),
            self.then(then) if then is not None else None,
        )
        fields.end()
        _check(found, fields.where)
        return found

    def view(self, fields: _Fields) -> View:
        to = fields.take("to", _pattern)
        fields.where = f"view {to!r}"
        of = fields.take("of", _texts)
        for pattern in (to, *of):
            _only_variables(_pattern(pattern, fields.where), fields.where)
        alone = frozenset().union(*map(variables, of)) ^ variables(to)
        if len(alone) > 1 or any(variables(pattern) != variables(of[0]) for pattern in of):
            raise SpecError(
                f"{fields.where}: {_names(alone)} may not all stand on one side alone; at most one variable may, in every name of it"
            )
        found = View(
            to,
            of,
            fields.take("dim", _count, None),
            fields.take("groups", self._size, None),
            fields.take("rope", self._size, None),
        )
        fields.end()
        if len(of) > 1 and found.dim is None:
            raise SpecError(f"{fields.where} joins {len(of)} tensors, and lacks dim: along which dimension")
        return found

    def place(self, fields: _Fields) -> Place:
        layers = fields.take("layers", _pattern)
        if variables(layers) != {"i"}:
            raise SpecError(
                f"place.layers {layers!r} has to have {{i}}, the number of the layer, and no other"
            )
        found = Place(
            fields.take("over", self._axis),
            layers,
            fields.take("counts", _counts, None),
            fields.take("chunks", _positive, 1),
            fields.take("first", _patterns, ()),
            fields.take("last", _patterns, ()),
        )
        fields.end()
        return found

    def then(self, outer: _Fields) -> Then:
        kinds = outer.rest()
        if len(kinds) != 1:
            raise SpecError(f"{outer.where} names {_names(kinds)}; wanted one of fsdp and zero")
        ((name, value),) = kinds.items()
        kind = _one_of(name, outer.where, ("fsdp", "zero"))
        fields = _Fields(value, f"{outer.where}.{kind}")
        over = fields.take("over", self._some_axes)
        weights = fields.take("of", lambda of, at: _one_of(of, at, ("states", "all"))) == "all"
        found = (
            Then("fsdp", over, weights, dim=fields.take("dim", _count, 0))
            if kind == "fsdp"
            else Then("zero", over, weights, buffer=fields.take("buffer", _text, ""))
        )
        fields.end()
        return found

    def _cut(self, fields: _Fields) -> Cut:
        uneven = fields.take("uneven", lambda how, at: _one_of(how, at, ("ceil", "front")), "ceil")
        unit, cover = fields.take("unit", self._size, (1,)), fields.take("cover", self._size, None)
        rest = fields.rest()
        if len(rest) != 1:
            raise SpecError(
                f"{fields.where} names {_names(rest)}; wanted one mesh axis and the dimension it cuts"
            )
        ((over, dim),) = rest.items()
        axis = self._axis(over, fields.where)
        if dim != PARTS:
            dim = _count(dim, f"{fields.where}.{axis}")
        return Cut(axis, dim, uneven, unit, cover)

    def _parts(self, fields: _Fields) -> Parts:
        dim, of = fields.take("dim", _count), fields.take("of", self._some_sizes)
        unit = fields.take("unit", self._some_sizes, ((1,),) * len(of))
        fields.end()
        if len(unit) != len(of):
            raise SpecError(f"{fields.where} has {len(of)} parts and units for {len(unit)}")
        return Parts(dim, of, unit)

    def _pad(self, fields: _Fields) -> Pad:
        found = Pad(fields.take("dim", _count), fields.take("to", self._size))
        fields.end()
        return found

    def _partial(self, fields: _Fields) -> str:
        over = fields.take("over", self._axis)
        fields.take("union", lambda union, at: _one_of(union, at, ("mean",)))
        fields.end()
        return over

    def _axis(self, value: Json, where: str) -> str:
        if value not in self._axes:
            raise SpecError(
                f"{where} names the axis {shown(value)}; the spec's axes are {_names(self._axes)}"
            )
        return _text(value, where)

    def _some_axes(self, value: Json, where: str) -> tuple[str, ...]:
        return tuple(self._axis(one, where) for one in _list(value, where))

    def _size(self, value: Json, where: str) -> Size:
        factors = value if isinstance(value, list) else [value]
        for factor in factors:
            if isinstance(factor, str) and factor not in self._axes | self._sizes:
                raise SpecError(
                    f"{where} names {shown(factor)}; the spec knows {_names(self._axes | self._sizes)}"
                )
            if not isinstance(factor, str):
                _positive(factor, where)
        return tuple(factors)

    def _some_sizes(self, value: Json, where: str) -> tuple[Size, ...]:
        return tuple(self._size(one, f"{where}[{i}]") for i, one in enumerate(_list(value, where)))


def _check(rule: Rule, where: str) -> None:
    """What makes no sense whatever the tensors are."""
    by_parts = [cut for cut in rule.cuts if cut.dim == PARTS]
    if (rule.parts is not None) != (len(by_parts) == 1):
        raise SpecError(f"{where} has to have `parts` and one cut of them, or neither")
    if rule.parts is not None and rule.pad is not None and rule.pad.dim == rule.parts.dim:
        raise SpecError(
            f"{where} pads the dimension of its parts; pad another one, or hold the parts as tensors of their own"
        )
    for cut in rule.cuts:
        if cut.over in (*rule.whole, rule.partial):
            raise SpecError(f"{where} cuts over {cut.over}, and says that it is whole on each rank of it")
    if len({cut.over for cut in rule.cuts}) < len(rule.cuts):
        raise SpecError(f"{where} cuts twice over one axis")


# --- plain values ---------------------------------------------------------------------------------------------------


def _text(value: Json, where: str) -> str:
    if not isinstance(value, str) or not value:
        raise SpecError(f"{where} is {shown(value)}; wanted text")
    return value


def _list(value: Json, where: str) -> list[Json]:
    if not isinstance(value, list):
        raise SpecError(f"{where} is {shown(value)}; wanted a list")
    return value


def _dict(value: Json, where: str) -> dict[str, Json]:
    if not isinstance(value, dict):
        raise SpecError(f"{where} is {shown(value)}; wanted an object")
    return value


def _texts(value: Json, where: str) -> tuple[str, ...]:
    return tuple(_text(one, f"{where}[{i}]") for i, one in enumerate(_list(value, where)))


def _count(value: Json, where: str) -> int:
    if type(value) is not int or value < 0:
        raise SpecError(f"{where} is {shown(value)}; wanted a number from 0 on")
    return value


def _positive(value: Json, where: str) -> int:
    if type(value) is not int or value < 1:
        raise SpecError(f"{where} is {shown(value)}; wanted a number from 1 on, or a name")
    return value


def _counts(value: Json, where: str) -> tuple[int, ...]:
    return tuple(_count(one, f"{where}[{i}]") for i, one in enumerate(_list(value, where)))


def _pattern(value: Json, where: str) -> str:
    pattern = _text(value, where)
    try:
        compiled(pattern)
    except ValueError as error:
        raise SpecError(f"{where}: the pattern {pattern!r}: {error}") from error
    return pattern


def _patterns(value: Json, where: str) -> tuple[str, ...]:
    return tuple(_pattern(one, f"{where}[{i}]") for i, one in enumerate(_list(value, where)))


def _only_variables(pattern: str, where: str) -> None:
    if "*" in pattern or "," in pattern:
        raise SpecError(f"{where}: {pattern!r} may have variables such as {{i}}, and no other pattern")


def _dtype(value: Json, where: str) -> str:
    return str(_one_of(value, where, tuple(ITEM_BYTES)))


def _one_of(value: Json, where: str, known: tuple[str, ...]) -> Any:
    if value not in known:
        raise SpecError(f"{where} is {shown(value)}; known are {_names(known)}")
    return value


def _names(names: Any) -> str:
    return ", ".join(sorted(map(str, names))) or "none"
