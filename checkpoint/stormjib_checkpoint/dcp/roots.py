"""What DCP calls a checkpoint_id, as a storage."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from stormjib_checkpoint.stores.urls import open_storage

if TYPE_CHECKING:
    from stormjib_checkpoint.storage import Storage

Root = str | os.PathLike[str]

OURS = "dcp"
"""Key in `train.json` of what DCP saves besides tensors: `objects` by name, and `paths`, where each name lies in the nested state."""


def storage_at(root: Root | Storage) -> Storage:
    """The storage of a folder or of the URL of a store, or the one that was given."""
    return open_storage(root) if isinstance(root, (str, os.PathLike)) else root


def is_root(checkpoint_id: object) -> bool:
    """Whether `storage_at` takes it."""
    return isinstance(checkpoint_id, (str, os.PathLike))
