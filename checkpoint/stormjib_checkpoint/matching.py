"""Whether what a group wants to fill is what a checkpoint has: everything that its index can show, before the first byte is read."""

from __future__ import annotations

import difflib
from collections import Counter
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, NamedTuple

from stormjib_checkpoint.errors import StateMismatch
from stormjib_checkpoint.tensors import ABSENT

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Mapping, Sequence

    from stormjib_checkpoint.index import IndexAtom
    from stormjib_checkpoint.proof import Group
    from stormjib_checkpoint.records import Json
    from stormjib_checkpoint.spec.live import Here
    from stormjib_checkpoint.tensors import Held, Value


class There(NamedTuple):
    """What a checkpoint has."""

    atoms: Mapping[str, IndexAtom]
    """By every name of theirs."""
    first_names: Mapping[str, str]
    """By the same, what the index calls them."""
    scalars: Mapping[str, Json]


class Mine(NamedTuple):
    """What a rank has to fill."""

    plain: Sequence[Held]
    """Tensors that lie as they say themselves."""
    laid: Sequence[Held]
    """Boxes of tensors that lie as a layout says."""
    told: Here
    """What that says."""
    scalars: Mapping[str, Value]

    @property
    def names(self) -> set[str]:
        return {part.name for part in (*self.plain, *self.laid)}


class InGroup(NamedTuple):
    """What all members of a group have together."""

    names: frozenset[str]
    """Of the checkpoint's, those that somebody has: the stages of a pipeline have each their own."""
    copies: Mapping[str, int]
    """How many plain tensors there are for each atom of the index."""


def in_group(there: There, mine: Mine, group: Group) -> InGroup:
    """All members call it."""
    names, atoms = sorted(there.first_names), sorted({*there.first_names.values()})
    own = mine.names
    known = [part for part in mine.plain if part.name in there.first_names]
    # Two names of one memory are filled once.
    memories = Counter(atom for _, atom in {(one.identity, there.first_names[one.name]) for one in known})
    sums = group.summed([*(int(name in own) for name in names), *(memories[atom] for atom in atoms)])
    held = frozenset(name for name, count in zip(names, sums, strict=False) if count)
    return InGroup(held, dict(zip(atoms, sums[len(names) :], strict=True)))


def check(there: There, mine: Mine, together: InGroup, cast: Collection[str]) -> None:
    """Raises StateMismatch, which names the atom, the layout's rule for it, the forms of both, and what to do."""
    _same_absences(mine.scalars, there.scalars)
    wanted = mine.names | together.names
    atoms = {there.first_names[name] for name in wanted if name in there.first_names}
    # Of an atom with several names a layout may have one only.
    names = {
        name
        for name, first in there.first_names.items()
        if not mine.told.locals or name in wanted or first not in atoms
    }
    forms = {part.name: _own_form(part, mine.told) for part in (*mine.laid, *mine.plain)}
    _same_names("tensor", wanted, names, lambda name: forms[name], lambda name: _form(there.atoms[name]))
    _same_names("scalar", mine.scalars.keys(), there.scalars.keys(), _no_form, _no_form)
    casts = [*cast, *(part.name for part in mine.laid if mine.told.locals[part.tensor].dtype is not None)]
    for part in (*mine.plain, *mine.laid):
        _check_form(part, there.atoms[part.name], casts, mine.told)


def _check_form(part: Held, atom: IndexAtom, casts: Sequence[str], told: Here) -> None:
    may_be_cast = any(fnmatchcase(part.name, pattern) for pattern in casts)
    if part.shape != atom.shape or not (part.dtype == atom.dtype or may_be_cast):
        fix = (
            f"to load it as {part.dtype}, name it in cast="
            if part.shape == atom.shape
            else "shapes are never changed: make the model, or its layout, of the sizes that it was saved with"
        )
        raise StateMismatch(
            f"{part.name} is {_form(atom)} in the checkpoint, {_own_form(part, told)} in the state to fill; {fix}"
        )


def _form(atom: IndexAtom) -> str:
    return f"{atom.dtype} {list(atom.shape)}"


def _own_form(part: Held, told: Here) -> str:
    rule = f" ({told.rule_of(part.tensor)})" if part.cut is not None else ""
    return f"{part.dtype} {list(part.shape)}{rule}"


def _no_form(name: str) -> str:
    return ""


def _same_absences(wanted: Mapping[str, object], there: Mapping[str, object]) -> None:
    for name in sorted(wanted.keys() | there.keys()):
        if (wanted.get(name) is ABSENT) != (there.get(name) is ABSENT):
            sides = ("state to fill", "checkpoint")
            here, other = sides if wanted.get(name) is ABSENT else sides[::-1]
            raise StateMismatch(
                f"{name} is absent in the {here} and not in the {other}; `load` fills what is there, and `restore` makes and "
                "removes the state of an optimizer"
            )


def _same_names(
    what: str,
    wanted: Collection[str],
    there: Collection[str],
    own_form: Callable[[str], str],
    form: Callable[[str], str],
) -> None:
    for name in sorted(set(wanted) - set(there)):
        raise StateMismatch(
            f"{what} {name} is not in the checkpoint{_nearest(name, there, form)}; here it is {own_form(name) or 'a scalar'}: "
            "take it out of the state, or say in rename= what it was called"
        )
    for name in sorted(set(there) - set(wanted)):
        raise StateMismatch(
            f"{what} {name} of the checkpoint is not in the state to fill{_nearest(name, wanted, lambda _: '')}; there it is "
            f"{form(name) or 'a scalar'}: add it to the state, or say in rename= what it is called"
        )


def _nearest(name: str, names: Collection[str], form: Callable[[str], str]) -> str:
    near = difflib.get_close_matches(name, names, n=1)
    return f"; the nearest there is {near[0]} {form(near[0])}".rstrip() if near else ""
