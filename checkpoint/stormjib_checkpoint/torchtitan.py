"""TorchTitan's checkpoint manager over our files: its policies as they are, only what is written, read and deleted goes through us.

    from stormjib_checkpoint.torchtitan import checkpoint_manager

    config.checkpoint = checkpoint_manager().Config(enable=True, interval=50)

Each step-N folder is a root of ours. TorchTitan itself is imported by `checkpoint_manager` only.
"""

from __future__ import annotations

import gc
import re
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import async_save, save

from stormjib_checkpoint.dcp import GatedStager, StormjibReader, StormjibWriter
from stormjib_checkpoint.dcp.roots import storage_at
from stormjib_checkpoint.history import committed, highest

if TYPE_CHECKING:
    from collections.abc import Iterator

MODEL = "model"
_STEP = re.compile(r"step-(\d+)")


@cache
def checkpoint_manager() -> Any:
    """The class, to be built by TorchTitan from its `Config`. Raises ImportError where TorchTitan is not installed.

    `async_mode` is `async_with_pinned_mem` if it is not set: the copy is made behind the optimizers' gate, in plain memory.
    """
    from torchtitan.components.checkpointer import (  # type: ignore[import-not-found,import-untyped,unused-ignore]
        CheckpointManager,
    )

    class StormjibCheckpointManager(_Ours, CheckpointManager):  # type: ignore[misc,unused-ignore]
        @dataclass(kw_only=True, slots=True)
        class Config(CheckpointManager.Config):  # type: ignore[misc,unused-ignore]
            async_mode: Literal["disabled", "async", "async_with_pinned_mem"] = "async_with_pinned_mem"

    return StormjibCheckpointManager


class _Ours:
    """What differs from TorchTitan's own manager."""

    enable: bool
    folder: str
    keep_latest_k: int
    states: dict[str, Any]
    stager: Any
    pg: Any
    _storage: Any

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if self.enable:
            self._writer, self.stager = StormjibWriter(), GatedStager()

    @torch.no_grad()
    def dcp_save(
        self,
        state_dict: dict[str, Any],
        checkpoint_id: str,
        async_mode: str,
        enable_garbage_collection: bool = False,
        to_hf: bool = False,
    ) -> Any:
        """As TorchTitan's; an export for Hugging Face is still torch's own. Raises CheckpointException, which names the key."""
        if to_hf:
            own: Any = super()
            return own.dcp_save(state_dict, checkpoint_id, async_mode, enable_garbage_collection, to_hf)
        if async_mode == "disabled":
            save(state_dict, checkpoint_id=checkpoint_id, storage_writer=self._writer)
            answer = None
        else:
            answer = async_save(
                state_dict,
                checkpoint_id=checkpoint_id,
                storage_writer=self._writer,
                async_stager=self.stager if async_mode == "async_with_pinned_mem" else None,
                process_group=self.pg,
            )
        if enable_garbage_collection:
            gc.collect()
        return answer

    def dcp_load(
        self, state_dict: dict[str, Any], checkpoint_id: str, from_hf: bool, from_quantized: bool
    ) -> None:
        """What we saved through our reader, which proves it; anything else as TorchTitan does."""
        if from_hf or highest(storage_at(checkpoint_id)) is None:
            own: Any = super()
            own.dcp_load(state_dict, checkpoint_id, from_hf, from_quantized)
            return
        load(state_dict, checkpoint_id=checkpoint_id, storage_reader=StormjibReader())
        if MODEL in self.states:
            self.states[MODEL].load_state_dict(state_dict)

    def _find_load_step(self, folder: str = "") -> int:
        """The newest step that is committed, or that TorchTitan's own manager has saved there before; -1: none."""
        own: Any = super()
        return int(max([own._find_load_step(folder), *self._committed(folder or self.folder)]))

    def _purge_stale_checkpoints(self) -> None:
        """Delete what is older than the newest `keep_latest_k` *committed* steps: saves that failed do not count."""
        own: Any = self
        if not own._should_purge():
            return
        kept = sorted(self._committed(self.folder))[-self.keep_latest_k :]
        if len(kept) < self.keep_latest_k:
            return
        for step, path in self._folders(self.folder):
            if step < kept[0]:
                own.purge_queue.put(path)

    def _committed(self, folder: str) -> list[int]:
        return [step for step, path in self._folders(folder) if committed(storage_at(path))]

    def _folders(self, folder: str) -> Iterator[tuple[int, str]]:
        if not self._storage.isdir(folder):
            return
        for name in self._storage.listdir(folder):
            match = _STEP.fullmatch(name)
            if match:
                yield int(match[1]), f"{folder}/{name}"
