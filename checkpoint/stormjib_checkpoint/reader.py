"""Loading a committed step on any number of ranks: by boxes, in place, every byte proved before it counts.

All refusals that the index can show (missing or extra names, shapes, types) come before the first byte is filled.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, TypeVar

import torch

from stormjib_checkpoint.errors import DamagedCheckpoint, FormatError, StateMismatch
from stormjib_checkpoint.loading import Loading, Wanted
from stormjib_checkpoint.objects import from_json
from stormjib_checkpoint.proof import Alone
from stormjib_checkpoint.spec.live import NOTHING, Here, Laid, here
from stormjib_checkpoint.step import CommittedStep
from stormjib_checkpoint.tensors import ABSENT, Held, Value, held

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable, Mapping, MutableMapping, Sequence

    from stormjib_checkpoint.index import IndexAtom
    from stormjib_checkpoint.node_memory import Near
    from stormjib_checkpoint.proof import Group
    from stormjib_checkpoint.records import Json
    from stormjib_checkpoint.spec.layout import Layout
    from stormjib_checkpoint.storage import Storage

T = TypeVar("T")
ALONE = Alone()

Rename = Callable[[str], str]
"""A rule: from each name in the checkpoint to its name in the state to fill."""


def load(
    storage: Storage,
    resume: tuple[int, str, str],
    state: MutableMapping[str, Value],
    *,
    rename: Rename | None = None,
    cast: Collection[str] = (),
    layout: Layout | None = None,
    near: Near | None = None,
    group: Group = ALONE,
) -> dict[str, Json]:
    """Fill `state` from the step `resume` (step, generation, digest of its manifest); returns what `train` was.

    Tensors and DTensors are filled in place, whatever world size saved them; other values are replaced in the mapping. What `near` has
    is read from there first. Names must be the same on both sides, after `rename`: `lambda name: name.replace(".encoder.", ".enc.")`.
    `cast` are patterns of names (`model.*`) that may have another type here. `layout` says how plain tensors lie that are no whole ones. A `group` loads together: each member calls this, for its
    own part, and all parts are proved as one; a rank alone proves its part by checksums, for which it reads whole pieces.
    Raises MissingCheckpoint, DamagedCheckpoint, StateMismatch, StorageError.
    """
    checkpoint = Checkpoint(storage, resume, rename, near)
    checkpoint.fill(state, cast=cast, layout=layout, group=group)
    return checkpoint.train


class Checkpoint:
    """A committed step whose small files are proved; `fill` reads tensors from it."""

    def __init__(
        self,
        storage: Storage,
        resume: tuple[int, str, str],
        rename: Rename | None = None,
        near: Near | None = None,
    ) -> None:
        """Raises MissingCheckpoint, DamagedCheckpoint, StateMismatch (two names become one), StorageError."""
        self._storage, self._near = storage, near
        self._step = CommittedStep(storage, resume)
        index = self._index = self._step.atoms()
        names = {**{name: name for name in index.atoms}, **index.ties}
        scalars = {**self._decoded(index.scalars), **dict.fromkeys(index.absent, ABSENT)}
        self._first_names: Mapping[str, str] = _renamed(names, rename)
        self.atoms: Mapping[str, IndexAtom] = {
            name: index.atoms[own] for name, own in self._first_names.items()
        }
        """By every name of theirs."""
        self.scalars: Mapping[str, Json] = _renamed(scalars, rename)
        """`ABSENT` where a state was not there."""
        self.train: dict[str, Json] = self._decoded(self._step.train().train)

    def fill(
        self,
        state: MutableMapping[str, Value],
        *,
        cast: Collection[str] = (),
        layout: Layout | None = None,
        group: Group = ALONE,
    ) -> None:
        """Fill the tensors of `state` in place and replace its scalars. Raises LoadError, SpecError, UnsupportedState, StorageError."""
        told = here(layout, group.member) if layout is not None else NOTHING
        laid = Laid(told, state, {name: atom.shape for name, atom in self.atoms.items()})
        self.fill_parts(self._matched(state, told, laid.parts, cast, group), group=group)
        laid.finish()
        state.update(self.scalars)

    def fill_parts(self, parts: Iterable[Held], *, group: Group = ALONE) -> None:
        """As `fill`, for boxes that the caller has cut itself, of atoms that are known to fit. All members of a group call it, and
        together want everything."""
        once = {(part.identity, self._first_names[part.name]): part for part in parts if part.box.volume}
        wanted = [Wanted(part, name, self._index.atoms[name]) for (_, name), part in once.items()]
        Loading(self._storage, self._step, self._index, self._near, group).fill(wanted)

    def _decoded(self, values: Mapping[str, Json]) -> dict[str, Json]:
        try:
            return {name: from_json(value, name) for name, value in values.items()}
        except FormatError as error:
            raise DamagedCheckpoint(f"{self._step.folder}: {error}") from error

    def _matched(
        self,
        state: Mapping[str, Value],
        told: Here,
        laid: Sequence[Held],
        cast: Collection[str],
        group: Group,
    ) -> list[Held]:
        """All boxes to fill, which are known to fit."""
        tensors = {name: value for name, value in state.items() if isinstance(value, torch.Tensor)}
        scalars = {name: value for name, value in state.items() if name not in tensors}
        plain = {name: value for name, value in tensors.items() if not told.says(name, value)}
        # Of an atom with several names a layout may have one only.
        there = {n for n in self.atoms if not laid or n in plain or self._first_names[n] == n}
        _same_absences(scalars, self.scalars)
        holders = _holders(plain.keys() | {part.name for part in laid}, there, group)
        _same_names(tensors.keys() - told.locals.keys() | holders.keys(), there, "tensor")
        _same_names(scalars.keys(), self.scalars.keys(), "scalar")
        parts = [held(name, value, 0, holders[name]) for name, value in sorted(plain.items())]
        casts = [*cast, *(part.name for part in laid if told.locals[part.tensor].dtype is not None)]
        for part in (*parts, *laid):
            _check_form(part, self.atoms[part.name], casts)
        return [*parts, *laid]


def _check_form(part: Held, atom: IndexAtom, cast: Collection[str]) -> None:
    """Raises StateMismatch."""
    may_be_cast = any(fnmatchcase(part.name, pattern) for pattern in cast)
    if part.shape != atom.shape or not (part.dtype == atom.dtype or may_be_cast):
        how = f"; to load it as {part.dtype}, name it in cast=" if part.shape == atom.shape else ""
        raise StateMismatch(
            f"{part.name} is {atom.dtype} {list(atom.shape)} in the checkpoint, "
            f"{part.dtype} {list(part.shape)} in the state to fill{how}"
        )


def _holders(mine: Collection[str], there: Collection[str], group: Group) -> dict[str, int]:
    """The names of the checkpoint that somebody in the group has, and how many: the stages of a pipeline have each their own."""
    names = sorted(there)
    counts = group.summed([int(name in mine) for name in names])
    return {name: count for name, count in zip(names, counts, strict=True) if count}


def _renamed(table: Mapping[str, T], rename: Rename | None) -> dict[str, T]:
    if rename is None:
        return dict(table)
    found: dict[str, str] = {}
    for name in table:
        other = found.setdefault(rename(name), name)
        if other != name:
            raise StateMismatch(f"rename makes {rename(name)} of both {other} and {name} of the checkpoint")
    return {new: table[name] for new, name in found.items()}


def _same_absences(wanted: Mapping[str, object], there: Mapping[str, object]) -> None:
    for name in sorted(wanted.keys() | there.keys()):
        if (wanted.get(name) is ABSENT) != (there.get(name) is ABSENT):
            sides = ("state to fill", "checkpoint")
            here, other = sides if wanted.get(name) is ABSENT else sides[::-1]
            raise StateMismatch(
                f"{name} is absent in the {here} and not in the {other}; `load` fills what is there, and `restore` makes and "
                "removes the state of an optimizer"
            )


def _same_names(wanted: Collection[str], there: Collection[str], what: str) -> None:
    for name in sorted(set(wanted) - set(there)):
        raise StateMismatch(f"{what} {name} is not in the checkpoint{_nearest(name, there)}")
    for name in sorted(set(there) - set(wanted)):
        raise StateMismatch(
            f"{what} {name} of the checkpoint is not in the state to fill{_nearest(name, wanted)}"
        )


def _nearest(name: str, names: Collection[str]) -> str:
    near = difflib.get_close_matches(name, names, n=1)
    return f"; the nearest there is {near[0]}" if near else ""
