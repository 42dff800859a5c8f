"""The threads that a save goes through: to memory, and to the storage."""

from __future__ import annotations

import marshal
import os
from concurrent.futures import Future, wait
from functools import partial
from typing import TYPE_CHECKING, TypeVar

from stormjib_checkpoint import layout
from stormjib_checkpoint.engine import torn
from stormjib_checkpoint.engine.device import Fetching, Lanes
from stormjib_checkpoint.engine.flush import NICE, Handover, flush
from stormjib_checkpoint.engine.gate import Staging
from stormjib_checkpoint.engine.staging import Copying
from stormjib_checkpoint.engine.workers import IDLE, Job, Workers, spoiled_by
from stormjib_checkpoint.errors import SaveError, TornCopy
from stormjib_checkpoint.left import leave
from stormjib_checkpoint.writer import Staged, records_of, told_as_saved

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    import torch

    from stormjib_checkpoint.engine.gate import Gate
    from stormjib_checkpoint.engine.saving import Save, Taken
    from stormjib_checkpoint.left import Records
    from stormjib_checkpoint.storage import Storage

IN_FLIGHT = 2
"""Saves that are not on the storage yet; a call for one more waits, and says for how long."""
HANDS = 4
"""Threads that copy together at most while an optimizer waits: more do not make memory faster."""


T = TypeVar("T")


class HostStaging(Staging):
    """The copying of one save. It takes what processor time is left over, until an optimizer waits for it."""

    def __init__(self, hands: Workers, copy: Callable[[Future[Copying]], None], done: Future[None]) -> None:
        self._hands = hands
        self._begun: Future[Copying] = Future()
        super().__init__(Job(lambda: copy(self._begun), done))

    def hurry(self) -> None:
        """Copy in this thread too, which has nothing better to do, and in those that are kept for it; until it is done."""
        for _ in range(self._hands.threads):
            self._hands.put(Job(self._join))
        self.job.do()
        self._join()
        wait([self.job.future])

    def _join(self) -> None:
        if self._begun.exception() is None:
            self._begun.result().work()


class DeviceStaging(Staging):
    """The copying of one save that lies on a device: whoever waits for it waits on the device's stream, not on the host."""

    def __init__(self, fetch: Callable[[Future[Fetching | None]], None], done: Future[None]) -> None:
        self._asked: Future[Fetching | None] = Future()
        super().__init__(Job(lambda: fetch(self._asked), done))

    def hurry(self) -> None:
        """Until all is asked for; until it is done where something else than optimizers may change what is copied."""
        fetching = self._asked.result() if self._asked.exception() is None else None
        if fetching is not None:
            fetching.hold()
        else:
            wait([self.job.future])


