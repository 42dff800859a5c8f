"""Real ranks with real engines over Gloo: what one layout has saved, another loads and trains on from, bit for bit; and what is read for it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from fakes import gloo, reshard_ranks
from fakes.staging import flip
from stormjib_checkpoint.history import committed
from stormjib_checkpoint.node_memory import staged
from stormjib_checkpoint.step import CommittedStep
from stormjib_checkpoint.storage import Local

pytestmark = pytest.mark.timeout(120)
SMALL = 1024
"""Bytes of scalars, and of gaps that are read too."""


class Job:
    """A root, and the whole state of what is saved there."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.root, self.full = folder, folder / "job", folder / "saved.safetensors"

    def saved(self, shape: tuple[int, ...], world: int) -> Job:
        gloo.run(world, self.folder, reshard_ranks.save, shape, str(self.root), str(self.full))
        return self

    def load(self, body: Any, shape: tuple[int, ...], world: int, nodes: tuple[int, ...] = ()) -> list[int]:
        """Bytes that each rank has read of the storage's data files."""
        out = self.folder / f"out-{world}"
        gloo.run(world, self.folder, body, shape, str(self.root), str(self.full), nodes, str(out))
        return [json.loads(Path(f"{out}-{rank}.json").read_text()) for rank in range(world)]

    @property
    def bytes(self) -> int:
        return sum(one.numel() * one.element_size() for one in load_file(self.full).values())

    def memory(self, rank: int) -> Path:
        return Path(reshard_ranks.node(str(self.root), rank))


def test_of_eight_ranks_one_is_lost_with_its_node_seven_go_on_and_then_eight(tmp_path: Path) -> None:
    """Rows 36, 4 and 5: from the storage comes what the lost node had, and nothing else."""
    job = Job(tmp_path).saved((8,), 8)
    shutil.rmtree(job.memory(3))
    left = (0, 1, 2, 4, 5, 6, 7)
    read = job.load(reshard_ranks.go_on, (7,), 7, left)
    assert job.bytes / 9 < sum(read) <= job.bytes / 8 + SMALL
    job.full = tmp_path / "out-7.safetensors"
    read = job.load(reshard_ranks.load, (8,), 8)
    assert sum(read) <= 1.05 * job.bytes + SMALL


def test_replicas_of_shards_become_other_replicas_of_other_shards(tmp_path: Path) -> None:
    """Row 28: two replicas of four shards, three replicas of two."""
    job = Job(tmp_path).saved((2, 4), 8)
    read = job.load(reshard_ranks.go_on, (3, 2), 6)
    assert sum(read) <= 1.05 * job.bytes + SMALL, "each byte once, although three ranks want it"


def test_replicas_read_once_and_hand_on(tmp_path: Path) -> None:
    """Row 1: one rank, then four that have the whole each. One rank of a group of one reads it as one without a group does."""
    job = Job(tmp_path).saved((), 1)
    (alone,) = job.load(reshard_ranks.load, (), 1)
    assert job.bytes <= alone <= 1.05 * job.bytes + SMALL
    read = job.load(reshard_ranks.go_on, (), 4)
    assert job.bytes <= sum(read) <= 1.05 * job.bytes + SMALL


def test_what_is_wrong_in_one_nodes_memory_only_is_healed_from_the_storage(tmp_path: Path) -> None:
    job = Job(tmp_path).saved((4,), 4)
    nodes = (0, 1, 2)
    whole = sum(job.load(reshard_ranks.load, (3,), 3, nodes))
    assert whole <= job.bytes / 4 + SMALL
    (copy,) = staged(job.memory(1))
    flip(copy.slot.data, copy.record.data.bytes - 5)
    healed = sum(job.load(reshard_ranks.load, (3,), 3, nodes))
    assert healed > whole, "what did not add up was read again"


def test_damage_of_the_storage_is_told_to_every_rank_alike(tmp_path: Path) -> None:
    job = Job(tmp_path).saved((3,), 3)
    point = committed(Local(job.root))[0]
    file = job.root / CommittedStep(Local(job.root), point).data_path(1)
    flip(file, file.stat().st_size - 5)
    for chosen, error in ((tuple(point), "DamagedCheckpoint"), (None, "")):
        out = tmp_path / f"told-{error}"
        gloo.run(2, tmp_path, reshard_ranks.refused, (2,), str(job.root), chosen, str(out))
        told = [json.loads(Path(f"{out}-{rank}.json").read_text()) for rank in (0, 1)]
        if error:
            assert [one[0] for one in told] == [error] * 2
            assert any("rank-00001.safetensors: bytes" in one[1] for one in told)
        else:
            assert [one[0] for one in told] == ["NoUsableCheckpoint", "HistoryError"]
