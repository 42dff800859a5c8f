"""The Lease, on virtual time: one holder at a time, and no gap where one leaves in order."""

from __future__ import annotations

import asyncio

from fakes.clock import run_virtually
from fakes.cluster import FakeCluster
from stormjib_operator.errors import Unreachable
from stormjib_operator.lease import DURATION_S, OPERATOR, RENEW_S, RETRY_S, Elector


def holder(cluster: FakeCluster) -> str:
    """Who holds the Lease."""
    return str(cluster.objects["Lease", "ns", OPERATOR]["spec"]["holderIdentity"])


def test_the_first_one_takes_it_at_once() -> None:
    cluster = FakeCluster()
    elector = Elector(cluster, "ns", "one", OPERATOR)
    assert run_virtually(elector.acquire()) == 0.0
    assert (holder(cluster), elector.term) == ("one", 1)


def test_a_second_one_waits_until_the_first_has_been_silent_for_its_duration() -> None:
    cluster = FakeCluster()
    first, second = Elector(cluster, "ns", "one", OPERATOR), Elector(cluster, "ns", "two", OPERATOR)

    async def scene() -> None:
        await first.acquire()
        keeping = asyncio.create_task(first.keep())
        taking = asyncio.create_task(second.acquire())
        await asyncio.sleep(60)
        assert holder(cluster) == "one"
        keeping.cancel()
        died = asyncio.get_running_loop().time()
        await taking
        waited = asyncio.get_running_loop().time() - died
        assert DURATION_S - RETRY_S <= waited <= DURATION_S + 2 * RETRY_S
        assert (holder(cluster), second.term) == ("two", 2)

    run_virtually(scene())


def test_who_holds_it_renews_without_reading_it() -> None:
    cluster = FakeCluster()
    elector = Elector(cluster, "ns", "one", OPERATOR)
    renewed: list[str] = []

    async def unreadable(*_: object) -> None:
        raise AssertionError("it was read")

    async def scene() -> None:
        await elector.acquire()
        cluster.get = unreadable  # type: ignore[method-assign,assignment]
        keeping = asyncio.create_task(elector.keep())
        for _ in range(10):
            await asyncio.sleep(RETRY_S)
            renewed.append(cluster.objects["Lease", "ns", OPERATOR]["metadata"]["resourceVersion"])
        keeping.cancel()
        assert len(set(renewed)) >= 9
        assert elector.term == 1

    run_virtually(scene())


def test_a_lease_that_others_annotate_is_read_again_and_kept() -> None:
    cluster = FakeCluster()
    elector = Elector(cluster, "ns", "one", OPERATOR)

    async def scene() -> None:
        await elector.acquire()
        keeping = asyncio.create_task(elector.keep())
        for _ in range(10):
            await asyncio.sleep(RETRY_S)
            cluster.put(dict(cluster.objects["Lease", "ns", OPERATOR]))
        assert not keeping.done()
        keeping.cancel()

    run_virtually(scene())


def test_a_released_lease_is_taken_at_the_next_try() -> None:
    cluster = FakeCluster()
    first, second = Elector(cluster, "ns", "one", OPERATOR), Elector(cluster, "ns", "two", OPERATOR)

    async def scene() -> None:
        await first.acquire()
        taking = asyncio.create_task(second.acquire())
        await asyncio.sleep(5)
        await first.release()
        released = asyncio.get_running_loop().time()
        await taking
        assert asyncio.get_running_loop().time() - released <= RETRY_S

    run_virtually(scene())


def test_a_restarted_container_takes_its_own_lease_at_once_in_the_same_term() -> None:
    cluster = FakeCluster()

    async def scene() -> None:
        await Elector(cluster, "ns", "one", OPERATOR).acquire()
        again = Elector(cluster, "ns", "one", OPERATOR)
        await again.acquire()
        assert again.term == 1

    assert run_virtually(scene()) == 0.0


def test_who_cannot_renew_gives_up_before_another_may_take_over() -> None:
    cluster = FakeCluster()
    elector = Elector(cluster, "ns", "one", OPERATOR)

    async def down(*_: object) -> None:
        raise Unreachable(0, "no route")

    async def scene() -> None:
        await elector.acquire()
        cluster.get = cluster.replace = down  # type: ignore[method-assign,assignment]
        await elector.keep()
        assert RENEW_S <= asyncio.get_running_loop().time() < DURATION_S

    run_virtually(scene())


def test_who_sees_another_holder_gives_up_at_once() -> None:
    cluster = FakeCluster()
    elector = Elector(cluster, "ns", "one", OPERATOR)

    async def scene() -> None:
        await elector.acquire()
        taken = cluster.objects["Lease", "ns", OPERATOR]
        cluster.put({**taken, "spec": {**taken["spec"], "holderIdentity": "two"}})
        await elector.keep()
        assert asyncio.get_running_loop().time() <= RETRY_S

    run_virtually(scene())


def test_release_leaves_somebody_elses_lease_alone() -> None:
    cluster = FakeCluster()

    async def scene() -> None:
        await Elector(cluster, "ns", "one", OPERATOR).acquire()
        await Elector(cluster, "ns", "two", OPERATOR).release()
        assert holder(cluster) == "one"

    run_virtually(scene())
