"""DCP's storage writer over our files: each rank's items in one file with piece hashes, committed by a manifest.

DCP decides which rank writes what. Rank 0 leaves its record last, because only then it has been told of all values that are no tensors.
"""

from __future__ import annotations

import logging
import threading
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, cast

import torch
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.checkpoint.planner import WriteItemType
from torch.distributed.checkpoint.storage import StorageWriter, WriteResult

from stormjib_checkpoint import layout
from stormjib_checkpoint.boxes import Box
from stormjib_checkpoint.commit import commit_when_complete
from stormjib_checkpoint.dcp.roots import OURS, Root, is_root, storage_at
from stormjib_checkpoint.engine.arena import Arena
from stormjib_checkpoint.engine.flush import Handover, flush
from stormjib_checkpoint.engine.staging import Copying
from stormjib_checkpoint.engine.tidier import Tidier
from stormjib_checkpoint.engine.workers import Job, Workers
from stormjib_checkpoint.errors import SaveError, UnsupportedState
from stormjib_checkpoint.format import RESERVED, Atom
from stormjib_checkpoint.image import Image, image_of
from stormjib_checkpoint.layout import GenerationId
from stormjib_checkpoint.left import leave
from stormjib_checkpoint.opening import open_next
from stormjib_checkpoint.tensors import TAGS, Held, held
from stormjib_checkpoint.writer import Part, Staged, records_of, refuse_unstorable, told_as_saved

if TYPE_CHECKING:
    from torch.distributed.checkpoint.metadata import Metadata
    from torch.distributed.checkpoint.planner import SavePlan, SavePlanner, WriteItem
    from torch.futures import Future

    from stormjib_checkpoint.storage import Storage

_log = logging.getLogger(__name__)


@dataclass
class _Line:
    """The generation that saves into one root belong to, and the step that the next one is."""

    generation: GenerationId
    step: int
    tidier: Tidier


class _Saving(threading.local):
    """One save: DCP makes all of its calls in one thread, and several saves in several."""

    storage: Storage | None = None
    left: tuple[Part, Staged, Image] | None = None
    """Rank 0: what its record will say."""


