"""The header of a rank's data file: valid safetensors, so that every tool that knows them can open ours. Pure."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import TYPE_CHECKING

from stormjib_checkpoint.boxes import Box
from stormjib_checkpoint.errors import UnsupportedState
from stormjib_checkpoint.format import AS_BYTES, ITEM_BYTES

if TYPE_CHECKING:
    from collections.abc import Sequence

DATA_ALIGNMENT = 4096
"""The tensors begin on a page, for direct I/O and for memory maps."""

MAX_HEADER = 100_000_000
"""Bytes of a header that safetensors still read."""


@dataclass(frozen=True)
class Entry:
    """One tensor of the file: the box of an atom that this rank writes."""

    name: str
    dtype: str
    box: Box

    @property
    def nbytes(self) -> int:
        return self.box.volume * ITEM_BYTES[self.dtype]

    @property
    def stored(self) -> Entry:
        """As the file has it: of a type that safetensors know. Another one is bytes, along the last dimension."""
        if self.dtype not in AS_BYTES:
            return self
        size = ITEM_BYTES[self.dtype]
        shape, offset = self.box.shape or (1,), self.box.offset or (0,)
        box = Box((*offset[:-1], offset[-1] * size), (*shape[:-1], shape[-1] * size))
        return Entry(self.name, "U8", box)


def in_file_order(entries: Sequence[Entry]) -> list[Entry]:
    """Widest elements first: without holes (safetensors refuses them), every tensor is still aligned to its element."""
    return sorted(entries, key=lambda entry: (-ITEM_BYTES[entry.dtype], entry.name))


def header(entries: Sequence[Entry]) -> tuple[bytes, list[int]]:
    """The header of these entries in this order, and where each one's bytes start in the file. Raises UnsupportedState."""
    starts, table, offset = [], {}, 0
    stored = [entry.stored for entry in entries]
    for entry in stored:
        starts.append(offset)
        table[entry.name] = {
            "dtype": entry.dtype,
            "shape": list(entry.box.shape),
            "data_offsets": [offset, offset + entry.nbytes],
        }
        offset += entry.nbytes
    text = json.dumps({"__metadata__": _metadata(stored), **table}, separators=(",", ":")).encode()
    size = -(-(8 + len(text)) // DATA_ALIGNMENT) * DATA_ALIGNMENT
    if size - 8 > MAX_HEADER:
        raise UnsupportedState(
            f"the {len(entries)} tensors of this rank take a header of {len(text)} bytes, and safetensors read up to {MAX_HEADER}; "
            "save fewer or larger tensors a rank, or shorten their names"
        )
    data = (size - 8).to_bytes(8, "little") + text.ljust(size - 8)
    return data, [size + start for start in starts]


def _metadata(entries: Sequence[Entry]) -> dict[str, str]:
    """What torch's HuggingFaceStorageReader needs to put boxes of several files together."""
    boxes = {entry.name: {"saved_offsets": list(entry.box.offset)} for entry in entries}
    return {
        "format": "pt",
        "DCP_VERSION": "1.0",
        "DCP_SHARDING_INFO": json.dumps(boxes, separators=(",", ":")),
    }
