"""A step that is staged in the node's memory outlives its rank, and is read from there."""

from __future__ import annotations

import errno
import os
import threading
import time
from contextlib import contextmanager
from typing import TYPE_CHECKING

import pytest
import torch

from fakes.saving import until_left
from fakes.staging import flip
from stormjib_checkpoint import layout
from stormjib_checkpoint.adopting import adopt
from stormjib_checkpoint.engine import Engine
from stormjib_checkpoint.engine import arena as arenas
from stormjib_checkpoint.errors import SaveError, StorageError, UnsupportedState
from stormjib_checkpoint.files import Posix
from stormjib_checkpoint.history import committed
from stormjib_checkpoint.layout import GenerationId
from stormjib_checkpoint.node_memory import Near, staged
from stormjib_checkpoint.opening import open_next
from stormjib_checkpoint.reader import load
from stormjib_checkpoint.storage import Local

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

PIECE, PIECES = 8192, 4
SOON_S = 10.0


@pytest.fixture(autouse=True)
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(arenas, "PIECE_BYTES", PIECE)


class Cut(Posix):
    """A disk that is gone from some call on, as it is for a process that is killed there."""

    def __init__(self) -> None:
        self.takes: tuple[str, ...] | None = None
        """Files that still get their name; None: all do."""
        self.before: Callable[[], object] = lambda: None

    def link(self, source: str, target: str) -> None:
        self.before()
        if self.takes is not None and os.path.basename(target) not in self.takes:
            raise OSError(errno.EIO, "the disk is gone")
        super().link(source, target)


@pytest.fixture
def disk() -> Cut:
    return Cut()


@pytest.fixture
def places(tmp_path: Path) -> tuple[Path, Path]:
    return tmp_path / "job", tmp_path / "memory"


