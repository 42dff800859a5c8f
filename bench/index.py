"""What the index of a checkpoint of 512 ranks costs: its bytes, to commit it, and to read it and plan from it, beside DCP's `.metadata`.

    python -m bench.index [--quick] [--json FILE]

A Llama of 70 billion parameters, its weights and two moments of each: 2172 tensors. Nobody needs the tensors: records are made of what every
rank would have written. All times are processor time of one core. DCP's figures are those of 100 of the tensors, as many times as there are hundreds.
"""

from __future__ import annotations

import argparse
import gc
import pickle
import time
import zlib
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from rich.console import Console
from torch import Size
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list

from bench.table import Row, show, write_json
from stormjib_checkpoint.boxes import Box, part, whole
from stormjib_checkpoint.format import PIECE_BYTES, Atom, AtomsFile, DataFile, RankFile, StoredBox
from stormjib_checkpoint.index import Index
from stormjib_checkpoint.indexing import Indexing
from stormjib_checkpoint.layout import GenerationId
from stormjib_checkpoint.records import decode, encode
from stormjib_checkpoint.shardfile import Entry, header, in_file_order

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

WORLD, TARGETS = 512, 384
ROUNDS = 9
EVERY = 8
"""Of so many ranks one is measured in the commit."""
DCP_TENSORS = 100
HIDDEN, INNER, VOCABULARY, KEYS = 8192, 28672, 128256, 1024
ACROSS = (".wo.", ".w2.")
"""Weights that tensor parallelism cuts along their second dimension."""
DIGEST = "0123456789abcdef"


class Tensor(NamedTuple):
    """A tensor of the state."""

    name: str
    dtype: str
    shape: tuple[int, ...]


class Layout(NamedTuple):
    """How the ranks of a job hold a state."""

    name: str
    of: Callable[[Tensor, int], tuple[Box, bool]]
    """A rank's box of a tensor, and whether the rank writes it."""
    steps: bool = False
    """Whether each weight has a step besides its moments: a scalar, which all ranks have."""


def weights(layers: int) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Names and shapes."""
    layer = {"wq": (HIDDEN, HIDDEN), "wk": (KEYS, HIDDEN), "wv": (KEYS, HIDDEN), "wo": (HIDDEN, HIDDEN)}
    inner = {"w1": (INNER, HIDDEN), "w2": (HIDDEN, INNER), "w3": (INNER, HIDDEN)}
    for n in range(layers):
        yield from ((f"layers.{n}.attention.{name}.weight", shape) for name, shape in layer.items())
        yield from ((f"layers.{n}.feed_forward.{name}.weight", shape) for name, shape in inner.items())
        yield from ((f"layers.{n}.{name}_norm.weight", (HIDDEN,)) for name in ("attention", "ffn"))
    yield from (("tok_embeddings.weight", (VOCABULARY, HIDDEN)), ("output.weight", (VOCABULARY, HIDDEN)))
    yield from (("norm.weight", (HIDDEN,)), ("rope.freqs", (64,)))


def state(layers: int, steps: bool) -> list[Tensor]:
    """All tensors, by name."""
    found = []
    for name, shape in weights(layers):
        found.append(Tensor(f"model.{name}", "BF16", shape))
        found += [Tensor(f"optim.{name}.{key}", "F32", shape) for key in ("exp_avg", "exp_avg_sq")]
        found += [Tensor(f"optim.{name}.step", "F32", ())] if steps else []
    return sorted(found)


def fsdp(world: int, copies: int = 1) -> Callable[[Tensor, int], tuple[Box, bool]]:
    """Fully sharded over the ranks of each of some copies."""
    shards = world // copies

    def of(tensor: Tensor, rank: int) -> tuple[Box, bool]:
        if not tensor.shape:
            return whole(()), zlib.crc32(tensor.name.encode()) % world == rank
        return part(whole(tensor.shape), 0, shards, rank % shards), rank < shards

    return of


def fsdp_tp(tensor: Tensor, rank: int) -> tuple[Box, bool]:
    """Cut 8 ways by tensor parallelism, and each part over 64 ranks. Norms are not cut by tensor parallelism."""
    index, group = rank % 8, rank // 8
    if len(tensor.shape) == 1:
        return part(whole(tensor.shape), 0, 64, group), index == 0
    dim = 1 if any(word in tensor.name for word in ACROSS) else 0
    return part(part(whole(tensor.shape), dim, 8, index), 0, 64, group), True


LAYOUTS = (
    Layout("FSDP 512", fsdp(WORLD)),
    Layout("FSDP 512, and 724 steps", fsdp(WORLD), steps=True),
    Layout("HSDP 2 x 256", fsdp(WORLD, copies=2)),
    Layout("FSDP 64 x TP 8", fsdp_tp),
)


def record(tensors: Sequence[Tensor], layout: Layout, rank: int) -> RankFile:
    """What one rank would have said."""
    held = {tensor: layout.of(tensor, rank) for tensor in tensors}
    mine = [Entry(t.name, t.dtype, box) for t, (box, primary) in held.items() if primary and box.volume]
    entries = in_file_order(mine)
    head, starts = header(entries)
    stored = {
        entry.name: StoredBox(rank, entry.box.offset, entry.box.shape, start, start + entry.nbytes, DIGEST)
        for entry, start in zip(entries, starts, strict=True)
    }
    atoms = {
        t.name: Atom(t.dtype, t.shape, (stored[t.name],) if t.name in stored else ())
        for t, (box, _) in held.items()
        if box.volume
    }
    end = max((box.end for box in stored.values()), default=len(head))
    data = DataFile(end, PIECE_BYTES, (DIGEST,) * -(-end // PIECE_BYTES))
    return RankFile(100, GenerationId(1, 1), rank, WORLD, "", data, atoms, {}, (), {}, {})


class Committed(NamedTuple):
    """A step that was committed."""

    data: bytes
    """The index."""
    sizes: list[int]
    """Of the data files."""
    ranks: list[float]
    """Milliseconds for reading the record of a rank and adding it to the index, of some ranks."""
    last: float
    """Milliseconds for making the index of all."""


def commit(tensors: Sequence[Tensor], layout: Layout) -> Committed:
    """As a committer does it, without a storage."""
    indexing, sizes, ranks = Indexing("step"), [], []
    for rank in range(WORLD):
        found = record(tensors, layout, rank)
        sizes.append(found.data.bytes)
        if rank % EVERY:
            indexing.add(found)
            continue
        data = encode(found)
        began = time.process_time()
        indexing.add(decode(RankFile, data, "rank"))
        ranks.append(1e3 * (time.process_time() - began))
    began = time.process_time()
    index = encode(indexing.index())
    return Committed(index, sizes, ranks, 1e3 * (time.process_time() - began))


def plan(step: Committed, tensors: Sequence[Tensor], rank: int) -> tuple[float, float]:
    """Milliseconds to read the index, and then to find all that one of the target ranks needs, which is fully sharded."""
    wanted = [(t.name, part(whole(t.shape), 0, TARGETS, rank) if t.shape else whole(())) for t in tensors]
    gc.collect()  # what others have left is not to be cleared away in this time
    began = time.process_time()
    index = Index(decode(AtomsFile, step.data, "atoms.json"), step.sizes, "step")
    read = time.process_time()
    for name, box in wanted:
        index.atoms[name].meeting(box)
    return 1e3 * (read - began), 1e3 * (time.process_time() - read)


def ours(layout: Layout, layers: int) -> Iterator[Row]:
    """One layout under Stormjib."""
    tensors = state(layers, layout.steps)
    step = commit(tensors, layout)
    found = [plan(step, tensors, rank * TARGETS // ROUNDS) for rank in range(ROUNDS)]
    yield Row.of("index", layout.name, "stormjib", [len(step.data) / 1e6], "MB")
    yield Row.of("read the index", layout.name, "stormjib", [read for read, _ in found], "ms")
    yield Row.of("plan for one rank", layout.name, "stormjib", [planned for _, planned in found], "ms")
    yield Row.of("read and plan", layout.name, "stormjib", [sum(one) for one in found], "ms")
    yield Row.of("commit: each rank's record", layout.name, "stormjib", step.ranks, "ms")
    yield Row.of("commit: the index of all", layout.name, "stormjib", [step.last], "ms")


def dcp_metadata(tensors: Sequence[Tensor], layout: Layout) -> Metadata:
    """DCP's index, with where each chunk lies."""
    chunks: dict[str, TensorStorageMetadata] = {}
    places: dict[MetadataIndex, _StorageInfo] = {}
    for tensor in tensors:
        boxes = [layout.of(tensor, rank) for rank in range(WORLD)]
        held = [(rank, box) for rank, (box, primary) in enumerate(boxes) if primary and box.volume]
        chunks[tensor.name] = TensorStorageMetadata(
            TensorProperties(), Size(tensor.shape), [_chunk(box) for _, box in held]
        )
        for number, (rank, box) in enumerate(held):
            index = MetadataIndex(tensor.name, Size(box.offset), number)
            places[index] = _StorageInfo(f"__{rank}_0.distcp", 4 * number * box.volume, 4 * box.volume)
    return Metadata(dict(chunks), storage_data=places)


