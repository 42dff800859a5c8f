"""FORMAT.md §7.1: more than a thousand random places are damaged, one at a time; each is found on load, none is loaded silently.

What a load has no use for (the headers of data files, and the records of ranks) harms no load, and is found by who verifies the step.
"""

from __future__ import annotations

import random
from typing import TYPE_CHECKING, NamedTuple

import pytest
import torch

from fakes.disk import Disk
from fakes.saving import save_rank
from stormjib_checkpoint.commit import commit_step
from stormjib_checkpoint.engine import Engine
from stormjib_checkpoint.engine import arena as arenas
from stormjib_checkpoint.errors import DamagedCheckpoint, MissingCheckpoint
from stormjib_checkpoint.opening import open_generation
from stormjib_checkpoint.reader import load
from stormjib_checkpoint.shardfile import DATA_ALIGNMENT
from stormjib_checkpoint.storage import Local
from stormjib_checkpoint.verify import verify

if TYPE_CHECKING:
    from collections.abc import Callable

    from stormjib_checkpoint.format import ResumePoint

WORLD = 2
ROOT = "/job"
FOLDER = f"{ROOT}/step-00000020/g1.1"
RECORDS = ["MANIFEST.json", "atoms.json", "train.json", "rank-00000.json", "rank-00001.json"]
DATA = ["rank-00000.safetensors", "rank-00001.safetensors"]


class Saved(NamedTuple):
    """Steps 10 and 20 on a disk, and step 20 as another attempt at the same training would have left it."""

    disk: Disk
    twenty: ResumePoint
    other: Disk

    @property
    def storage(self) -> Local:
        return Local(ROOT, self.disk)


def state_of(step: int) -> dict[str, torch.Tensor]:
    """Two tensors for each of the ranks, of several pieces each."""
    chance = torch.Generator().manual_seed(step)
    return {
        "a": torch.rand(40, 50, generator=chance),
        "b": torch.rand(3000, generator=chance).bfloat16(),
        "c": torch.rand(1100, generator=chance, dtype=torch.float64),
        "d": torch.rand(5000, generator=chance),
    }


def commit(storage: Local, step: int, seed: int, attempt: str = "") -> ResumePoint:
    for rank in range(WORLD):
        save_rank(
            storage,
            step=step,
            generation="1.1",
            rank=rank,
            world=WORLD,
            state=state_of(seed),
            train={"step": seed},
            samples={step: [step + rank]},
            attempt=attempt,
        )
    return commit_step(storage, "1.1", WORLD, step)


@pytest.fixture(scope="module")
def saved() -> Saved:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(arenas, "PIECE_BYTES", 4096)
        disk, other = Disk(), Disk()
        for one in (disk, other):
            open_generation(Local(ROOT, one), "1.1", "uid")
            commit(Local(ROOT, one), 10, 10)
        commit(Local(ROOT, other), 20, 21, "1")
        twenty = commit(Local(ROOT, disk), 20, 20)
    assert len(disk.content(f"{FOLDER}/{DATA[1]}")) > 3 * 4096
    return Saved(disk, twenty, other)


def flip(data: bytes, chance: random.Random) -> bytes:
    torn = bytearray(data)
    torn[chance.randrange(len(data))] ^= 1 << chance.randrange(8)
    return bytes(torn)


def hole(data: bytes, chance: random.Random) -> bytes:
    """Zeros, as a lost sector leaves them; also shorter ones."""
    size = chance.choice((1, 16, 512, 4096))
    start = chance.randrange(len(data)) // size * size
    return data[:start] + bytes(len(data[start : start + size])) + data[start + size :]


def truncation(data: bytes, chance: random.Random) -> bytes:
    return data[: chance.randrange(len(data))]


def longer(data: bytes, chance: random.Random) -> bytes:
    return data + chance.choice((b"\0", b" ", b"\n", bytes(4096)))


HOW: dict[Callable[[bytes, random.Random], bytes], int] = {flip: 100, hole: 40, truncation: 20, longer: 4}
"""How a file is damaged, and at how many places of each file."""


def is_of_no_use(name: str, whole: bytes, data: bytes) -> bool:
    """Whether a load needs nothing of what differs."""
    same_content = len(data) == len(whole) and data[DATA_ALIGNMENT:] == whole[DATA_ALIGNMENT:]
    return same_content if name in DATA else name.startswith("rank-")


