"""The key that the files of a job are signed with, where it has one (FORMAT.md §10).

Every process that writes or reads the checkpoints of a job needs it: ranks, the agent's checkpoint child, `stormjib ckpt`. They all find it
in the file that one environment variable names, such as a Secret that is mounted.
"""

from __future__ import annotations

import os
from pathlib import Path

from stormjib_checkpoint.errors import BadKey

KEY_FILE = "STORMJIB_CHECKPOINT_KEY_FILE"
"""Environment variable: a file whose bytes, all of them, are the key."""
SHORTEST = 16
"""Bytes; a shorter key could be guessed."""


def checked(key: bytes | None, where: str = "key") -> bytes | None:
    """The key. Raises BadKey where it is too short."""
    if key is not None and len(key) < SHORTEST:
        raise BadKey(f"{where} has {len(key)} bytes; at least {SHORTEST} random ones are needed")
    return key


def from_environment() -> bytes | None:
    """The key in the file that STORMJIB_CHECKPOINT_KEY_FILE names; None where it is not set. Raises BadKey."""
    path = os.environ.get(KEY_FILE)
    if not path:
        return None
    try:
        return checked(Path(path).read_bytes(), path)
    except OSError as error:
        raise BadKey(
            f"{KEY_FILE} names {path}, which cannot be read: {os.strerror(error.errno or 0)}"
        ) from error