def _chunk(box: Box) -> ChunkStorageMetadata:
    return ChunkStorageMetadata(Size(box.offset), Size(box.shape))


def dcps(layout: Layout, layers: int, rounds: int) -> Iterator[Row]:
    """The same layout under DCP, from some of the tensors."""
    every = state(layers, layout.steps)
    tensors = every[:: len(every) // DCP_TENSORS][:DCP_TENSORS]
    times = len(every) / len(tensors)
    data = pickle.dumps(dcp_metadata(tensors, layout))
    found = [_dcp_plan(data, tensors, rank * TARGETS // rounds) for rank in range(rounds)]
    case = f"{layout.name}, extrapolated from {len(tensors)} tensors"
    yield Row.of("index", case, "DCP", [times * len(data) / 1e6], "MB")
    yield Row.of("read the index", case, "DCP", [times * read for read, _ in found], "ms")
    yield Row.of("plan for one rank", case, "DCP", [times * planned for _, planned in found], "ms")
    yield Row.of("read and plan", case, "DCP", [times * sum(one) for one in found], "ms")


def _dcp_plan(data: bytes, tensors: Sequence[Tensor], rank: int) -> tuple[float, float]:
    wanted = [(t.name, _chunk(part(whole(t.shape), 0, TARGETS, rank))) for t in tensors]
    gc.collect()
    began = time.process_time()
    metadata = pickle.loads(data)
    read = time.process_time()
    for name, chunk in wanted:
        create_read_items_for_chunk_list(name, metadata.state_dict_metadata[name], [chunk])
    return 1e3 * (read - began), 1e3 * (time.process_time() - read)


def main() -> None:
    """Run the bench."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="FSDP 512 only, and a tenth of the layers")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    layers = 8 if options.quick else 80
    rows: list[Row] = []
    for layout in LAYOUTS[:1] if options.quick else LAYOUTS:
        rows += ours(layout, layers)
        if not layout.steps:
            rows += dcps(layout, layers, 3)
    Console().print(show(rows))
    if options.json:
        write_json(options.json, rows, ["torch"])


if __name__ == "__main__":
    main()
