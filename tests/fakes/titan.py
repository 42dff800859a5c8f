"""The seam of TorchTitan's checkpoint manager, as far as ours touches it, for machines without TorchTitan: same calls, same order."""

from __future__ import annotations

import importlib.util
import os
import queue
import shutil
import sys
from dataclasses import dataclass, replace
from types import ModuleType
from typing import TYPE_CHECKING, Any, ClassVar

import torch.distributed as dist
from torch.distributed.checkpoint.stateful import Stateful

if TYPE_CHECKING:
    from collections.abc import Callable


class Model(Stateful):
    """Model parts as one flat state dict."""

    def __init__(self, parts: list[Any]) -> None:
        self.parts = parts

    def state_dict(self) -> dict[str, Any]:
        return {name: value for part in self.parts for name, value in part.state_dict().items()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        for part in self.parts:
            part.load_state_dict(state_dict, strict=False)


class Folders:
    isdir = staticmethod(os.path.isdir)
    listdir = staticmethod(os.listdir)


class CheckpointManager:
    @dataclass(kw_only=True, slots=True)
    class Config:
        _owner: ClassVar[Any] = None
        enable: bool = False
        folder: str = "checkpoint"
        interval: int = 500
        keep_latest_k: int = 10
        last_save_model_only: bool = True
        async_mode: str = "disabled"

        def build(self, **kwargs: Any) -> Any:
            return self._owner(config=replace(self), **kwargs)

    def __init_subclass__(cls) -> None:
        cls.Config._owner = cls

    def __init__(self, config: Config, *, base_folder: str, states: dict[str, Any], **parts: Any) -> None:
        self.enable, self.interval, self.keep_latest_k = (
            config.enable,
            config.interval,
            config.keep_latest_k,
        )
        self.folder, self.async_mode = f"{base_folder}/{config.folder}", config.async_mode
        self.states = states | {
            "model": Model(parts["model_parts"]),
            "optimizer": parts["optimizers"],
            "dataloader": parts["dataloader"],
            "lr_scheduler": parts["lr_schedulers"],
        }
        self.pg = dist.new_group(backend="gloo")
        self._storage = Folders()
        self.stager: Any = None
        self.staging_future: Any = None
        self.save_future: Any = None
        self.purge_queue: queue.SimpleQueue[str] = queue.SimpleQueue()

    def save(self, curr_step: int, last_step: bool = False) -> bool:
        if curr_step % self.interval and not last_step:
            return False
        if self.save_future is not None:
            self.save_future.result()
        ours: Any = self
        mode = "disabled" if last_step else self.async_mode
        answer = ours.dcp_save(self._flat(), checkpoint_id=f"{self.folder}/step-{curr_step}", async_mode=mode)
        if answer is not None:
            self.staging_future, self.save_future = answer.staging_completion, answer.upload_completion
        if last_step:
            return True
        self._purge_stale_checkpoints()
        while not self.purge_queue.empty():
            shutil.rmtree(self.purge_queue.get())
        return True

    def load(self, step: int = -1) -> bool:
        step = self._find_load_step() if step == -1 else step
        if step == -1:
            return False
        ours: Any = self
        ours.dcp_load(
            self._flat(), checkpoint_id=f"{self.folder}/step-{step}", from_hf=False, from_quantized=False
        )
        return True

    def maybe_wait_for_staging(self) -> None:
        if self.staging_future is not None:
            self.staging_future.result()
            self.staging_future = None

    def close(self) -> None:
        if self.stager is not None:
            self.stager.close()

    def _find_load_step(self, folder: str = "") -> int:
        return -1

    def _should_purge(self) -> bool:
        return self.keep_latest_k > 0 and dist.get_rank() == 0

    def _purge_stale_checkpoints(self) -> None:
        raise NotImplementedError

    def _flat(self) -> dict[str, Any]:
        rest = {name: value for name, value in self.states.items() if name != "model"}
        return {**rest, **self.states["model"].state_dict()}


def install(put: Callable[[Any, str, ModuleType], None] = dict.__setitem__) -> None:
    """Have `import torchtitan.components.checkpointer` find it, where there is no TorchTitan. `put` sets in `sys.modules`."""
    if importlib.util.find_spec("torchtitan") is not None:
        return
    for name in ("torchtitan", "torchtitan.components", "torchtitan.components.checkpointer"):
        put(sys.modules, name, ModuleType(name))
    sys.modules["torchtitan.components.checkpointer"].CheckpointManager = CheckpointManager  # type: ignore[attr-defined]
