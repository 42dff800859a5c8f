"""Saves, commits, deletes and loads below ROOT. Each call of the port for files is seen in a system call trace between two marks, calls of
`stat` on names that do not exist. At the end, and to show that it would be seen, one look at ROOT that goes past the port."""

from __future__ import annotations

import contextlib
import os
import sys
from typing import TYPE_CHECKING, Any

import torch

from fakes.watched import watched
from stormjib_checkpoint.commit import commit_step
from stormjib_checkpoint.engine import Engine
from stormjib_checkpoint.files import Posix
from stormjib_checkpoint.history import committed
from stormjib_checkpoint.retention import retain
from stormjib_checkpoint.storage import Local
from stormjib_checkpoint.verify import verify

if TYPE_CHECKING:
    from collections.abc import Callable

    from fakes.watched import Call


def mark(word: str) -> None:
    with contextlib.suppress(FileNotFoundError):
        os.stat(f"/stormjib-port/{word}")


def marked(call: Call, do: Callable[..., Any]) -> Any:
    mark(f"enter/{call.name}")
    try:
        return do(*call.arguments)
    finally:
        mark("leave")


root = sys.argv[1]
storage = Local(root, watched(Posix(), marked))
state: dict[str, Any] = {"table": torch.zeros(3_000_000), "lr": 0.1}
engine = Engine(storage)
for step in range(1, 5):
    state["table"].add_(1)
    engine.async_save(state, step=step, train={"step": step}, samples={step: [step]})
    engine.wait()
engine.close()
retain(storage, engine.generation, 2)  # what comes first, proving, the engine may not have had time for
assert [point.step for point in committed(storage)] == [4, 3]
commit_step(storage, engine.generation, 1, 4)  # once more, as another committer would
again = Engine(storage)
assert again.resume is not None
assert again.load(state) == {"step": 4}
assert [flaw for _, flaw in verify(storage, again.resume)] == [None]
again.close()
mark("past")
os.listdir(root)
