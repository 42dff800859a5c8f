"""Savers for `bench.checkpoint`: ours, and the peers with the settings that their documentation recommends. All behind one small protocol.

A peer that never syncs its files is synced here, so that "durable" means the same for all.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import tempfile
from concurrent.futures import Future
from typing import TYPE_CHECKING, Any, Protocol

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from safetensors.torch import load_file, save_file
from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions
from torch.distributed.checkpoint.state_dict_saver import AsyncCheckpointerType

from stormjib_checkpoint import reader
from stormjib_checkpoint.engine import Engine

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from pathlib import Path

    from stormjib_checkpoint.engine import Save
    from stormjib_checkpoint.tensors import Value

State = dict[str, torch.Tensor]


class Saver(Protocol):
    """One way to save. `save` is called after a step, `before_update` before the next one changes the state."""

    def save(self, state: State, step: int) -> None: ...
    def before_update(self) -> None: ...
    def durable(self) -> bool: ...
    def finish(self) -> None:
        """Wait until it is durable. Raises what went wrong."""

    def load(self, like: State) -> State: ...
    def close(self) -> None: ...


class Stormjib:
    """One configuration for every row."""

    def __init__(self, folder: Path, optimizer: torch.optim.Optimizer, state: State) -> None:
        self._engine = Engine(folder / "stormjib")
        self._engine._gate.know(optimizer)
        self._engine.reserve(state)
        self._save: Save | None = None

    def save(self, state: State, step: int) -> None:
        self._save = self._engine.async_save(state, step=step)

    def before_update(self) -> None:
        """Torch's hook does it."""

    def durable(self) -> bool:
        return self._save is not None and self._save.upload_completion.done()

    def finish(self) -> None:
        assert self._save is not None
        self._save.upload_completion.result()

    def load(self, like: State) -> State:
        assert self._save is not None
        assert self._save.point is not None
        found: dict[str, Value] = {name: torch.empty_like(value) for name, value in like.items()}
        reader.load(self._engine.storage, self._save.point, found)
        return {name: found[name] for name in like}

    def close(self) -> None:
        self._engine.close()


class Nothing:
    """The same loop without a save."""

    def save(self, state: State, step: int) -> None:
        pass

    def before_update(self) -> None:
        pass

    def durable(self) -> bool:
        return True

    def finish(self) -> None:
        pass

    def load(self, like: State) -> State:
        return like

    def close(self) -> None:
        pass


class Blocking(Nothing):
    """A function that writes a file."""

    def __init__(
        self, folder: Path, write: Callable[[State, Path], None], read: Callable[[Path], State]
    ) -> None:
        self._path, self._write, self._read = folder / "file", write, read

    def save(self, state: State, step: int) -> None:
        self._path.unlink(missing_ok=True)
        self._write(state, self._path)
        synced(self._path)
        synced(self._path.parent)

    def load(self, like: State) -> State:
        return self._read(self._path)


class Dcp(Nothing):
    """`dcp.save`, with as many writing threads as its documentation's example."""

    threads = 2

    def __init__(self, folder: Path) -> None:
        join_alone()
        self._folder, self._step = folder, 0

    @property
    def _path(self) -> str:
        return str(self._folder / f"dcp-{self._step}")

    def save(self, state: State, step: int) -> None:
        self._step = step
        dcp.state_dict_saver.save(
            as_given(state),
            storage_writer=dcp.filesystem.FileSystemWriter(self._path, thread_count=self.threads),
        )

    def load(self, like: State) -> State:
        found = {name: torch.empty_like(value) for name, value in like.items()}
        dcp.state_dict_loader.load(as_given(found), checkpoint_id=self._path, no_dist=True)
        return found


