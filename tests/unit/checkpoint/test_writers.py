"""Whoever writes: threads that die, two writers of one step, ranks of another attempt or world. No other step is harmed."""

from __future__ import annotations

import contextlib
import os
import threading
from typing import TYPE_CHECKING, Any

import pytest

from fakes.disk import Disk
from fakes.lives import SOON_S, begin, next_life, save
from fakes.saving import save_rank
from fakes.training import WORLD, loads, plan, state_of, train
from fakes.watched import Call, watched
from stormjib_checkpoint.commit import commit_step
from stormjib_checkpoint.engine import Engine, memory
from stormjib_checkpoint.engine import arena as arenas
from stormjib_checkpoint.engine.workers import IDLE, Job, Workers
from stormjib_checkpoint.errors import AlreadySaved, Inconsistent
from stormjib_checkpoint.history import committed
from stormjib_checkpoint.ledger import audit
from stormjib_checkpoint.opening import open_generation
from stormjib_checkpoint.storage import Local

if TYPE_CHECKING:
    from collections.abc import Callable

    from stormjib_checkpoint.files import Files

ROOT = "/team/job"


@pytest.fixture(autouse=True)
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(arenas, "PIECE_BYTES", 8192)


KINDS = [RuntimeError, MemoryError, KeyboardInterrupt, SystemExit, GeneratorExit]


@pytest.mark.parametrize("kind", KINDS)
def test_whatever_kills_a_writer_spoils_one_step(kind: type[BaseException]) -> None:
    disk, killed = Disk(), []

    def kill(call: Call, do: Callable[..., Any]) -> Any:
        if call.is_a("write_at", "*step-00000003*safetensors*"):
            killed.append(threading.current_thread())
            raise kind("killed")
        return do(*call.arguments)

    engine = Engine(Local(ROOT, watched(disk, kill)))
    assert [save(engine, step) for step in (1, 2)] == [None, None]
    assert isinstance(save(engine, 3), kind)
    assert 1 <= len(killed) <= 2
    assert save(engine, 4) is None
    engine.close()
    assert next_life(Local(ROOT, disk)) == 4


@pytest.mark.parametrize("kind", KINDS)
def test_whatever_kills_the_copying_spoils_one_step(
    kind: type[BaseException], monkeypatch: pytest.MonkeyPatch
) -> None:
    disk = Disk()
    engine = Engine(Local(ROOT, disk))
    assert save(engine, 1) is None
    copy, copied = memory.copy, []

    def kill(target: int, source: int, size: int) -> None:
        copied.append(size)
        if len(copied) == 4:
            raise kind("killed")
        copy(target, source, size)

    monkeypatch.setattr(memory, "copy", kill)
    spoiled = begin(engine, 2)
    assert isinstance(spoiled.staging_completion.exception(SOON_S), kind)
    assert isinstance(spoiled.upload_completion.exception(SOON_S), kind)
    assert save(engine, 3) is None
    engine.close()
    assert [point.step for point in committed(Local(ROOT, disk))] == [3, 1]
    assert next_life(Local(ROOT, disk)) == 3


def test_a_caller_who_cancels_a_future_kills_no_thread() -> None:
    disk = Disk()
    engine = Engine(Local(ROOT, disk))
    for step in range(1, 6):
        begun = begin(engine, step)
        assert not begun.staging_completion.cancel()
        assert not begun.upload_completion.cancel()
    engine.close()
    assert next_life(Local(ROOT, disk)) == 5


def leave(
    storage: Local, step: int, rank: int, *, mark: float = 0.0, world: int = WORLD, attempt: str = ""
) -> None:
    """A rank's part of a step, as if it had fed the samples of that step alone."""
    save_rank(
        storage,
        step=step,
        generation="1.1",
        rank=rank,
        world=world,
        state=state_of(step, mark),
        train={"step": step, "mark": mark},
        samples={step: plan(step)[rank::world]},
        attempt=attempt,
    )


