"""FORMAT.md §4 and §5.2: what a rank leaves, and in which order things come to be."""

from __future__ import annotations

import contextlib
import json
from typing import TYPE_CHECKING

import pytest
import torch
from safetensors.torch import load_file

from fakes.disk import Disk
from fakes.indices import indexed
from fakes.meshes import filled
from fakes.saving import commit_states, save_rank
from stormjib_checkpoint.boxes import Box
from stormjib_checkpoint.commit import commit_step
from stormjib_checkpoint.errors import UnsupportedState
from stormjib_checkpoint.format import (
    ITEM_BYTES,
    Atom,
    AtomsFile,
    DataFile,
    RankFile,
    StoredBox,
)
from stormjib_checkpoint.layout import GenerationId
from stormjib_checkpoint.opening import open_generation
from stormjib_checkpoint.records import decode, encode
from stormjib_checkpoint.shardfile import DATA_ALIGNMENT, Entry, header, in_file_order
from stormjib_checkpoint.storage import Local
from stormjib_checkpoint.tensors import TAGS

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator
    from pathlib import Path

    from stormjib_checkpoint.storage import Chunk, NewFile


class Watched(Local):
    """Says what came to be, in its order."""

    def __init__(self) -> None:
        super().__init__("/job", Disk())
        self.made: list[str] = []

    @contextlib.contextmanager
    def new(self, path: str, size: int) -> Iterator[NewFile]:
        with super().new(path, size) as file:
            yield file
        self.made.append(path.rpartition("/")[2])

    def create(self, path: str, chunks: Iterable[Chunk]) -> None:
        super().create(path, chunks)
        self.made.append(path.rpartition("/")[2])


def test_the_record_is_the_last_of_a_ranks_part_and_the_manifest_the_last_of_all() -> None:
    """§4.2, §5.2"""
    storage = Watched()
    open_generation(storage, "1.1", "uid")
    save_rank(
        storage,
        step=2,
        generation="1.1",
        rank=0,
        world=1,
        state={"w": torch.zeros(3)},
        train={},
        samples={1: [5], 2: [7]},
    )
    commit_step(storage, "1.1", 1, 2)
    assert storage.made == [
        "g1.1.json", "rank-00000.safetensors", "train.json", "rank-00000.json",
        "atoms.json", "00000001-00000002.jsonl", "MANIFEST.json",
    ]  # fmt: skip


def test_the_data_begins_on_a_page_and_leaves_no_holes() -> None:
    """§4.1"""
    entries = in_file_order(
        [Entry(f"w{n}", tag, Box((0, 0), (3, n + 1))) for n, tag in enumerate(ITEM_BYTES)]
    )
    head, starts = header(entries)
    assert len(head) == starts[0]
    assert starts[0] % DATA_ALIGNMENT == 0
    ends = [start + entry.nbytes for start, entry in zip(starts, entries, strict=True)]
    assert starts[1:] == ends[:-1]
    assert all(start % ITEM_BYTES[entry.dtype] == 0 for start, entry in zip(starts, entries, strict=True))


def test_others_read_the_file_and_find_no_box_of_nothing(tmp_path: Path) -> None:
    """§4.1"""
    state = {str(dtype): filled((3,), dtype, 1) for dtype in TAGS} | {"nothing": torch.zeros(0, 3)}
    commit_states(Local(tmp_path), state)
    assert load_file(tmp_path / "step-00000001/g0.1/rank-00000.safetensors").keys() == state.keys() - {
        "nothing"
    }


def test_a_name_that_is_kept_for_the_format_is_refused(tmp_path: Path) -> None:
    """§4.7"""
    with pytest.raises(UnsupportedState, match="__metadata__ begins with __, which is kept for the format"):
        commit_states(Local(tmp_path), {"__metadata__": torch.zeros(1)})


@pytest.mark.parametrize(
    ("digests", "whole"),
    [
        (("ffffffffffffffff", "0000000000000003"), "0000000000000002"),
        (("ffffffffffffffff", None), None),
    ],
)
def test_partial_digests_add_up_in_the_index(digests: tuple[str | None, ...], whole: str | None) -> None:
    """§4.8"""
    generation = GenerationId(1, 1)

    def rank(number: int, digest: str | None) -> RankFile:
        box = StoredBox(number, (number * 2,), (2,), 8, 10, digest)
        atoms = {"w": Atom("U8", (4,), (box,))}
        return RankFile(1, generation, number, 2, "", DataFile(10, 16, ("0" * 16,)), atoms, {}, (), {}, {})

    records = [decode(RankFile, encode(rank(*of)), "file") for of in enumerate(digests)]
    index = encode(indexed(records, "step"))
    assert decode(AtomsFile, index, "file").atoms["w"].digest == whole
    assert ("digest" in json.loads(index)["atoms"]["w"]) is (whole is not None), (
        "what is not there is left out"
    )