class DcpAsync(Dcp):
    """`dcp.async_save`, in a thread or in a process, with the stager that is said."""

    def __init__(self, folder: Path, kind: AsyncCheckpointerType, options: StagingOptions | None) -> None:
        super().__init__(folder)
        self._kind = kind
        self._stager = DefaultStager(options) if options else None
        self._staged: Future[Any] | None = None
        self._uploaded: Future[Any] | None = None

    def save(self, state: State, step: int) -> None:
        self._step = step
        found = dcp.state_dict_saver.async_save(
            as_given(state),
            checkpoint_id=self._path,
            async_stager=self._stager,
            async_checkpointer_type=self._kind,
        )
        if isinstance(found, Future):
            self._staged, self._uploaded = None, found
        else:
            self._staged, self._uploaded = found.staging_completion, found.upload_completion

    def before_update(self) -> None:
        if self._staged is not None:
            self._staged.result()
            self._staged = None

    def durable(self) -> bool:
        return self._uploaded is not None and self._uploaded.done()

    def finish(self) -> None:
        assert self._uploaded is not None
        self._uploaded.result()

    def close(self) -> None:
        if self._stager is not None:
            self._stager.close()


class TorchCheckpointing(Nothing):
    """Meta's torch_checkpointing, asynchronous, on the CPU; its direct I/O fails on ext4, so it is off."""

    def __init__(self, folder: Path) -> None:
        package = importlib.import_module("torch_checkpointing")
        config = importlib.import_module("torch_checkpointing.config")
        stagers = importlib.import_module("torch_checkpointing.staging")
        disks = importlib.import_module("torch_checkpointing.storage.filesystem")
        staging = stagers.CheckpointStagerConfig(use_pinned_memory=False, use_non_blocking_copy=False)
        self._manager: Any = package.CheckpointManager(
            package.CheckpointManager.Config(
                save=config.AsyncCheckpointSaverConfig(staging_config=staging),
                storage_config=disks.LocalFileSystemStorageConfig(use_direct_io=False),
            )
        )
        self._folder, self._path = folder, folder
        self._future: Any = None

    def save(self, state: State, step: int) -> None:
        self._path = self._folder / f"torch-checkpointing-{step}"
        self._future = self._manager.save(str(self._path), {"state": state})

    def before_update(self) -> None:
        with self._manager.lock():
            pass

    def durable(self) -> bool:
        return bool(self._future.done())

    def finish(self) -> None:
        self._future.result()
        for path in (*self._path.rglob("*"), self._path):
            synced(path)

    def load(self, like: State) -> State:
        found = {name: torch.empty_like(value) for name, value in like.items()}
        loaded: State = self._manager.load(str(self._path), into={"state": found})["state"]
        return loaded

    def close(self) -> None:
        self._manager.close()


def savers(folder: Path, optimizer: torch.optim.Optimizer, state: State) -> Mapping[str, Callable[[], Saver]]:
    """Makers by name. A peer that is not installed is left out."""
    thread, process = AsyncCheckpointerType.THREAD, AsyncCheckpointerType.PROCESS
    found: dict[str, Callable[[], Saver]] = {
        "stormjib": lambda: Stormjib(folder, optimizer, state),
        "torch.save": lambda: Blocking(folder, torch.save, lambda path: torch.load(path, weights_only=True)),
        "safetensors": lambda: Blocking(folder, save_file, load_file),
        "dcp.save": lambda: Dcp(folder),
        "dcp.async_save thread": lambda: DcpAsync(folder, thread, None),
        "dcp.async_save lazy stager": lambda: DcpAsync(
            folder, thread, StagingOptions(False, False, True, False)
        ),
        "dcp.async_save process": lambda: DcpAsync(folder, process, StagingOptions(False, True, True, False)),
    }
    if importlib.util.find_spec("torch_checkpointing"):
        found["torch_checkpointing"] = lambda: TorchCheckpointing(folder)
    return found


def as_given(state: State) -> dict[str, Any]:
    """DCP wants values of any type."""
    return dict(state)


def synced(path: Path) -> None:
    """Make a file or a folder durable."""
    descriptor = os.open(path, os.O_RDONLY)
    os.fsync(descriptor)
    os.close(descriptor)


def join_alone() -> None:
    """DCP's asynchronous half wants a process group, even of one."""
    if not dist.is_initialized():
        store = dist.FileStore(  # type: ignore[attr-defined]
            tempfile.mkstemp(prefix="stormjib-bench-store-")[1], 1
        )
        dist.init_process_group("gloo", store=store, rank=0, world_size=1)
