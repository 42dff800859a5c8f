"""Which saves to delete (pure), what has to be proved before, and deleting so that a crash never leaves half a committed step.

Never deleted: the step that the current generation resumed from, the last `keep_last` (at least two) committed steps
of its history, the last two that were read again and found whole, what may still become a commit, and the ledger. Nothing
at all once a higher generation exists. Only order counts: no clock is asked how old anything is.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

from stormjib_checkpoint import layout
from stormjib_checkpoint.errors import DamagedCheckpoint, MissingCheckpoint, Superseded
from stormjib_checkpoint.history import (
    committed_of,
    read_generation,
    refuse_superseded,
    saves,
)
from stormjib_checkpoint.layout import GenerationId

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterable, Iterator, Mapping

    from stormjib_checkpoint.format import GenerationFile, ResumePoint
    from stormjib_checkpoint.storage import Storage

KEEP_AT_LEAST = 2
"""One good step is no fall-back."""
SHARE = 1 / 20
"""Of the time of a disk, and of a processor, that proving takes: training must not notice it. Where a disk reads 1.3 GB/s, 1 GB takes 16 s."""


@dataclass(frozen=True)
class Save:
    """One generation's folder of one step."""

    step: int
    generation: GenerationId


@dataclass(frozen=True)
class Known:
    """What was found out about committed saves by reading every byte of them."""

    whole: Collection[Save] = ()
    flawed: Collection[Save] = ()
    reading: Save | None = None
    """The one that is being read."""


def plan(
    every: Iterable[Save],
    good: Collection[Save],
    record: GenerationFile,
    keep_last: int,
    known: Known | None = None,
) -> list[Save]:
    """The saves to delete, oldest first. `good`: committed in the history of `record`'s generation. Pure.

    Where fewer than two are known to be whole, the oldest stand in for them: all stay while there are few, and where steps come faster
    than they can be read, those in between go. So no more than `keep_last` + 4 committed saves stay, but for flawed ones.
    """
    known = known or Known()
    own = [save.step for save in good if save.generation == record.generation]
    if not own:
        return []  # until it has committed a step itself, a new generation judges nobody's files
    sound = _newest_first(save for save in good if save not in known.flawed)
    whole = [save for save in sound if save in known.whole][:KEEP_AT_LEAST]
    unproved = [save for save in sound if save not in whole]
    oldest = unproved[::-1][: KEEP_AT_LEAST - len(whole)]
    keep = {*sound[: max(keep_last, KEEP_AT_LEAST)], *whole, *oldest, known.reading}
    if record.resume is not None:
        keep.add(Save(record.resume.step, GenerationId.parse(record.resume.generation)))
    if len(whole) == KEEP_AT_LEAST:
        keep |= {save for save in known.flawed if save.step > whole[-1].step}
    else:
        keep |= {*known.flawed}  # one bad read may be the reader's own fault
    return [
        save
        for save in sorted(every, key=lambda save: (save.step, save.generation))
        if save not in keep
        and save.generation <= record.generation
        and not (save.generation == record.generation and save.step > max(own))
    ]


def to_prove(good: Iterable[Save], known: Known) -> Save | None:
    """The save to read next: the newest of the last two sound ones that nobody has read. Pure."""
    last = _newest_first(save for save in good if save not in known.flawed)[:KEEP_AT_LEAST]
    return next((save for save in last if save not in known.whole), None)


def rest_s(took_s: float) -> float:
    """How long to leave a disk alone that has been read for `took_s` seconds. Whatever disk it is, the slower for whatever reason, the
    longer. Pure."""
    return took_s * (1 / SHARE - 1)


def _newest_first(saves: Iterable[Save]) -> list[Save]:
    return sorted(saves, key=lambda save: save.step, reverse=True)


class _Reading(NamedTuple):
    save: Save
    pieces: Iterator[None]


class _Proofs:
    """Reads committed saves, and remembers what it has found."""

    def __init__(self, storage: Storage, tell: Callable[[str], None]) -> None:
        self._storage, self._tell = storage, tell
        self._whole: set[Save] = set()
        self._flawed: set[Save] = set()
        self._reading: _Reading | None = None
        self._can_read = True

    @property
    def reading(self) -> bool:
        return self._reading is not None

    @property
    def known(self) -> Known:
        return Known(self._whole, self._flawed, self._reading.save if self._reading is not None else None)

    def begin(self, good: Mapping[Save, ResumePoint]) -> None:
        """Choose one to read, unless one is being read, and forget those that are gone."""
        self._whole &= good.keys()
        self._flawed &= good.keys()
        save = to_prove(good, self.known) if self._reading is None and self._can_read else None
        if save is None:
            return
        try:  # here, not above: where ranks save, there is what they hash with
            from stormjib_checkpoint.verify import proving
        except ModuleNotFoundError as error:  # ranks of another Python have saved
            self._can_read = False
            self._tell(
                f"no step can be proved here, so the oldest two stay: {error}. Install it for the agent."
            )
        else:
            self._reading = _Reading(save, proving(self._storage, good[save]))

    def read_on(self) -> None:
        """One piece. Where the storage cannot be asked, nothing is known of the save. Raises StorageError."""
        reading, self._reading = self._reading, None
        if reading is None:
            return
        try:
            next(reading.pieces)
        except StopIteration:
            self._whole.add(reading.save)
        except MissingCheckpoint:
            pass  # by now it is deleted
        except DamagedCheckpoint as error:
            self._flawed.add(reading.save)
            name = f"step {reading.save.step} of {reading.save.generation}"
            self._tell(f"{name} is damaged and does not count, older ones stay: {error}")
        else:
            self._reading = reading