class StormjibWriter(StorageWriter):
    """`dcp.save(state, checkpoint_id=folder, storage_writer=StormjibWriter())`, and the same with `dcp.async_save`.

    One may be used for all saves. Tensors, DTensors and plain values can be saved; what would need a pickle raises UnsupportedState, which
    names the key (DCP hands it on in its CheckpointException). Not for `use_collectives=False`, `async_checkpointer_type=PROCESS` and plans
    that are cached.
    """

    def __init__(self, root: Root | Storage | None = None, *, keep_last: int = 2) -> None:
        """`root` is for calls that name no checkpoint_id. `keep_last`: how many saves into one root are kept."""
        self._given = storage_at(root, write=True) if root is not None else None
        self._keep_last = keep_last
        self._now = _Saving()
        self._lines: dict[object, _Line] = {}
        self._arena: Arena | None = None

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: Root) -> bool:
        """Whether it can be a root."""
        return is_root(checkpoint_id)

    def reset(self, checkpoint_id: Root | None = None) -> None:
        """The next save of this thread goes there."""
        self._now.storage = storage_at(checkpoint_id, write=True) if checkpoint_id is not None else None

    def set_up_storage_writer(self, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        """Raises SaveError where DCP is asked for what it cannot do with us."""
        if not kwargs.get("use_collectives", True):
            raise SaveError("use_collectives=False leaves no rank that could commit the step; leave it out")
        self._storage()

    def prepare_local_plan(self, plan: SavePlan) -> SavePlan:
        """As it is."""
        return plan

    def prepare_global_plan(self, plans: list[SavePlan]) -> list[SavePlan]:
        """Rank 0 says for all which step this is."""
        if not all(plan.usable for plan in plans):
            raise SaveError("cached plans name the step before; leave out enable_plan_caching of the planner")
        line = self._line()
        step, line.step = line.step, line.step + 1
        parts = [Part(step, line.generation, rank, len(plans)) for rank in range(len(plans))]
        return [replace(plan, storage_data=part) for plan, part in zip(plans, parts, strict=True)]

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        """Leave this rank's part. Raises UnsupportedState, StorageError, ArenaTooLarge."""
        who = cast("Part", plan.storage_data)
        objects = {item.index.fqn: _object(item, planner) for item in plan.items if _is_object(item)}
        refuse_unstorable(objects, "state")
        file = image_of(_parts(plan, planner), who.rank, {})
        with told_as_saved(who):
            data = self._write(who, file)
            if who.rank == 0:
                self._now.left = who, data, file
            else:
                _leave(self._storage(), who, data, file, {})
        done: Future[list[WriteResult]] = torch.futures.Future()
        done.set_result([_result(item, objects) for item in plan.items])
        return done

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        """Rank 0: all parts are there, so its record and the commit. Raises CommitError, StorageError."""
        if self._now.left is None:
            raise SaveError(
                "finish without write_data: rank 0 of the process group has to be the coordinator"
            )
        (who, data, file), self._now.left = self._now.left, None
        storage, known = self._storage(), metadata.state_dict_metadata
        told = [result for of_rank in results for result in of_rank]
        objects = {
            result.index.fqn: result.storage_data
            for result in told
            if not isinstance(known[result.index.fqn], TensorStorageMetadata)
        }
        train = {OURS: {"objects": objects, "paths": dict(metadata.planner_data or {})}}
        _leave(storage, who, data, replace(file, atoms=_all_atoms(metadata) | file.atoms), train)
        commit_when_complete(storage, str(who.generation), who.world, who.step)
        self._line().tidier.ask(str(who.generation), self._keep_last)

    def _storage(self) -> Storage:
        storage = self._now.storage or self._given
        if storage is None:
            raise SaveError("nobody said where to save: name checkpoint_id=, or give StormjibWriter a folder")
        return storage

    def _line(self) -> _Line:
        storage = self._storage()
        place = getattr(storage, "root", storage)
        if place not in self._lines:
            opening = open_next(storage)
            for note in opening.notes:
                _log.warning("%s", note)
            step = opening.resume.step + 1 if opening.resume is not None else 0
            self._lines[place] = _Line(GenerationId.parse(opening.generation), step, Tidier(storage))
        return self._lines[place]

    def _write(self, who: Part, file: Image) -> Staged:
        """Copied and hashed by this thread, written by others: they are nicer than a training loop may be."""
        if self._arena is None or self._arena.size < file.size:
            self._arena = None  # before the larger one: never two at a time
            self._arena = Arena(file.size)
        arena, handover, storage = self._arena, Handover(), self._storage()
        path = f"{layout.folder(who.step, who.generation)}/{layout.rank_data(who.rank)}"
        copying = Copying(file, [part.local for part in file.parts], arena, handover.put)
        writing = Workers("stormjib-flush")
        durable = writing.put(Job(lambda: flush(storage, path, file.size, arena, handover)))
        failed: BaseException | None = None
        try:
            data = copying.finish()
        except BaseException as error:
            failed = error
            raise
        finally:
            handover.end(failed)
            writing.close()
        durable.future.result()
        return data


def _leave(storage: Storage, who: Part, data: Staged, file: Image, train: dict[str, Any]) -> None:
    records = records_of(who, data, file, {}, train, {}, storage.key)
    leave(storage, who.step, who.generation, who.rank, records)


def _is_object(item: WriteItem) -> bool:
    return item.type is WriteItemType.BYTE_IO


def _object(item: WriteItem, planner: SavePlanner) -> object:
    """The value itself: `resolve_data` would give it pickled."""
    look_up = getattr(planner, "lookup_object", None)
    if look_up is None:
        raise UnsupportedState(
            f"{item.index.fqn} is no tensor, and a {type(planner).__name__} gives such values pickled only; "
            "derive it from DefaultSavePlanner"
        )
    return look_up(item.index)


def _parts(plan: SavePlan, planner: SavePlanner) -> list[Held]:
    found: dict[str, Held] = {}
    for item in plan.items:
        if _is_object(item):
            continue
        name = item.index.fqn
        if name in found or name.startswith(RESERVED):
            why = f"begins with {RESERVED}" if name not in found else "comes in several parts on one rank"
            raise UnsupportedState(f"{name} {why}, which the format does not hold; rename or convert it")
        found[name] = _part(item, planner)
    return list(found.values())


def _part(item: WriteItem, planner: SavePlanner) -> Held:
    name, said = item.index.fqn, item.tensor_data
    local = cast("torch.Tensor", planner.resolve_data(item)).detach()
    if said is None or tuple(local.shape) != tuple(said.chunk.sizes):
        raise UnsupportedState(f"{name} has shape {list(local.shape)} here; its plan says something else")
    box = Box(tuple(said.chunk.offsets), tuple(said.chunk.sizes))
    return replace(held(name, local, 0, 1), shape=tuple(said.size), box=box)


def _result(item: WriteItem, objects: dict[str, object]) -> WriteResult:
    size = item.tensor_storage_size() or 0
    return WriteResult(index=item.index, size_in_bytes=size, storage_data=objects.get(item.index.fqn))


def _all_atoms(metadata: Metadata) -> dict[str, Atom]:
    """Every tensor of all ranks, so that one that nobody wrote is noticed in the commit."""
    return {
        name: Atom(TAGS[entry.properties.dtype], tuple(entry.size), ())
        for name, entry in metadata.state_dict_metadata.items()
        if isinstance(entry, TensorStorageMetadata)
    }
