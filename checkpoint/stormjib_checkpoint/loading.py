"""Filling boxes of atoms from a committed step: read what is wanted and no more, digest it on the way, prove it with the group.

Where digests cannot prove what is read (a rank loads alone, and a part only, or none were written), and where they say that something is
wrong, whole pieces are read and proved by their checksums: that names the file, and heals what only a copy of it had wrong.
"""

from __future__ import annotations

import contextlib
from collections import defaultdict
from typing import TYPE_CHECKING, NamedTuple

from stormjib_checkpoint import layout
from stormjib_checkpoint.agreeing import agreed
from stormjib_checkpoint.boxes import Box, flaw, slabs
from stormjib_checkpoint.errors import (
    DamagedCheckpoint,
    LoadError,
    MissingCheckpoint,
    NotThere,
    StateMismatch,
    StorageError,
)
from stormjib_checkpoint.exchange import Exchange, span_of
from stormjib_checkpoint.filling import Filling, Memory, Sink, pieces
from stormjib_checkpoint.format import ITEM_BYTES
from stormjib_checkpoint.overlap import clash, put, shared
from stormjib_checkpoint.plan import Target, plan
from stormjib_checkpoint.proof import Share, unproved
from stormjib_checkpoint.step import unreadable_is_damaged
from stormjib_checkpoint.tensors import DTYPES, Held, empty, is_direct, memory

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterable, Iterator, Sequence

    import torch

    from stormjib_checkpoint.index import Index, IndexAtom
    from stormjib_checkpoint.node_memory import Near
    from stormjib_checkpoint.plan import FilePlan
    from stormjib_checkpoint.proof import Group
    from stormjib_checkpoint.sharing import Key
    from stormjib_checkpoint.step import CommittedStep
    from stormjib_checkpoint.storage import Opened, Storage

WINDOW_BYTES = 128 * 1024 * 1024
"""Of what cannot be read to its place (it lies on a device, has strides, or is of another type) so much is in memory at once."""
SLAB_BYTES = 32 * 1024 * 1024
"""And it is cut into parts of at most so much."""


class Wanted(NamedTuple):
    """A box to fill."""

    part: Held
    name: str
    """Of its atom, as the index has it."""
    atom: IndexAtom


