"""Phases that torch shows without the script's help: its optimizers, its compiler and its own loader."""

from __future__ import annotations

from contextlib import contextmanager
from functools import wraps
from typing import TYPE_CHECKING, Any

import torch._dynamo.callback
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook
from torch.utils.data import dataloader

from stormjib_health.wire import Phase

if TYPE_CHECKING:
    from collections.abc import Iterator

    from stormjib_health.records.ring import Recorder


def install(recorder: Recorder) -> None:
    """Record phases of this process from now on."""
    _watch_optimizers(recorder)
    _watch_compiler(recorder)
    _watch_loaders(recorder)


def _watch_optimizers(recorder: Recorder) -> None:
    def before(*_: Any) -> None:
        recorder.phase = Phase.OPTIMIZER

    def after(*_: Any) -> None:
        recorder.phase = Phase.STEP

    register_optimizer_step_pre_hook(before)
    register_optimizer_step_post_hook(after)


def _watch_compiler(recorder: Recorder) -> None:
    before = Phase.UNKNOWN

    def begins(_: Any) -> None:
        nonlocal before
        before, recorder.phase = recorder.phase, Phase.COMPILE

    def ends(_: Any) -> None:
        recorder.phase = before

    handler = torch._dynamo.callback.callback_handler
    handler.register_start_callback(begins)
    handler.register_end_callback(ends)


def _watch_loaders(recorder: Recorder) -> None:
    """The base of both kinds of iterator: a loop waits for its data in there."""
    iterator: Any = dataloader._BaseDataLoaderIter
    plain = iterator.__next__

    @wraps(plain)
    def watched(loader: Any) -> Any:
        with _data(recorder):
            return plain(loader)

    iterator.__next__ = watched


@contextmanager
def _data(recorder: Recorder) -> Iterator[None]:
    before, recorder.phase = recorder.phase, Phase.DATA
    try:
        yield
    finally:
        recorder.phase = before