class Retention:
    """Deletes old saves of a storage, and proves the newest before they are relied on; in slices, by whoever has time.

    `tell` gets what a person should know: that a step is damaged.
    """

    def __init__(
        self,
        storage: Storage,
        tell: Callable[[str], None],
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self.rest_s = 0.0
        """How long to wait before the next slice."""
        self._storage, self._clock = storage, clock
        self._proofs = _Proofs(storage, tell)
        self._asked: tuple[GenerationId, int] | None = None
        self._due = False

    @property
    def busy(self) -> bool:
        """Whether `work` has something to do."""
        return self._due or self._proofs.reading

    def ask(self, generation: str, keep_last: int) -> None:
        """`generation` has committed a step: keep its last `keep_last`."""
        self._asked, self._due = (GenerationId.parse(generation), keep_last), True

    def work(self) -> None:
        """One slice: delete, or read 16 MiB at most. Raises StorageError, HistoryError; then there is no more to do until asked again."""
        self.rest_s = 0.0
        if self._due and self._asked is not None:
            self._due = False
            self._delete(*self._asked)
        elif self._proofs.reading:
            began = self._clock()
            self._proofs.read_on()
            self._due = not self._proofs.reading
            self.rest_s = rest_s(self._clock() - began)

    def _delete(self, own: GenerationId, keep_last: int) -> None:
        if not _superseded(self._storage, own):
            every, good = _found(self._storage, own)
            self._proofs.begin(good)
            record = read_generation(self._storage, own)
            _delete_all(self._storage, own, plan(every, good, record, keep_last, self._proofs.known))


def retain(
    storage: Storage,
    generation: str,
    keep_last: int,
    along: Callable[[Iterable[Any], str], Iterable[Any]] = lambda items, _: items,
    tell: Callable[[str], None] = print,
) -> list[str]:
    """Prove the newest two steps, at once and without rests, and then delete what `plan` says; the folders deleted. Deletes nothing where
    superseded. `along` gets what there is to do, and a word for it, and gives it back one by one: for a progress bar. Raises StorageError."""
    own = GenerationId.parse(generation)
    if _superseded(storage, own):
        return []
    every, good = _found(storage, own)
    known = _proved(storage, good, along, tell)
    saves = plan(every, good, read_generation(storage, own), keep_last, known)
    return _delete_all(storage, own, along(saves, "deleting"))


def _proved(
    storage: Storage,
    good: Mapping[Save, ResumePoint],
    along: Callable[[Iterable[Any], str], Iterable[Any]],
    tell: Callable[[str], None],
) -> Known:
    proofs = _Proofs(storage, tell)

    def pieces() -> Iterator[None]:
        proofs.begin(good)
        while proofs.reading:
            proofs.read_on()
            yield
            proofs.begin(good)

    for _ in along(pieces(), "reading"):
        pass
    return proofs.known


def _superseded(storage: Storage, own: GenerationId) -> bool:
    try:
        refuse_superseded(storage, own)
    except Superseded:
        return True
    return False


def _delete_all(storage: Storage, own: GenerationId, doomed: Iterable[Save]) -> list[str]:
    """One save after the other, as long as no higher generation is there; their folders."""
    deleted: list[str] = []
    for save in doomed:
        if _superseded(storage, own):
            break
        delete(storage, save)
        deleted.append(layout.folder(save.step, save.generation))
    return deleted


def doomed(storage: Storage, generation: str, keep_last: int) -> list[str]:
    """The folders that `retain` would delete if the newest two steps are whole."""
    own = GenerationId.parse(generation)
    every, good = _found(storage, own)
    known = Known(whole=_newest_first(good)[:KEEP_AT_LEAST])
    found = plan(every, good, read_generation(storage, own), keep_last, known)
    return [layout.folder(save.step, save.generation) for save in found]


def _found(storage: Storage, own: GenerationId) -> tuple[list[Save], dict[Save, ResumePoint]]:
    """Every save that a listing shows, and those that are committed in the history of `own`."""
    every = [Save(*save) for save in saves(storage)]
    points = committed_of(storage, own, ((save.step, save.generation) for save in every))
    return every, {Save(point.step, GenerationId.parse(point.generation)): point for point in points}


def delete(storage: Storage, save: Save) -> None:
    """Delete one save: its manifest first and durably, so that it is never a committed step with parts missing. Whatever a listing
    says, which may not show it."""
    folder = layout.folder(save.step, save.generation)
    storage.remove(folder, [layout.MANIFEST])
    storage.remove(folder, storage.names(folder))
    storage.remove_folder(folder)
    storage.remove_folder(layout.step_folder(save.step))