def state(value: float) -> dict[str, torch.Tensor]:
    return {"table": torch.full(((PIECES - 1) * PIECE // 4,), value)}


@pytest.fixture
def engine(places: tuple[Path, Path], disk: Cut) -> Iterator[Engine]:
    """Of a rank that has saved step 1 for good, and whose disk goes when a test says so."""
    one = Engine(Local(places[0], disk), memory=places[1])
    saved(one, 1)
    yield one
    one.close()


def saved(engine: Engine, step: int) -> None:
    engine.async_save(state(step), step=step, train={"step": step}).upload_completion.result(SOON_S)


def lost(engine: Engine, step: int) -> None:
    """A step that is staged and never gets to the disk."""
    save = engine.async_save(state(step), step=step, train={"step": step})
    with pytest.raises(StorageError):
        save.upload_completion.result(SOON_S)
    assert engine._memory is not None
    deadline = time.monotonic() + SOON_S
    while step not in [one.record.step for one in staged(engine._memory)]:  # another thread says it
        assert time.monotonic() < deadline
        time.sleep(0.001)


def resumed(root: Path, near: Near | None = None) -> int:
    """The step that the next generation resumes from, proved whole."""
    storage = Local(root)
    point = open_next(storage).resume
    assert point is not None
    found = state(0)
    assert load(storage, point, found, near=near) == {"step": point.step}
    assert torch.equal(found["table"], state(point.step)["table"])
    return point.step


DATA = layout.rank_data(0)


@pytest.mark.parametrize("there", [(), (DATA,), (DATA, layout.TRAIN)])
def test_what_a_dead_rank_had_staged_is_finished(
    engine: Engine, places: tuple[Path, Path], disk: Cut, there: tuple[str, ...]
) -> None:
    """Whatever of its files had got to the disk."""
    disk.takes = there
    lost(engine, 2)
    adopted = adopt(Local(places[0]), places[1])
    assert (adopted.parts, adopted.notes) == (((2, 0),), ())
    assert adopt(Local(places[0]), places[1]).parts == (), "the second time there is nothing left to do"
    assert resumed(places[0]) == 2


def test_of_two_steps_in_memory_both_are_finished(
    engine: Engine, places: tuple[Path, Path], disk: Cut
) -> None:
    disk.takes = ()
    lost(engine, 2)
    lost(engine, 3)
    assert adopt(Local(places[0]), places[1]).parts == ((2, 0), (3, 0))
    assert resumed(places[0]) == 3


def test_a_call_that_is_refused_takes_no_slot_from_the_save_before(
    engine: Engine, places: tuple[Path, Path], disk: Cut
) -> None:
    disk.takes = ()
    lost(engine, 2)
    with pytest.raises(UnsupportedState):
        engine.async_save(state(3), step=3, train={"when": object()})
    lost(engine, 3)
    assert sorted(one.record.step for one in staged(places[1])) == [2, 3]


def only_staged(engine: Engine, step: int) -> None:
    assert engine.can_stage
    save = engine.async_save(state(step), step=step, train={"step": step}, to_storage=False)
    save.upload_completion.result(SOON_S)


def test_a_step_that_is_only_staged_is_finished_if_its_rank_dies(
    engine: Engine, places: tuple[Path, Path]
) -> None:
    only_staged(engine, 2)
    assert not (places[0] / layout.step_folder(2)).exists()
    assert (engine.totals.now().saves, engine.totals.now().in_flight) == (1, 0)
    assert adopt(Local(places[0]), places[1]).parts == ((2, 0),)
    assert resumed(places[0]) == 2


def test_steps_that_are_only_staged_leave_the_one_on_its_way_where_it_is(
    engine: Engine, places: tuple[Path, Path], disk: Cut
) -> None:
    go_on = threading.Event()
    disk.before = lambda: go_on.wait(SOON_S)
    slow = engine.async_save(state(2), step=2, train={"step": 2})
    slow.staging_completion.result(SOON_S)
    for step in (3, 4):
        only_staged(engine, step)
        assert sorted(one.record.step for one in staged(places[1])) == [2, step]
    go_on.set()
    slow.upload_completion.result(SOON_S)
    only_staged(engine, 5)
    assert sorted(one.record.step for one in staged(places[1])) == [4, 5], (
        "2 is on the disk: its slot was free"
    )
    assert adopt(Local(places[0]), places[1]).parts == ((4, 0), (5, 0))
    assert resumed(places[0]) == 5


def test_there_is_no_room_to_stage_while_both_slots_are_on_their_way(engine: Engine, disk: Cut) -> None:
    go_on = threading.Event()
    disk.before = lambda: go_on.wait(SOON_S)
    for step in (2, 3):
        assert engine.can_stage
        engine.async_save(state(step), step=step).staging_completion.result(SOON_S)
    assert not engine.can_stage
    go_on.set()
    engine.wait()
    assert engine.can_stage


@pytest.mark.parametrize(("outlasts", "bound"), [(False, 1.05), (True, 2.1)])
def test_what_is_taken_for_staging_is_bounded(tmp_path: Path, outlasts: bool, bound: float) -> None:
    one = Engine(tmp_path / "job", memory=tmp_path / "memory" if outlasts else "")
    big = {"table": torch.zeros(500_000)}
    one.reserve(big)
    taken = sum(berth.arena.size for berth in one._berths._berths)
    assert taken <= bound * big["table"].nbytes
    one.close()


def test_without_memory_that_outlives_it_a_step_cannot_be_staged_only(tmp_path: Path) -> None:
    one = Engine(tmp_path / "job")
    assert not one.can_stage
    with pytest.raises(SaveError, match="without `memory`"):
        one.async_save(state(1), step=1, to_storage=False)
    one.close()


@contextmanager
def copying_stops(engine: Engine, piece: int) -> Iterator[None]:
    """Within it, the next save copies up to a piece and no further."""
    reached, go_on = threading.Event(), threading.Event()
    with pytest.MonkeyPatch.context() as patch:
        for berth in engine._berths._berths:
            take = berth.arena.take

            def take_later(asked: int, take: object = take) -> None:
                if asked == piece:
                    reached.set()
                    assert go_on.wait(SOON_S)
                take(asked)  # type: ignore[operator]

            patch.setattr(berth.arena, "take", take_later)
        save = engine.async_save(state(3), step=3)
        assert reached.wait(SOON_S)
        yield
        go_on.set()
        save.staging_completion.result(SOON_S)


@pytest.mark.parametrize("piece", range(PIECES))
def test_killed_at_any_piece_of_a_copy_the_step_before_is_whole(
    engine: Engine, places: tuple[Path, Path], disk: Cut, piece: int
) -> None:
    disk.takes = ()
    lost(engine, 2)
    with copying_stops(engine, piece):
        assert [one.record.step for one in staged(places[1])] == [2]
        assert adopt(Local(places[0]), places[1]).parts == ((2, 0),)
        assert resumed(places[0]) == 2


def test_what_is_no_longer_what_was_staged_is_told_and_left_alone(
    engine: Engine, places: tuple[Path, Path], disk: Cut
) -> None:
    disk.takes = ()
    lost(engine, 2)
    flip(next(one.slot.data for one in staged(places[1]) if one.record.step == 2), 2 * PIECE + 5)
    adopted = adopt(Local(places[0]), places[1])
    assert adopted.parts == ()
    assert adopted.notes == (
        f"rank 0 of step 2 is lost with its rank: bytes {2 * PIECE} to {3 * PIECE} in memory are not those that were staged",
    )
    assert resumed(places[0]) == 1


def test_another_file_of_that_name_is_never_taken_for_ours(
    engine: Engine, places: tuple[Path, Path], disk: Cut
) -> None:
    disk.takes = (DATA,)
    lost(engine, 2)
    flip(places[0] / layout.folder(2, GenerationId.parse(engine.generation)) / layout.rank_data(0), PIECE + 1)
    adopted = adopt(Local(places[0]), places[1])
    assert adopted.parts == ()
    assert "is there, and is another" in adopted.notes[0]
    assert resumed(places[0]) == 1


def test_nothing_of_a_generation_that_is_over_is_finished(
    engine: Engine, places: tuple[Path, Path], disk: Cut
) -> None:
    """Its successor has resumed from an older step: what comes now is a zombie's."""
    disk.takes = ()
    lost(engine, 2)
    assert resumed(places[0]) == 1
    assert adopt(Local(places[0]), places[1]) == ((), ())


def test_what_retention_has_deleted_does_not_come_back(engine: Engine, places: tuple[Path, Path]) -> None:
    without = Engine(places[0], generation=engine.generation)
    without._commits = True
    for step in (2, 3, 4):
        saved(without, step)
    until_left(without.storage, [4, 3])
    without.close()
    assert [point.step for point in committed(Local(places[0]))] == [4, 3]
    assert [one.record.step for one in staged(places[1])] == [1]
    assert adopt(Local(places[0]), places[1]).parts == ()


def test_a_step_is_read_from_memory_where_it_is_there(
    engine: Engine, places: tuple[Path, Path], disk: Cut
) -> None:
    data = places[0] / layout.folder(1, GenerationId.parse(engine.generation)) / layout.rank_data(0)
    flip(data, PIECE + 1)
    assert resumed(places[0], Near(places[1])) == 1, "the file is damaged, so this came from memory"


def test_memory_that_is_damaged_is_no_harm(engine: Engine, places: tuple[Path, Path], disk: Cut) -> None:
    flip(next(staged(places[1])).slot.data, PIECE + 1)
    assert resumed(places[0], Near(places[1])) == 1


def test_the_next_process_takes_the_same_memory_and_keeps_what_is_in_it(
    engine: Engine, places: tuple[Path, Path], disk: Cut
) -> None:
    before = {one.record.step: one.slot.data.stat().st_ino for one in staged(places[1])}
    after = Engine(places[0], memory=places[1])
    found = state(0)
    assert after.load(found) == {"step": 1}
    after.reserve(found)
    assert {one.record.step: one.slot.data.stat().st_ino for one in staged(places[1])} == before
    larger = {**found, "more": torch.zeros(PIECE)}
    after.reserve(larger)
    assert list(staged(places[1])) == [], "memory of another size holds no step"
    after.async_save(larger, step=2).upload_completion.result(SOON_S)
    assert [one.record.step for one in staged(places[1])] == [2]
    after.close()


def test_a_volume_that_is_too_small_leaves_the_steps_to_the_process(
    places: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def full(_descriptor: int, _start: int, _size: int) -> None:
        raise OSError(errno.ENOSPC, "no space")

    monkeypatch.setattr(os, "posix_fallocate", full)
    small = Engine(places[0], memory=places[1])
    saved(small, 1)
    small.close()
    assert "staged steps die with this process" in caplog.text
    assert "enlarge the memory-backed volume" in caplog.text
    assert [path for path in places[1].rglob("*") if path.is_file()] == []
    assert resumed(places[0]) == 1


def test_what_no_rank_of_ours_has_told_is_nothing(
    engine: Engine, places: tuple[Path, Path], disk: Cut
) -> None:
    folder = places[1] / "7" / "0"
    folder.mkdir(parents=True)
    (folder / "record.json").write_bytes(b'{"format":"0.1","rank":-1}')
    (places[1] / "7" / "1").mkdir()
    assert [one.record.step for one in staged(places[1])] == [1]
