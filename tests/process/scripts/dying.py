"""A rank that saves steps 1 and 2 and is ended by itself at a named place of step 3: `ROOT PLACE HOW VICTIMS WAIT_S`. HOW is `SIGKILL`,
`SIGTERM`, or `handled`, which is SIGTERM and a handler that ends the script. VICTIMS are ranks (`0`, `1`, `01`); for others rank 0
waits WAIT_S."""

from __future__ import annotations

import os
import signal
import sys
from concurrent.futures import Future
from functools import partial
from typing import TYPE_CHECKING, Any

import torch.distributed as dist

from fakes.lives import SOON_S, begin
from fakes.watched import watched
from stormjib_checkpoint.commit import commit_when_complete
from stormjib_checkpoint.engine import Engine, Save, engine
from stormjib_checkpoint.engine import arena as arenas
from stormjib_checkpoint.files import Posix
from stormjib_checkpoint.storage import Local

if TYPE_CHECKING:
    from collections.abc import Callable

    from fakes.watched import Call

root, place, how, victims, wait_s = sys.argv[1:]
rank = int(os.environ["RANK"])
third: Future[Save] = Future()
DATA, RECORD = f"*-00000003/*rank-{rank:05d}.safetensors*", f"*-00000003/*rank-{rank:05d}.json*"
MANIFEST = "*-00000003/*MANIFEST.json*"
PLACES = {
    "staged": ("open_new_direct", DATA, 1),
    "writing": ("write_at", DATA, 2),
    "written": ("open_new", RECORD, 1),
    "left": ("unlink", RECORD, 1),
    "committing": ("link", MANIFEST, 1),
    "committed": ("unlink", MANIFEST, 1),
}
"""A state of a save, and the call of which number with which it begins. What is staged waits for the last byte of the copy."""
seen = 0


def end() -> None:
    os.kill(os.getpid(), signal.SIGTERM if how == "handled" else signal.Signals[how])


def end_in_place(call: Call, do: Callable[..., Any]) -> Any:
    global seen
    name, path, number = PLACES[place]
    if call.is_a(name, path):
        seen += 1
        if seen == number:
            if place == "staged":
                third.result(SOON_S).staging_completion.result(SOON_S)
            end()
    return do(*call.arguments)


def end_while_copying(arena: arenas.Arena) -> None:
    take = arena.take

    def take_or_end(piece: int) -> None:
        if piece == 1:
            end()
        take(piece)

    arena.take = take_or_end  # type: ignore[method-assign]


is_victim = str(rank) in victims
arenas.PIECE_BYTES = 8192  # type: ignore[attr-defined]
if how == "handled":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
dist.init_process_group("gloo", init_method=f"file://{root}.meeting", rank=rank, world_size=2)
files = watched(Posix(), end_in_place) if is_victim and place in PLACES else Posix()
one = Engine(Local(root, files))
for step in (1, 2):
    begin(one, step).upload_completion.result(SOON_S)
if is_victim and place not in PLACES:
    end_while_copying(one._berths._berths[0].arena)
engine.commit_when_complete = partial(commit_when_complete, wait_s=float(wait_s))  # type: ignore[attr-defined]
third.set_result(begin(one, 3))
one.wait()
one.close()