class Loading:
    """The load of a state from one step, by this rank of a group."""

    def __init__(
        self,
        storage: Storage,
        step: CommittedStep,
        index: Index,
        near: Near | None,
        group: Group,
    ) -> None:
        self._storage, self._step, self._index, self._near, self._group = storage, step, index, near, group
        self._problem: LoadError | StorageError | None = None

    def fill(self, wanted: Sequence[Wanted]) -> None:
        """Fill every box. All members of the group call it, and together they want every atom. Raises LoadError, StorageError."""
        digested = self._digested(wanted)
        with agreed(self._group):
            apart = self._apart(wanted)
        rest = [one for number, one in enumerate(wanted) if number not in apart]
        self._carefully([one for one in rest if one.name not in digested], near=True)
        trusted = [one for one in rest if one.name in digested]
        proved = [share for one in apart.values() for share in one.shares]
        failed = unproved([*proved, *self._read(trusted)], digested, self._group)
        if failed:
            again = self._carefully([one for one in trusted if one.name in failed], near=False)
            left = {name: digested[name] for name in failed}
            failed = unproved([*(one for one in proved if one.atom in left), *again], left, self._group)
        with agreed(self._group):
            if self._problem is not None:
                raise self._problem
            if failed:
                raise DamagedCheckpoint(self._told(failed, wanted))
        for one in apart.values():
            one.goal.finish()

    def _digested(self, wanted: Sequence[Wanted]) -> dict[str, IndexAtom]:
        """The atoms that are proved by their digests: in a group all that have one, else those that are here as a whole."""
        if self._group.size > 1:
            return {name: atom for name, atom in self._index.atoms.items() if atom.digest is not None}
        boxes: defaultdict[str, set[Box]] = defaultdict(set)
        for one in wanted:
            boxes[one.name].add(one.part.box)
        return {
            one.name: one.atom
            for one in wanted
            if one.atom.digest is not None and flaw(one.atom.shape, sorted(boxes[one.name])) is None
        }

    def _apart(self, wanted: Sequence[Wanted]) -> dict[int, Apart]:
        """Boxes that share memory, by number: read elsewhere, and proved, before anything is filled. Raises StateMismatch where they
        would not all hold what they should."""
        groups = shared([one.part for one in wanted])
        numbers = {id(one.part): number for number, one in enumerate(wanted)}
        found: dict[int, Apart] = {}
        for group in groups:
            for part in group:
                number = numbers[id(part)]
                goal = Goal(Aim(wanted[number], part.box, straight=False))
                found[number] = Apart(goal, self._careful_shares([goal], near=True))
            name = clash(group, [found[numbers[id(part)]].goal.memory for part in group])
            if name is not None and self._problem is None:
                raise StateMismatch(
                    f"{name} shares memory with {_others(group, name)}, and the checkpoint has other values for the two "
                    "where they meet; give each memory of its own"
                )
        return found

    def _carefully(self, wanted: Sequence[Wanted], *, near: bool) -> list[Share]:
        """As `_read`, in whole pieces that are proved by their checksums; not `near`: from the storage alone. Who finds damage goes on,
        because the others wait; it is raised in the end."""
        shares = []
        for batch in batches(wanted):
            goals = [Goal(aim) for aim in batch]
            shares += self._careful_shares(goals, near=near)
            for goal in goals:
                goal.finish()
        return shares

    def _careful_shares(self, goals: Sequence[Goal], *, near: bool) -> list[Share]:
        sink = Sink([goal.place for goal in goals])
        for file in self._plan(goals):
            try:
                self._read_carefully(file, sink, near=near and self._is_near(file.rank))
            except (DamagedCheckpoint, MissingCheckpoint, StorageError) as error:
                self._problem = self._problem or error
        return self._shares(sink, goals)

    def _read(self, wanted: Sequence[Wanted]) -> list[Share]:
        """What is wanted, and no more, from wherever it is nearest. What cannot be read is not among what was read."""
        shares: list[Share] = []
        left = batches(wanted)
        for number in range(self._group.highest([len(left)])[0]):
            goals = [Goal(aim) for aim in left[number]] if number < len(left) else []
            sink = Sink([goal.place for goal in goals])
            for file in self._handed_on(goals, sink):
                with contextlib.suppress(DamagedCheckpoint, MissingCheckpoint, StorageError):
                    self._read_file(file, sink)
            for goal in goals:
                goal.finish()
            shares += self._shares(sink, goals)
        return shares

    def _shares(self, sink: Sink, goals: Sequence[Goal]) -> list[Share]:
        wants = [goal.aim.want for goal in goals]
        rows = ((wants[one.target], one) for one in sink.digests)
        among_all = self._group.size > 1  # who loads alone has the only copy that is looked at
        return [
            Share(want.name, want.part.copies if among_all else 1, one.elements, one.digest)
            for want, one in rows
        ]

    def _handed_on(self, goals: Sequence[Goal], sink: Sink) -> list[FilePlan]:
        """What is left to read here, when what is read once for several members of the group has come."""
        plans = self._plan(goals)
        if self._group.size == 1:
            return plans
        copies = [goal.aim.want.part.copies for goal in goals]
        near = [rank for rank in range(self._step.manifest.world) if self._is_near(rank)]
        return Exchange(self._group, near, self._bytes_of).run(plans, copies, sink)

    def _is_near(self, rank: int) -> bool:
        return self._near is not None and self._near.has(self._step.data_path(rank))

    def _plan(self, goals: Sequence[Goal]) -> list[FilePlan]:
        wants = ((goal.aim.want, goal.aim.box) for goal in goals)
        targets = [Target(want.name, box, want.part.copies) for want, box in wants]
        return plan(targets, self._index.atoms, self._storage.request_bytes, span_of(self._group.size))

    @contextlib.contextmanager
    def _opened(self, rank: int) -> Iterator[Opened]:
        """A data file, from the memory of this node where it is there. Raises MissingCheckpoint, DamagedCheckpoint, StorageError."""
        path = self._step.data_path(rank)
        with unreadable_is_damaged(), contextlib.ExitStack() as stack:
            near = self._near_file(path, stack)
            yield near or stack.enter_context(self._stored(rank))

    def _near_file(self, path: str, stack: contextlib.ExitStack) -> Opened | None:
        """None where it is not in the memory of this node, or not any more: a rank that saves takes its room."""
        if self._near is not None and self._near.has(path):
            with contextlib.suppress(StorageError):
                return stack.enter_context(self._near.open(path))
        return None

    @contextlib.contextmanager
    def _stored(self, rank: int) -> Iterator[Opened]:
        path = self._step.data_path(rank)
        written = self._step.manifest.data[layout.rank_data(rank)]
        with unreadable_is_damaged():
            try:
                with self._storage.open(path) as opened:
                    if opened.size != written:
                        raise DamagedCheckpoint(f"{path} has {opened.size} bytes; {written} were written")
                    yield opened
            except NotThere as error:
                raise self._step.lost(path) from error

    def _read_file(self, file: FilePlan, sink: Sink) -> None:
        with self._opened(file.rank) as opened:
            Filling(opened, [*file.reads, *file.strips], sink, self._damage(file.rank)).run(
                self._storage.writers
            )

    def _read_carefully(self, file: FilePlan, sink: Sink, *, near: bool) -> None:
        work = list(pieces(file, self._step.rank(file.rank).data, self._index.head_bytes(file.rank)))
        known = len(sink.digests)
        for source in (self._opened, self._stored)[not near :]:
            try:
                with source(file.rank) as opened:
                    return Filling(opened, work, sink, self._damage(file.rank)).run(self._storage.writers)
            except DamagedCheckpoint:
                del sink.digests[known:]  # of pieces that were whole; all are read again, or none counts
                if source == self._stored:
                    raise

    def _bytes_of(self, key: Key) -> bytearray:
        """What others want of a file; of no content where it cannot be read: they will see that it is not what was written."""
        found = bytearray(key.length)
        with (
            contextlib.suppress(DamagedCheckpoint, MissingCheckpoint, StorageError),
            self._opened(key.rank) as opened,
        ):
            opened.read_into(key.start, memoryview(found))
        return found

    def _damage(self, rank: int) -> Callable[[int, int], DamagedCheckpoint]:
        def damage(start: int, end: int) -> DamagedCheckpoint:
            return DamagedCheckpoint(
                f"{self._step.data_path(rank)}: bytes {start} to {end} are not those that were written; "
                f"they hold {_listed(self._index.names_in(rank, start, end)) or 'the header'}"
            )

        return damage

    def _told(self, failed: Collection[str], wanted: Sequence[Wanted]) -> str:
        """What cannot be laid to a file of the storage, as far as this rank has read it."""
        mine = [one for one in wanted if one.name in failed]
        boxes = ", ".join(f"{one.name} {one.part.box.offset}+{one.part.box.shape}" for one in mine[:3])
        files = sorted({stored.rank for one in mine for stored in one.atom.meeting(one.part.box)})
        return (
            f"{self._step.folder}: what was loaded of {_listed(sorted(failed))} does not add up to the digest that was written with it. "
            f"This rank has read {boxes or 'nothing of it'}"
            + (f" from {', '.join(self._step.data_path(rank) for rank in files[:5])}" if files else "")
        )