class Pipeline:
    """Takes saves from the call to the storage. `commit` is asked for each step that is durable here."""

    def __init__(self, storage: Storage, gate: Gate, commit: Callable[[Save], None]) -> None:
        self._storage, self._gate, self._commit = storage, gate, commit
        self._lanes = Lanes()
        self._stage = Workers("stormjib-stage", nice=IDLE)
        # It is asked for all at once, and the host waits for that: not by who only runs while nobody else wants to.
        self._fetchers = Workers("stormjib-fetch", nice=NICE)
        self._hands = Workers("stormjib-hand", hands())
        self._tell = Workers("stormjib-tell", nice=NICE)
        self._flush = Workers("stormjib-flush", IN_FLIGHT, nice=NICE)

    def begin(self, save: Save, taken: Taken, older: Save | None) -> None:
        """Shut the gate and let it go. `older` is the save before: steps are staged, and committed, in order."""
        handover, staged = Handover(), Future[Staged]()
        tell = Job(lambda: _told(taken, staged, self._storage.key))
        store = Job(
            lambda: (
                self._to_storage(save, taken, older, handover, tell.future)
                if save.to_storage
                else _stay(tell.future)
            ),
            save.upload_completion,
        )

        # Whoever copies wakes the others: in the call each would cost more than a look at a hundred tensors.
        def wake() -> None:
            self._flush.put(store)
            self._tell.put(tell)

        staging = self._staging(save, taken, handover, staged, wake)
        self._gate.shut(staging, save.figures)
        (self._fetchers if taken.marks else self._stage).put(staging.job)

    def close(self) -> None:
        """Wait for all saves that have begun."""
        for workers in (self._stage, self._fetchers, self._hands, self._tell, self._flush):
            workers.close()

    def _staging(
        self,
        save: Save,
        taken: Taken,
        handover: Handover,
        staged: Future[Staged],
        wake: Callable[[], None],
    ) -> Staging:
        def to_memory(
            copy: Callable[[Save, Taken, Callable[[int], None], Future[T]], Staged],
        ) -> Callable[[Future[T]], None]:
            def work(begun: Future[T]) -> None:
                wake()
                self._to_memory(save, handover, begun, staged, partial(copy, save, taken, put, begun))

            return work

        put = handover.put if save.to_storage else taken.berth.arena.free

        if taken.marks:
            return DeviceStaging(to_memory(self._fetch), save.staging_completion)
        return HostStaging(self._hands, to_memory(self._copy), save.staging_completion)

    def _to_memory(
        self,
        save: Save,
        handover: Handover,
        begun: Future[T],
        staged: Future[Staged],
        copy: Callable[[], Staged],
    ) -> None:
        try:
            data = copy()
            save.figures.staged_s = save.age_s()
        except BaseException as error:
            told = spoiled_by(error)
            if not begun.done():
                begun.set_exception(told)
            handover.end(told)
            staged.set_exception(told)
            raise
        handover.end()
        staged.set_result(data)

    def _copy(self, save: Save, taken: Taken, put: Callable[[int], None], begun: Future[Copying]) -> Staged:
        found = _locals(save, taken)
        copying = Copying(taken.plan.image, _sources(taken, found), taken.berth.arena, put)
        begun.set_result(copying)
        data = copying.finish()
        _refuse_torn(save, self._copied(taken, found))
        return data

    def _fetch(
        self, save: Save, taken: Taken, put: Callable[[int], None], asked: Future[Fetching | None]
    ) -> Staged:
        found = _locals(save, taken)
        lanes = {device: self._lanes.of(device) for device in taken.marks}
        for device, mark in taken.marks.items():
            lanes[device].begin(mark)
        taken.berth.arena.pin()
        with Fetching(taken.plan.image, _sources(taken, found), taken.berth.arena, put, lanes) as fetching:
            fetching.ask()
            copied = self._copied(taken, found)
            guarded = [one for one in copied if one.trusted]
            _refuse_torn(save, guarded)
            # What others may change has to be compared when it has come, and until then nobody may go on.
            asked.set_result(fetching if len(guarded) == len(copied) else None)
            data = fetching.finish()
        _refuse_torn(save, [one for one in copied if not one.trusted])
        return data

    def _copied(self, taken: Taken, found: Sequence[torch.Tensor]) -> list[torn.Copied]:
        guarded = self._gate.guarded()
        file = taken.plan.image
        rows = zip(file.parts, file.starts, taken.tensors, taken.versions, found, strict=True)
        return [
            torn.Copied(
                part.name,
                tensor,
                version,
                local,
                taken.berth.arena.address + start,
                local.untyped_storage().data_ptr() in guarded,
            )
            for part, start, tensor, version, local in rows
            if part.name not in taken.clones
        ]

    def _to_storage(
        self, save: Save, taken: Taken, older: Save | None, handover: Handover, told: Future[Records]
    ) -> None:
        who = taken.who
        path = f"{layout.folder(who.step, who.generation)}/{layout.rank_data(who.rank)}"
        with told_as_saved(who):
            flush(self._storage, path, taken.plan.image.size, taken.berth.arena, handover)
            leave(self._storage, who.step, who.generation, who.rank, told.result())
        save.figures.durable_s = save.age_s()
        if older is not None:
            wait([older.upload_completion])
        self._commit(save)


def _locals(save: Save, taken: Taken) -> list[torch.Tensor]:
    found = taken.plan.locals_of(taken.tensors)
    if found is None:
        raise SaveError(
            f"step {save.step} is not saved: the type or the sharding of a tensor is not what it was at the save before. "
            "The next save is planned anew."
        )
    if taken.berth.slot is not None:
        taken.berth.slot.clear()
    return found


def _sources(taken: Taken, found: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    parts = taken.plan.image.parts
    return [taken.clones.get(part.name, local) for part, local in zip(parts, found, strict=True)]


def _refuse_torn(save: Save, copied: Sequence[torn.Copied]) -> None:
    name = torn.changed(copied, save.step)
    if name is not None:
        raise TornCopy(
            f"step {save.step} is not saved: {name} changed while it was copied. Call the engine's guard() before "
            "whatever changes it, or name it in volatile="
        )


def _told(taken: Taken, staged: Future[Staged], key: bytes | None) -> Records:
    """What is said of the data, once it is staged. A slot that holds it says so from then on: it is safe from the death of this process."""
    data = staged.result()
    scalars, train = marshal.loads(taken.scalars), marshal.loads(taken.train)
    records = records_of(taken.who, data, taken.plan.image, scalars, train, taken.samples, key)
    if taken.berth.slot is not None:
        taken.berth.slot.tell(records)
    return records


def _stay(told: Future[Records]) -> None:
    """Where it is: in the node's memory. Raises what has kept it from being staged."""
    told.result()


def hands() -> int:
    """Threads that help whoever waits: this rank's share of the node's processors, itself left out."""
    share = len(os.sched_getaffinity(0)) // max(1, int(os.environ.get("LOCAL_WORLD_SIZE", "1")))
    return max(0, min(share, HANDS) - 1)
