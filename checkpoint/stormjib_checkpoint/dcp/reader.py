"""DCP's storage reader over our files, whoever wrote them: every byte is proved before the load counts, and nothing is unpickled."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch.distributed.checkpoint._traverse import set_element
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import LoadItemType
from torch.distributed.checkpoint.storage import StorageReader

from stormjib_checkpoint.boxes import Box
from stormjib_checkpoint.dcp.roots import OURS, Root, is_root, storage_at
from stormjib_checkpoint.errors import LoadError, MissingCheckpoint, StateMismatch
from stormjib_checkpoint.history import at_newest, committed
from stormjib_checkpoint.reader import Checkpoint
from stormjib_checkpoint.tensors import ABSENT, DTYPES, TAGS, Held

if TYPE_CHECKING:
    from torch.distributed.checkpoint.planner import LoadPlan, LoadPlanner, ReadItem
    from torch.futures import Future

    from stormjib_checkpoint.format import ResumePoint
    from stormjib_checkpoint.index import IndexAtom
    from stormjib_checkpoint.records import Json
    from stormjib_checkpoint.storage import Storage


class StormjibReader(StorageReader):
    """`dcp.load(state, checkpoint_id=folder, storage_reader=StormjibReader())`: what StormjibWriter or an Engine saved there.

    The newest committed step of the history, or `step`. Where retention takes it away while it is read, MissingCheckpoint is raised: load
    again, and it is the newest there is then. Errors of ours (DamagedCheckpoint, MissingCheckpoint) come in DCP's
    CheckpointException.
    """

    def __init__(self, root: Root | Storage | None = None, *, step: int | None = None) -> None:
        """`root` is for calls that name no checkpoint_id."""
        self._storage = storage_at(root) if root is not None else None
        self._step = step
        self._point: ResumePoint | None = None
        self._checkpoint: Checkpoint | None = None

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: Root) -> bool:
        """Whether it can be a root."""
        return is_root(checkpoint_id)

    def reset(self, checkpoint_id: Root | None = None) -> None:
        """The next load comes from there."""
        if checkpoint_id is not None:
            self._storage = storage_at(checkpoint_id)

    def read_metadata(self, *_args: Any, **_options: Any) -> Metadata:
        """What the step holds, as DCP wants to be told. Raises MissingCheckpoint, DamagedCheckpoint."""
        if self._storage is None:
            raise LoadError("nobody said what to load: name checkpoint_id=, or give StormjibReader a folder")
        self._checkpoint = self._opened(self._storage)
        named: dict[str, TensorStorageMetadata | BytesStorageMetadata] = {
            name: _tensor(atom) for name, atom in self._checkpoint.atoms.items()
        }
        named.update({name: BytesStorageMetadata() for name in self._objects()})
        paths = self._checkpoint.train.get(OURS, {}).get("paths", {})
        return Metadata(named, planner_data={name: paths.get(name, (name,)) for name in named})

    def set_up_storage_reader(self, metadata: Metadata, is_coordinator: bool, *_: Any, **__: Any) -> None:
        """Nothing is left to do."""

    def prepare_local_plan(self, plan: LoadPlan) -> LoadPlan:
        """Tell rank 0 which step this rank has found."""
        return replace(plan, storage_data=self._point)

    def prepare_global_plan(self, plans: list[LoadPlan]) -> list[LoadPlan]:
        """All ranks load the same step. Raises LoadError where one was committed while they looked."""
        found = sorted({plan.storage_data for plan in plans})
        if len(found) > 1:
            steps = ", ".join(f"{point.step} of generation {point.generation}" for point in found)
            raise LoadError(f"the ranks have found different steps: {steps}; name one with step=")
        return plans

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        """Fill what the planner points to. Raises DamagedCheckpoint, StateMismatch, StorageError."""
        checkpoint = self._read()
        tensors = [item for item in plan.items if item.type is LoadItemType.TENSOR]
        targets = [planner.resolve_tensor(item).detach() for item in tensors]
        parts = [
            _part(item, target, checkpoint.atoms[item.storage_index.fqn])
            for item, target in zip(tensors, targets, strict=True)
        ]
        checkpoint.fill_parts(parts)
        for item, target in zip(tensors, targets, strict=True):
            planner.commit_tensor(item, target)
        objects = self._objects()
        for item in plan.items:
            if item.type is LoadItemType.BYTE_IO:
                _put_object(planner, item, objects[item.storage_index.fqn])
        done: Future[None] = torch.futures.Future()
        done.set_result(None)
        return done

    def _opened(self, storage: Storage) -> Checkpoint:
        def use(point: ResumePoint) -> Checkpoint:
            self._point = point
            return Checkpoint(storage, point)

        return at_newest(storage, use) if self._step is None else use(_of_step(storage, self._step))

    def _objects(self) -> dict[str, Json]:
        checkpoint = self._read()
        scalars = {name: value for name, value in checkpoint.scalars.items() if value is not ABSENT}
        return {**scalars, **checkpoint.train.get(OURS, {}).get("objects", {})}

    def _read(self) -> Checkpoint:
        if self._checkpoint is None:
            raise LoadError("read_metadata comes first")
        return self._checkpoint


def _of_step(storage: Storage, step: int) -> ResumePoint:
    points = committed(storage)
    found = next((point for point in points if point.step == step), None)
    if found is None:
        known = ", ".join(str(point.step) for point in points) or "none"
        raise MissingCheckpoint(f"step {step} is not committed in this history; there are: {known}")
    return found


def _tensor(atom: IndexAtom) -> TensorStorageMetadata:
    chunks = [ChunkStorageMetadata(torch.Size(one.offset), torch.Size(one.shape)) for one in atom.boxes]
    properties = TensorProperties(dtype=DTYPES[atom.dtype])
    return TensorStorageMetadata(properties, torch.Size(atom.shape), chunks)


def _part(item: ReadItem, target: torch.Tensor, atom: IndexAtom) -> Held:
    """What an item asks for, in the coordinates of the whole tensor."""
    chunk = item.storage_index.offset or torch.Size([0] * len(atom.shape))
    offset = tuple(one + other for one, other in zip(chunk, item.storage_offsets, strict=True))
    # Of another type than the checkpoint's, which DCP allows, it is converted.
    box = Box(offset, tuple(item.lengths))
    return Held(item.storage_index.fqn, TAGS[target.dtype], atom.shape, box, target, primary=True, copies=1)


def _put_object(planner: LoadPlanner, item: ReadItem, value: Json) -> None:
    """As DefaultLoadPlanner.load_bytes does, which wants a pickle."""
    name = item.dest_index.fqn
    if not isinstance(planner, DefaultLoadPlanner):
        raise StateMismatch(
            f"{name} is no tensor, and a {type(planner).__name__} takes such values pickled only; "
            "derive it from DefaultLoadPlanner"
        )
    if planner.flatten_state_dict:
        set_element(planner.original_state_dict, planner.mappings[name], value)
    else:
        planner.state_dict[name] = value