class Apart(NamedTuple):
    goal: Goal
    shares: list[Share]


class Aim(NamedTuple):
    """A box, or a slab of one, that is read at once."""

    want: Wanted
    box: Box
    straight: bool
    """To where it belongs."""


class Goal:
    """The memory that an aim is read to: the tensor's own, or some beside it that it is then put to its place from."""

    def __init__(self, aim: Aim) -> None:
        self.aim = aim
        part, atom = aim.want.part, aim.want.atom
        self._local = part.local if aim.box == part.box else _within(part, aim.box)
        dtype = part.local.dtype if part.dtype == atom.dtype else DTYPES[atom.dtype]
        self.memory = self._local if aim.straight else empty(aim.box.shape, dtype)
        self.place = Memory(memory(self.memory), self.memory.data_ptr(), atom.dtype, atom.shape)

    def finish(self) -> None:
        if not self.aim.straight:
            put(self._local, self.memory)


def batches(wanted: Iterable[Wanted]) -> list[list[Aim]]:
    """All aims, so many at once that no more than a window of memory is taken beside the tensors' own."""
    found: list[list[Aim]] = [[]]
    taken = 0
    for one in wanted:
        if _is_straight(one):
            found[-1].append(Aim(one, one.part.box, straight=True))
            continue
        size = ITEM_BYTES[one.atom.dtype]
        for box in slabs(one.part.box, SLAB_BYTES // size):
            if taken + box.volume * size > WINDOW_BYTES:
                found.append([])
                taken = 0
            found[-1].append(Aim(one, box, straight=False))
            taken += box.volume * size
    return found


def _is_straight(one: Wanted) -> bool:
    return is_direct(one.part.local) and one.part.dtype == one.atom.dtype


def _within(part: Held, box: Box) -> torch.Tensor:
    """The elements of a smaller box."""
    local = part.local
    for dim, (offset, size) in enumerate(zip(box.offset, box.shape, strict=True)):
        local = local.narrow(dim, offset - part.box.offset[dim], size)
    return local


def _listed(names: Sequence[str]) -> str:
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")


def _others(group: Sequence[Held], name: str) -> str:
    return _listed([part.name for part in group if part.name != name]) or "itself"
