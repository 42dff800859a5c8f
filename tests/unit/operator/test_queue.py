"""The work queue, on virtual time: no test waits, and every pause is exact."""

from __future__ import annotations

import asyncio

import pytest

from fakes.clock import run_virtually
from stormjib_operator.queue import Key, Pauses, Retry, WorkQueue

A, B = Key("ns", "a"), Key("ns", "b")


class Looks:
    """Notes who was looked at, when, and how many at once; takes some time over each."""

    def __init__(self, takes: float = 0.0, again: float | None = None, fails: int = 0) -> None:
        self.seen: list[tuple[float, Key]] = []
        self.most = 0
        self._now: list[Key] = []
        self._takes, self._again, self._fails = takes, again, fails

    async def __call__(self, key: Key) -> float | None:
        self.seen.append((round(asyncio.get_running_loop().time(), 6), key))
        self._now.append(key)
        self.most = max(self.most, self._now.count(key))
        await asyncio.sleep(self._takes)
        self._now.remove(key)
        if len(self.seen) <= self._fails:
            raise Retry
        return self._again


async def work(queue: WorkQueue, looks: Looks, seconds: float, workers: int = 3) -> None:
    """Let workers run for so long."""
    tasks = [asyncio.create_task(queue.work(looks)) for _ in range(workers)]
    await asyncio.sleep(seconds)
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


def test_a_key_that_is_added_often_is_looked_at_once() -> None:
    queue, looks = WorkQueue(), Looks()

    async def scene() -> None:
        for _ in range(10):
            queue.add(A)
        await work(queue, looks, 1)

    run_virtually(scene())
    assert looks.seen == [(0.0, A)]


def test_a_key_that_is_added_during_its_look_is_looked_at_once_more_and_never_twice_at_a_time() -> None:
    queue, looks = WorkQueue(), Looks(takes=1.0)

    async def scene() -> None:
        queue.add(A)
        running = asyncio.create_task(work(queue, looks, 5))
        for _ in range(5):
            await asyncio.sleep(0.1)
            queue.add(A)
        await running

    run_virtually(scene())
    assert looks.seen == [(0.0, A), (1.0, A)]
    assert looks.most == 1


def test_one_slow_key_does_not_hold_up_another() -> None:
    queue, looks = WorkQueue(), Looks(takes=3.0)

    async def scene() -> None:
        queue.add(A)
        queue.add(B)
        await work(queue, looks, 4)

    run_virtually(scene())
    assert looks.seen == [(0.0, A), (0.0, B)]


def test_a_failing_key_comes_again_after_growing_pauses() -> None:
    queue = WorkQueue(Pauses(first=1.0, longest=5.0, jitter=0.0))
    looks = Looks(fails=5)

    async def scene() -> None:
        queue.add(A)
        await work(queue, looks, 60)

    run_virtually(scene())
    assert [at for at, _ in looks.seen] == [0.0, 1.0, 3.0, 7.0, 12.0, 17.0]


def test_news_of_a_failing_key_are_heard_at_once_after_its_pass() -> None:
    queue = WorkQueue(Pauses(first=10.0, jitter=0.0))
    looks = Looks(fails=1)

    async def scene() -> None:
        queue.add(A)
        running = asyncio.create_task(work(queue, looks, 60))
        await asyncio.sleep(2)
        queue.add(A)
        await running

    run_virtually(scene())
    assert [at for at, _ in looks.seen] == [0.0, 2.0]


@pytest.mark.parametrize(("chance", "pause"), [(0.0, 0.8), (0.5, 1.0), (0.999999, 1.2)])
def test_jitter_spreads_a_pause_around_its_middle(chance: float, pause: float) -> None:
    assert Pauses(first=1.0).after(1, chance) == pytest.approx(pause, abs=1e-5)


def test_a_pause_never_exceeds_the_longest() -> None:
    assert Pauses(jitter=0.0).after(1000, 0.0) == Pauses().longest


def test_the_earlier_of_two_appointments_holds() -> None:
    queue, looks = WorkQueue(), Looks()

    async def scene() -> None:
        queue.add_after(A, 5)
        queue.add_after(A, 2)
        queue.add_after(A, 9)
        await work(queue, looks, 30)

    run_virtually(scene())
    assert looks.seen == [(2.0, A)]


def test_a_look_now_replaces_an_appointment() -> None:
    queue, looks = WorkQueue(), Looks(again=4.0)

    async def scene() -> None:
        queue.add_after(A, 3)
        queue.add(A)
        await work(queue, looks, 9)

    run_virtually(scene())
    assert [at for at, _ in looks.seen] == [0.0, 4.0, 8.0]
