"""The trainer as real processes over Gloo: the training does not depend on the world, stops or restarts."""

from __future__ import annotations

import os
import signal
import time
from typing import TYPE_CHECKING

import pytest

from fakes.tiny_jobs import BATCH, Agent, assert_near, assert_planned, tiny, warm_trainer
from stormjib_checkpoint.history import committed
from stormjib_checkpoint.order import Micro, Order
from stormjib_checkpoint.reader import Checkpoint
from stormjib_checkpoint.storage import Local
from stormjib_runtime.wire import (
    EXIT_RESUME_FAILED,
    EXIT_STOPPED,
    Env,
    RankPhase,
)
from stormjib_trainer import data

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from fakes.ranks import Job, Warm

UNIGRAM = 3.15  # nats per byte of the standard library's source, knowing only how often each byte comes


@pytest.fixture(scope="module")
def warm() -> Iterator[Warm]:
    process = warm_trainer()
    yield process
    process.close()


@pytest.fixture(scope="module")
def order() -> Order:
    text = data.load({"text": "stdlib"}, context=32)
    return Order(text.sources({"text": 1}), Micro(1, BATCH), seed=0)


@pytest.fixture(scope="module")
def undisturbed(warm: Warm, tmp_path_factory: pytest.TempPathFactory) -> Job:
    """20 steps on two ranks that nobody disturbs."""
    job, codes = warm.run(2, tiny(), tmp_path_factory.mktemp("undisturbed"))
    assert codes == [0, 0], job.text()
    return job


LONG = {"train__steps": 200, "optimizer__warmup": 50, "train__unit": 10**9}


@pytest.fixture(scope="module")
def alone(warm: Warm, tmp_path_factory: pytest.TempPathFactory) -> Job:
    """200 steps on one rank."""
    job, codes = warm.run(1, tiny(**LONG), tmp_path_factory.mktemp("alone"))
    assert codes == [0], job.text()
    return job


def test_it_learns(alone: Job) -> None:
    assert alone.lines()[-1]["event"] == "done"
    assert alone.lines()[-1]["val_nats_per_byte"] < UNIGRAM - 0.3


@pytest.mark.parametrize("world", [2, 3, 4])
def test_every_world_size_trains_the_same(warm: Warm, alone: Job, world: int, tmp_path: Path) -> None:
    job, codes = warm.run(world, tiny(**LONG), tmp_path)
    assert codes == [0] * world, job.text()
    assert_near(job.losses(), alone.losses(), 1e-3)


@pytest.mark.parametrize(("world", "replicate"), [(2, 2), (3, 3), (4, 2), (3, 2)])
def test_replicas_train_the_same(warm: Warm, alone: Job, world: int, replicate: int, tmp_path: Path) -> None:
    """Three ranks cannot be two replicas of anything: they go on without."""
    job, codes = warm.run(world, tiny(**LONG, parallel__replicate=replicate), tmp_path)
    assert codes == [0] * world, job.text()
    assert_near(job.losses(), alone.losses(), 1e-3)


def test_replicas_are_saved_once_and_resumed_on_any_layout(
    warm: Warm, undisturbed: Job, order: Order, tmp_path: Path
) -> None:
    layouts = ((4, 2, 7), (3, 3, 13), (2, 1, 20))
    for number, (world, replicate, stop) in enumerate(layouts, start=1):
        agent = Agent(tmp_path, number, world)
        agent.pages[0].stop_after = stop
        planned = agent.env() | {Env.REPLICATE: str(replicate)}
        job, codes = warm.run(world, tiny(), agent.folder, planned)
        assert codes == [EXIT_STOPPED if stop < 20 else 0] * world, job.text()
        agent.commit(stop)
        atoms = Checkpoint(agent.storage, committed(agent.storage)[0]).atoms.values()
        assert max(len(atom.boxes) for atom in atoms) == world // replicate
        agent.close()
    wanted = {step: loss for step, loss in undisturbed.losses().items() if step > 13}
    assert_near(job.losses(), wanted, 1e-5)
    assert_planned(Local(tmp_path / "storage"), order, last=20)


def test_more_ranks_than_micro_batches_are_refused(warm: Warm, tmp_path: Path) -> None:
    job, codes = warm.run(3, tiny(train__batch=4, train__micro_batch=2), tmp_path)
    assert codes == [2, 2, 2]
    assert "2 micro-batches of train.micro_batch = 2, fewer than the 3 ranks" in job.text()


def test_passes_and_joined_layers_change_nothing(warm: Warm, undisturbed: Job, tmp_path: Path) -> None:
    job, codes = warm.run(2, tiny(train__at_once=2, train__unit=10**9), tmp_path)
    assert codes == [0, 0], job.text()
    assert_near(job.losses(), undisturbed.losses(), 1e-5)


def test_dropout_drops_the_same_on_every_world(warm: Warm, tmp_path: Path) -> None:
    dropped = {"train__steps": 40, "model__dropout": 0.1}
    three, codes = warm.run(3, tiny(**dropped), tmp_path / "3")
    assert codes == [0, 0, 0], three.text()
    four, _ = warm.run(4, tiny(**dropped, train__at_once=2), tmp_path / "4")
    assert_near(four.losses(), three.losses(), 1e-6)


def test_the_same_run_twice_is_equal_to_the_bit(warm: Warm, undisturbed: Job, tmp_path: Path) -> None:
    job, _ = warm.run(2, tiny(), tmp_path)
    assert job.losses() == undisturbed.losses()


