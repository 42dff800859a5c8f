"""Plain data, read strictly: every value has a type, and what nobody has asked for is unknown. Pure."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, TypeVar

from stormjib_checkpoint.errors import SpecError
from stormjib_checkpoint.format import ITEM_BYTES
from stormjib_checkpoint.records import shown
from stormjib_checkpoint.spec.globs import compiled

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from stormjib_checkpoint.records import Json

T = TypeVar("T")


class Fields:
    """An object whose keys are taken one by one; what is left over is unknown."""

    def __init__(self, value: Json, where: str) -> None:
        self.where = where
        self._left = dict(table(value, where))
        self._known: list[str] = []

    def take(self, key: str, read: Callable[[Json, str], T], default: Any = ...) -> T:
        """What stands under a key. Raises SpecError where it is missing and there is no default."""
        self._known.append(key)
        if key in self._left:
            return read(self._left.pop(key), f"{self.where}.{key}")
        if default is ...:
            raise SpecError(f"{self.where} lacks {key}")
        return default  # type: ignore[no-any-return]

    def object(self, key: str) -> Fields | None:
        """The object that stands under a key; None where there is none."""
        return self.take(key, Fields.at, None)

    @classmethod
    def at(cls, value: Json, where: str) -> Fields:
        return cls(value, where)

    def rest(self) -> dict[str, Json]:
        """What nobody has taken."""
        left, self._left = self._left, {}
        return left

    def end(self) -> None:
        """Raises SpecError where something is left."""
        for key in self._left:
            raise SpecError(f"{self.where} has an unknown key {shown(key)}; known are {listed(self._known)}")


def text(value: Json, where: str) -> str:
    """Text that is not empty."""
    if not isinstance(value, str) or not value:
        raise SpecError(f"{where} is {shown(value)}; wanted text")
    return value


def items(value: Json, where: str) -> list[Json]:
    """A list."""
    if not isinstance(value, list):
        raise SpecError(f"{where} is {shown(value)}; wanted a list")
    return value


def table(value: Json, where: str) -> dict[str, Json]:
    """An object."""
    if not isinstance(value, dict):
        raise SpecError(f"{where} is {shown(value)}; wanted an object")
    return value


def texts(value: Json, where: str) -> tuple[str, ...]:
    """A list of texts."""
    return tuple(text(one, f"{where}[{i}]") for i, one in enumerate(items(value, where)))


def count(value: Json, where: str) -> int:
    """A number from 0 on."""
    if type(value) is not int or value < 0:
        raise SpecError(f"{where} is {shown(value)}; wanted a number from 0 on")
    return value


def positive(value: Json, where: str) -> int:
    """A number from 1 on."""
    if type(value) is not int or value < 1:
        raise SpecError(f"{where} is {shown(value)}; wanted a number from 1 on, or a name")
    return value


def counts(value: Json, where: str) -> tuple[int, ...]:
    """A list of numbers."""
    return tuple(count(one, f"{where}[{i}]") for i, one in enumerate(items(value, where)))


def pattern(value: Json, where: str) -> str:
    """A pattern of names."""
    found = text(value, where)
    try:
        compiled(found)
    except ValueError as error:
        raise SpecError(f"{where}: the pattern {found!r}: {error}") from error
    return found


def patterns(value: Json, where: str) -> tuple[str, ...]:
    """A list of them."""
    return tuple(pattern(one, f"{where}[{i}]") for i, one in enumerate(items(value, where)))


def only_variables(pattern: str, where: str) -> None:
    """Raises SpecError where a pattern has more than variables."""
    if "*" in pattern or "," in pattern:
        raise SpecError(f"{where}: {pattern!r} may have variables such as {{i}}, and no other pattern")


def dtype(value: Json, where: str) -> str:
    """A type tag."""
    return str(one_of(value, where, tuple(ITEM_BYTES)))


def one_of(value: Json, where: str, known: tuple[str, ...]) -> Any:
    """One of some words."""
    if value not in known:
        raise SpecError(f"{where} is {shown(value)}; known are {listed(known)}")
    return value


def listed(names: Iterable[object]) -> str:
    """Names as they may stand in an error."""
    return ", ".join(sorted(map(str, names))) or "none"