@pytest.fixture
def storage() -> Local:
    """Step 1 is committed."""
    storage = Local(ROOT, Disk())
    open_generation(storage, "1.1", "uid")
    train(storage, "1.1", 0, 1)
    return storage


def test_of_two_writers_of_one_step_one_is_refused_and_the_step_is_the_others() -> None:
    """The second one begins and ends within each call of the first one."""
    left: list[float] = []

    def write(files: Files, mark: float) -> None:
        with contextlib.suppress(AlreadySaved):
            leave(Local(ROOT, files), 2, 0, mark=mark, world=1)
            left.append(mark)

    number, marks, between = 0, set(), True
    while between:
        number, calls, between = number + 1, 0, False
        left.clear()
        disk = Disk()
        open_generation(Local(ROOT, disk), "1.1", "uid")

        def second(call: Call, do: Callable[..., Any], disk: Disk = disk, at: int = number) -> Any:
            nonlocal calls, between
            calls += 1
            if calls == at:
                between = True
                write(disk, 0.5)
            return do(*call.arguments)

        write(watched(disk, second), 0.25)
        assert len(left) == 1
        assert loads(Local(ROOT, disk), commit_step(Local(ROOT, disk), "1.1", 1, 2)) == left[0]
        marks.add(left[0])
    assert number > 30
    assert marks == {0.25, 0.5}


def test_a_world_of_another_size_after_a_restart_costs_one_step(storage: Local) -> None:
    """Torchrun restarts with three ranks instead of two, after one of the two has left step 2."""
    leave(storage, 2, 0)
    for rank in (1, 2):
        leave(storage, 2, rank, world=3, attempt="1")
    with pytest.raises(AlreadySaved):
        leave(storage, 2, 0, world=3, attempt="1")
    for world in (2, 3):
        with pytest.raises(Inconsistent):
            commit_step(storage, "1.1", world, 2)
    for rank in range(3):
        leave(storage, 3, rank, world=3, attempt="1")
    assert commit_step(storage, "1.1", 3, 3) == committed(storage)[0]
    loads(storage, committed(storage)[0])
    opening = open_generation(storage, "1.2", "uid")
    assert opening.resume is not None
    assert opening.resume.step == 3


def test_what_another_attempt_fed_is_not_in_the_ledger(storage: Local) -> None:
    """Rank 0 has left step 2; after a restart both ranks leave steps 2 (refused) and 3, and have fed 2 and 3 again."""
    save_rank(
        storage, step=2, generation="1.1", rank=0, world=WORLD, state=state_of(2), train={}, samples={2: [99]}
    )
    for rank in range(WORLD):
        save_rank(
            storage,
            step=3,
            generation="1.1",
            rank=rank,
            world=WORLD,
            state=state_of(3),
            train={"step": 3, "mark": 0.0},
            samples={3: plan(3)[rank::WORLD]},
            attempt="1",
        )
    commit_step(storage, "1.1", WORLD, 3)
    assert audit(storage).ids(2) == []
    assert audit(storage).gaps() == [2]
    assert audit(storage).ids(3) == plan(3)


def test_who_copies_takes_only_what_is_left_over() -> None:
    workers = Workers("idle", nice=IDLE)
    policy = workers.put(Job(lambda: os.sched_getscheduler(threading.get_native_id()))).future
    assert policy.result(SOON_S) == os.SCHED_IDLE
    workers.close()


def test_where_that_is_forbidden_it_is_as_nice_as_can_be(monkeypatch: pytest.MonkeyPatch) -> None:
    def forbidden(*_: object) -> None:
        raise PermissionError

    monkeypatch.setattr(os, "sched_setscheduler", forbidden)
    workers = Workers("nice", nice=IDLE)
    nice = workers.put(Job(lambda: os.getpriority(os.PRIO_PROCESS, threading.get_native_id()))).future
    assert nice.result(SOON_S) == IDLE
    workers.close()
