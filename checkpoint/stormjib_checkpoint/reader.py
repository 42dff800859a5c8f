"""Loading a committed step on any number of ranks: by boxes, in place, every byte proved before it counts.

All refusals that the index can show (missing or extra names, shapes, types) come before the first byte is filled.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, TypeVar

import torch
from torch.distributed.tensor import DTensor

from stormjib_checkpoint.agreeing import agreed
from stormjib_checkpoint.errors import DamagedCheckpoint, FormatError, StateMismatch
from stormjib_checkpoint.loading import Loading, Wanted
from stormjib_checkpoint.matching import InGroup, Mine, There, check, in_group
from stormjib_checkpoint.objects import from_json
from stormjib_checkpoint.proof import Alone
from stormjib_checkpoint.spec.live import NOTHING, Laid, here
from stormjib_checkpoint.step import CommittedStep
from stormjib_checkpoint.tensors import ABSENT, held

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable, Iterator, Mapping, MutableMapping

    from stormjib_checkpoint.index import IndexAtom
    from stormjib_checkpoint.node_memory import Near
    from stormjib_checkpoint.proof import Group
    from stormjib_checkpoint.records import Json
    from stormjib_checkpoint.spec.layout import Layout
    from stormjib_checkpoint.storage import Storage
    from stormjib_checkpoint.tensors import Held, Value

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
    `cast` are patterns of names (`model.*`) that may have another type here. `layout` says how plain tensors lie that are no whole ones.
    A `group` loads together: each member calls this, for its own part, and all parts are proved as one; a rank alone proves its part by
    checksums, for which it reads whole pieces.
    Raises MissingCheckpoint, DamagedCheckpoint, StateMismatch, StorageError.
    """
    with agreed(group):
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
        """Fill the tensors of `state` in place and replace its scalars. All members of a group call it, and where one raises all do.
        Raises LoadError, SpecError, UnsupportedState, StorageError."""
        with agreed(group):
            mine, finish = self._mine(state, layout, group)
        together = in_group(self._there, mine, group)
        with agreed(group):
            check(self._there, mine, together, cast)
        self.fill_parts([*self._counted(state, mine.plain, together), *mine.laid], group=group)
        finish()
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

    @property
    def _there(self) -> There:
        return There(self.atoms, self._first_names, self.scalars)

    def _mine(
        self, state: Mapping[str, Value], layout: Layout | None, group: Group
    ) -> tuple[Mine, Callable[[], None]]:
        """What there is to fill, and what is to be done when it is filled. Raises SpecError, UnsupportedState, StateMismatch."""
        told = here(layout, group.member, group.size) if layout is not None else NOTHING
        laid = Laid(told, state, {name: atom.shape for name, atom in self.atoms.items()})
        tensors = {name: value for name, value in sorted(state.items()) if isinstance(value, torch.Tensor)}
        plain = [held(name, value, 0, 1) for name, value in tensors.items() if not told.says(name, value)]
        scalars = {name: value for name, value in state.items() if name not in tensors}
        return Mine(plain, laid.parts, told, scalars), laid.finish

    def _counted(
        self, state: Mapping[str, Value], plain: Iterable[Held], together: InGroup
    ) -> Iterator[Held]:
        """Tensors that do not say themselves how many there are of them."""
        for part in plain:
            copies = together.copies[self._first_names[part.name]]
            yield part if isinstance(state[part.name], DTensor) else replace(part, copies=copies)


def _renamed(table: Mapping[str, T], rename: Rename | None) -> dict[str, T]:
    if rename is None:
        return dict(table)
    found: dict[str, str] = {}
    for name in table:
        other = found.setdefault(rename(name), name)
        if other != name:
            raise StateMismatch(f"rename makes {rename(name)} of both {other} and {name} of the checkpoint")
    return {new: table[name] for new, name in found.items()}
