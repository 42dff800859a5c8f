"""Whether the giver of copies is alive: a lock on their folder, which the keeper holds while its connection is alive.

The kernel lets go of it when the keeper's process dies: then nobody knows better than that the giver may be dead.
"""

from __future__ import annotations

import contextlib
import fcntl
from typing import TYPE_CHECKING

from stormjib_checkpoint.peers.frames import PeerRefused

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

_LOCK = "lock"


@contextlib.contextmanager
def held(folder: Path) -> Iterator[None]:
    """Hold the lock of a giver's copies. Raises PeerRefused where another connection of it does: the dead one is noticed soon."""
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    with open(folder / _LOCK, "wb") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise PeerRefused(f"another connection gives copies to {folder}") from error
        yield


def giver_lives(folder: Path) -> bool:
    """Whether the giver of these copies is connected now: it will see to its own steps."""
    try:
        with open(folder / _LOCK, "rb") as lock:
            fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except FileNotFoundError:
        pass
    return False