def is_found(saved: Saved, name: str, data: bytes) -> None:
    """With this in the place of a file, loading fails and names the file. Where a load needs nothing of it, verifying does."""
    path = f"{FOLDER}/{name}"
    whole = saved.disk.content(path)
    saved.disk.damage(path, data)
    found = {key: value.zero_() for key, value in state_of(0).items()}
    try:
        if is_of_no_use(name, whole, data):
            load(saved.storage, saved.twenty, found)
            assert all(torch.equal(found[key], value) for key, value in state_of(20).items())
            assert name in told_by_verify(saved)
        else:
            with pytest.raises(DamagedCheckpoint, match=name.replace(".", r"\.")):
                load(saved.storage, saved.twenty, found)
    finally:
        saved.disk.damage(path, whole)


def told_by_verify(saved: Saved) -> str:
    try:
        return " ".join(path for path, flaw in verify(saved.storage, saved.twenty) if flaw is not None)
    except DamagedCheckpoint as error:
        return str(error)


@pytest.mark.parametrize("name", [*RECORDS, *DATA])
@pytest.mark.parametrize("how", HOW)
def test_damage_is_found_at_every_place(
    saved: Saved, name: str, how: Callable[[bytes, random.Random], bytes]
) -> None:
    """§7.1"""
    chance = random.Random(f"{name} {how.__name__}")
    whole = saved.disk.content(f"{FOLDER}/{name}")
    count = 0
    while count < HOW[how]:
        torn = how(whole, chance)
        if torn != whole:
            is_found(saved, name, torn)
            count += 1


def test_these_are_more_than_a_thousand_places() -> None:
    assert sum(HOW.values()) * len([*RECORDS, *DATA]) >= 1000


@pytest.mark.parametrize("name", [*RECORDS, *DATA])
def test_a_file_of_another_step_rank_or_attempt_is_found(saved: Saved, name: str) -> None:
    others = [saved.disk.content(f"{ROOT}/step-00000010/g1.1/{name}")]
    others += [saved.other.content(f"{FOLDER}/{name}")]
    others += [saved.disk.content(f"{FOLDER}/{other}") for other in [*RECORDS, *DATA] if other != name]
    whole = saved.disk.content(f"{FOLDER}/{name}")
    different = set(others) - {whole}  # two attempts have equal indices where they hold the same tensors
    assert len(different) >= len(others) - 1
    for other in different:
        is_found(saved, name, other)


def test_all_that_was_damaged_was_what_loads(saved: Saved) -> None:
    """The positive control: with every file as it was, the step loads bit for bit."""
    found = {name: value.zero_() for name, value in state_of(0).items()}
    assert load(saved.storage, saved.twenty, found) == {"step": 20}
    assert all(torch.equal(found[name], value) for name, value in state_of(20).items())


@pytest.mark.parametrize("name", [*RECORDS, *DATA])
@pytest.mark.parametrize("how", [*HOW, "missing"])
def test_after_damage_the_group_goes_on_from_the_step_before(
    saved: Saved, name: str, how: Callable[[bytes, random.Random], bytes] | str
) -> None:
    """The opener has no digest of the newest manifest but its own, so of that file it finds only what says something else of the
    step; in any case what is loaded is a whole step, bit for bit."""
    disk, chance = Disk(saved.disk.tree.copy()), random.Random(f"{name} {how}")
    if callable(how):
        disk.damage(f"{FOLDER}/{name}", how(disk.content(f"{FOLDER}/{name}"), chance))
    else:
        disk.unlink(f"{FOLDER}/{name}")
    engine = Engine(Local(ROOT, disk))
    found = {key: value.zero_() for key, value in state_of(0).items()}
    train = engine.load(found)
    engine.close()
    assert train is not None
    now = disk.content(f"{FOLDER}/{name}") if callable(how) else b""
    unharmed = name in DATA and is_of_no_use(name, saved.disk.content(f"{FOLDER}/{name}"), now)
    assert train["step"] == (20 if unharmed else 10) or name == "MANIFEST.json"
    assert all(torch.equal(found[key], value) for key, value in state_of(train["step"]).items())


def test_without_its_manifest_a_step_is_missing(saved: Saved) -> None:
    disk = Disk(saved.disk.tree.copy())
    disk.unlink(f"{FOLDER}/MANIFEST.json")
    with pytest.raises(MissingCheckpoint):
        load(Local(ROOT, disk), saved.twenty, dict(state_of(0)))
