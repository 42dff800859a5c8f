"""What digests should be, and what the records of a step say they are."""

from __future__ import annotations

import ctypes
import json
from typing import TYPE_CHECKING

from fakes.meshes import raw
from stormjib_checkpoint import digest
from stormjib_checkpoint.boxes import whole
from stormjib_checkpoint.tensors import TAGS

if TYPE_CHECKING:
    from pathlib import Path

    import torch


def of(tensor: torch.Tensor) -> str:
    """The digest of a whole tensor, all at once."""
    data, shape = raw(tensor), tuple(tensor.shape)
    memory = ctypes.create_string_buffer(data)
    box = digest.geometry(shape, whole(shape))
    return digest.text(digest.partial(ctypes.addressof(memory), TAGS[tensor.dtype], box, 0, tensor.numel()))


def said(root: Path, step: int) -> dict[str, str]:
    """The digest of every atom, as the records of all ranks of a step give it."""
    folder = next(root.glob(f"step-{step:08}/*"))
    partials: dict[str, list[int]] = {}
    for path in sorted(folder.glob("rank-*.json")):
        for name, atom in json.loads(path.read_text())["atoms"].items():
            partials.setdefault(name, []).extend(digest.number(box["digest"]) for box in atom["boxes"])
    return {name: digest.text(digest.add(found)) for name, found in partials.items()}