def test_stop_and_resume_on_the_same_and_on_another_world(
    warm: Warm, undisturbed: Job, order: Order, tmp_path: Path
) -> None:
    losses = undisturbed.losses()
    first = Agent(tmp_path, 1, world=2)
    first.pages[1].stop_after = 7  # one rank hears of it; all must stop
    job, codes = warm.run(2, tiny(), tmp_path / "first", first.env(interval=5))
    assert codes == [EXIT_STOPPED, EXIT_STOPPED], job.text()
    assert job.losses() == {step: losses[step] for step in range(1, 8)}
    for page in first.pages:
        assert (page.step, page.saved, page.phase, page.listens) == (7, 7, RankPhase.END, True)
        assert page.loss == losses[7]
        told = page.saving
        assert (told.saves, told.failures, told.in_flight) == (2, 0, 0)
        assert told.bytes > 0
        assert 0 < told.call_s < told.staged_s < told.durable_s
    for step in (5, 7):
        first.commit(step)

    second = Agent(tmp_path, 2, world=2)
    second.pages[0].stop_after = 12
    second.pages[0].save_at = 9
    job, codes = warm.run(2, tiny(), tmp_path / "second", second.env())
    assert codes == [EXIT_STOPPED, EXIT_STOPPED], job.text()
    assert [line["step"] for line in job.lines() if line.get("event") == "saved"] == [9, 12]
    assert job.losses() == {step: losses[step] for step in range(8, 13)}
    for step in (9, 12):
        second.commit(step)

    third = Agent(tmp_path, 3, world=3)
    job, codes = warm.run(3, tiny(), tmp_path / "third", third.env())
    assert codes == [0, 0, 0], job.text()
    assert_near(job.losses(), {step: losses[step] for step in range(13, 21)}, 1e-5)
    third.commit(20)
    assert_planned(third.storage, order, last=20)
    for agent in (first, second, third):
        agent.close()


def test_a_resume_point_that_cannot_be_loaded_is_reported_by_all(warm: Warm, tmp_path: Path) -> None:
    first = Agent(tmp_path, 1, world=2)
    warm.run(2, tiny(train__steps=10), tmp_path / "first", first.env(interval=5))
    for step in (5, 10):
        first.commit(step)
    second = Agent(tmp_path, 2, world=2)
    damage(second.storage, step=10)
    job, codes = warm.run(2, tiny(), tmp_path / "second", second.env())
    assert codes == [EXIT_RESUME_FAILED, EXIT_RESUME_FAILED], job.text()
    assert "step 10 of generation 1.1 could not be loaded" in job.text()
    assert not job.losses()
    first.close()
    second.close()


def test_without_an_agent_sigterm_saves_and_damage_falls_back(
    warm: Warm, undisturbed: Job, order: Order, tmp_path: Path
) -> None:
    storage = Local(tmp_path / "storage")
    env: dict[str, str] = {Env.CHECKPOINT_ROOT: storage.root, Env.CHECKPOINT_INTERVAL: "5"}
    job = warm.start(2, tiny(train__steps=100_000), tmp_path / "first", env)
    wait_for_step(job, 6)
    os.kill(job.pids[1], signal.SIGTERM)  # one rank hears of it; all must stop
    assert warm.wait() == [EXIT_STOPPED, EXIT_STOPPED], job.text()
    stopped = max(job.losses())
    newest = committed(storage)[0]
    assert (newest.step, newest.generation) == (stopped, "0.1")

    damage(storage, stopped)
    last = stopped + 3
    job, codes = warm.run(2, tiny(train__steps=last), tmp_path / "second", env)
    assert codes == [0, 0], job.text()
    older = (stopped - 1) // 5 * 5
    assert f"step-{stopped:08}" in job.text()  # says what was damaged
    assert min(job.losses()) == older + 1
    assert_planned(storage, order, last)


def test_another_run_is_refused(warm: Warm, tmp_path: Path) -> None:
    env: dict[str, str] = {Env.CHECKPOINT_ROOT: str(tmp_path / "storage")}
    warm.run(1, tiny(), tmp_path / "first", env)
    for change, said in (({"train__batch": 4}, "cursor"), ({"model__dim": 64}, "another model")):
        job, codes = warm.run(1, tiny(train__steps=30, **change), tmp_path / said, env)
        assert codes == [2]
        assert said in job.text()


def test_a_loss_that_is_no_number_is_never_saved(warm: Warm, tmp_path: Path) -> None:
    env: dict[str, str] = {Env.CHECKPOINT_ROOT: str(tmp_path / "storage"), Env.CHECKPOINT_INTERVAL: "1"}
    job, codes = warm.run(2, tiny(optimizer__lr=1e30), tmp_path / "log", env)
    assert codes == [1, 1]
    assert "gradient norm" in job.text()
    assert committed(Local(tmp_path / "storage"))[0].step == max(job.losses())


def damage(storage: Local, step: int) -> None:
    """Change one byte of a rank's tensors."""
    name = next(name for name in storage.names(f"step-{step:08}"))
    path = f"{storage.root}/step-{step:08}/{name}/rank-00000.safetensors"
    with open(path, "r+b") as file:
        file.seek(-3, os.SEEK_END)
        byte = file.read(1)
        file.seek(-3, os.SEEK_END)
        file.write(bytes([byte[0] ^ 1]))


def wait_for_step(job: Job, step: int) -> None:
    deadline = time.monotonic() + 30
    while max(job.losses(), default=0) < step:
        assert time.monotonic() < deadline, job.text()
        time.sleep(0.01)
