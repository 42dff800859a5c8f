"""From readings to samples: what is told, what is told at once, and how small a healthy job's samples are."""

from __future__ import annotations

import random
from typing import TYPE_CHECKING

import pytest

from fakes.healthy import GROUPS, readings
from fakes.readings import MS, batch, call, connection, phase, stat, step
from stormjib_health.records.ring import State
from stormjib_health.sampler.core import MAX_SPANS, Core, RankReading, Reading
from stormjib_health.sampler.proc import Stat
from stormjib_health.wire import Doubt, Finding, Group, Phase, RankSample, Sample
from stormjib_runtime import codec
from stormjib_runtime.coordinator import SAMPLE_BYTES

if TYPE_CHECKING:
    from collections.abc import Sequence

    from stormjib_health.sampler.sockets import Socket

BLANK = Sample(1, "0b2f7f3e-6c3e-4a55-9a4e-0242ac120002", 3, 1, "2.7", 40, 0.0)
PAIR = Group.of(77, "default_pg", (0, 1))


def reading(at_ms: float, *, sockets: tuple[tuple[int, Socket], ...] = (), **fields: object) -> Reading:
    """One look at rank 0, which does well but for `fields`."""
    plain: dict[str, object] = {"stat": stat("S", ticks=round(at_ms / 20))}
    return Reading(round(at_ms * MS), {0: RankReading(**(plain | fields))}, list(sockets))  # type: ignore[arg-type]


def core() -> Core:
    return Core(BLANK, world_size=2)


def rank(sample: Sample) -> RankSample:
    (one,) = sample.ranks
    return one


def test_a_healthy_step_loop_of_eight_ranks_is_told_in_less_than_a_kilobyte() -> None:
    for groups in (1, 2):
        one = Core(BLANK, world_size=8)
        sizes = []
        for look in readings(50, groups):
            assert not one.take(look), "nothing is suspicious"
            sizes.append(len(codec.pack(one.sample())))
            one.accepted()
        print(f"{groups} groups: median {sorted(sizes)[25]} bytes, largest {max(sizes)}")
        assert max(sizes) <= 1024


def test_a_healthy_sample_says_where_each_rank_is() -> None:
    one = Core(BLANK, world_size=8)
    for look in readings(3):
        one.take(look)
        sample = one.sample()
        one.accepted()
    assert (sample.number, sample.generation, sample.slot) == (43, "2.7", 3)
    assert sample.over_s == pytest.approx(0.2)
    assert [said.rank for said in sample.ranks] == list(range(8))
    first = sample.ranks[0]
    assert (first.step, first.phase, first.process) == (3, Phase.STEP, "S")
    assert first.step_age_s == pytest.approx(0.037, abs=0.001)
    assert first.steps_s == pytest.approx((0.1, 0.1), rel=0.1)
    assert [(one.group, one.issued, one.done) for one in first.calls] == [(GROUPS[0].key, 40, True)]
    assert [one.number for one in first.timings] == [21, 30, 31, 40]
    assert len(sample.edges) == 4


def test_waits_for_a_processor_are_told_when_they_come_to_something() -> None:
    one = core()
    told = []
    for number, queued_s in enumerate((7.0, 7.0004, 7.0009, 7.0014, 7.3)):
        one.take(reading(1000 + 200 * number, queued_s=queued_s))
        told.append(rank(one.sample()).queued_s)
        one.accepted()
    assert told == pytest.approx([0, 0, 0, 0.0014, 0.2986]), "what was before the generation does not count"


def test_what_a_coordinator_did_not_take_is_told_again() -> None:
    one = core()
    one.take(reading(1000, groups=(PAIR,), sockets=((0, connection(7)),)))
    one.accepted()
    one.take(
        reading(
            1200,
            batch=batch(call(1, 1100, done_ms=1120), step(0, 1150, 90), lost=2),
            throttled_s=0.5,
            sockets=((0, connection(7, sent=10)),),
        )
    )
    first = one.sample()
    one.take(
        reading(
            1400,
            batch=batch(step(1, 1350, 91), lost=1),
            throttled_s=0.7,
            sockets=((0, connection(7, sent=30)),),
        )
    )
    second = one.sample()
    assert (first.number, second.number) == (41, 42)
    assert rank(second).steps_s == (0.09, 0.091)
    assert rank(second).timings == rank(first).timings
    assert rank(second).lost == 3
    assert rank(second).throttled_s == pytest.approx(0.7)
    assert second.edges[0].sent == 30
    assert second.groups == (PAIR,)
    assert second.over_s == pytest.approx(0.4)
    one.accepted()
    one.take(reading(1600, throttled_s=0.7, sockets=((0, connection(7, sent=30)),)))
    third = one.sample()
    assert (third.edges, third.groups) == ((), ())
    assert (rank(third).steps_s, rank(third).timings, rank(third).lost, rank(third).throttled_s) == (
        (),
        (),
        0,
        0,
    )
    assert third.over_s == pytest.approx(0.2)
    one.forget()
    fourth = one.sample()
    assert fourth.groups == (PAIR,)
    assert len(rank(fourth).calls) == 1


@pytest.mark.parametrize("state", ["T", "t", "Z"])
def test_a_stopped_rank_is_told_at_once_and_so_is_its_going_on(state: str) -> None:
    one = core()
    assert not one.take(reading(1000))
    assert one.take(reading(1200, stat=stat(state), wchan="do_signal_stop"))
    assert not one.take(reading(1400, stat=stat(state), wchan="do_signal_stop"))
    said = rank(one.sample())
    assert (said.process, said.wchan) == (state, "do_signal_stop")
    assert said.process_age_s == pytest.approx(0.2)
    assert one.describe(0).startswith(
        f"process state {state} for 0.2 s, sleeps in do_signal_stop; phase unknown"
    )
    assert one.take(reading(1600))


def test_a_wait_for_a_device_is_suspicious_when_it_lasts() -> None:
    one = core()
    assert [one.take(reading(at, stat=stat("D"))) for at in (1000, 1200, 1900, 2000, 2200)] == [
        False, False, False, True, False,
    ]  # fmt: skip


def test_a_process_that_is_gone_is_told_at_once() -> None:
    one = core()
    one.take(reading(1000))
    assert one.take(reading(1200, stat=None))
    assert rank(one.sample()).process == "X"


def test_unread_bytes_and_an_expired_timer_are_told_at_once() -> None:
    one = core()
    unread = ((0, connection(7, unread=96)),)
    assert [one.take(reading(at, sockets=unread)) for at in (1000, 1200, 1400, 1600)] == [
        False,
        False,
        True,
        False,
    ]
    assert rank(one.sample()).unread == 1
    assert one.take(reading(1800, sockets=((0, connection(7, backoff=1)),)))
    assert one.suspicions == {(0, "backoff")}


def test_an_outstanding_call_is_told_at_once_when_it_gets_old_but_not_in_a_long_phase() -> None:
    one = core()
    one.take(reading(1000, groups=(PAIR,), batch=batch(call(1, 990))))
    assert not one.take(reading(1400))
    assert one.take(reading(1600))
    assert one.suspicions == {(0, "waits")}
    assert rank(one.sample()).calls[0].age_s == pytest.approx(0.61)
    assert one.take(
        reading(1800, batch=batch(phase(Phase.CHECKPOINT, 1700), state=State(Phase.CHECKPOINT, 1, count=2)))
    )
    assert not one.take(reading(9000))


def test_a_doubt_is_told_at_once_and_once() -> None:
    one = core()
    assert one.take(reading(1000, batch=batch(Finding(0, Doubt.DIGEST, 5, accused=1, votes=2))))
    assert one.sample().findings == (Finding(0, Doubt.DIGEST, 5, accused=1, votes=2),)
    one.accepted()
    assert one.sample().findings == ()


def test_many_large_groups_come_one_sample_after_the_other() -> None:
    ranks = tuple((i * i - 1) % 4001 for i in range(1, 1001))  # in no order
    large = tuple(Group.of(key, "large", ranks) for key in range(20))
    one = Core(BLANK, world_size=4001)
    one.take(reading(1000, groups=large))
    seen: list[Group] = []
    while groups := one.sample().groups:
        assert sum(len(group.spans) for group in groups) <= MAX_SPANS + len(ranks)
        seen += groups
        one.accepted()
    assert seen == list(large)


def test_a_rank_that_computes_is_not_idle_and_one_that_does_not_is() -> None:
    one = core()
    for at in range(1000, 3001, 200):
        one.take(reading(at, stat=Stat(9, "S", 1, 0)))
    assert rank(one.sample()).idle_s > 1
    for at in range(3200, 5001, 200):
        one.take(reading(at, stat=Stat(9, "R", 1, at)))
    assert rank(one.sample()).idle_s == 0


EVERYBODY = range(10_000)


@pytest.mark.parametrize(
    ("order", "limit"),
    [(EVERYBODY, 2048), (random.Random(0).sample(EVERYBODY, len(EVERYBODY)), SAMPLE_BYTES)],
    ids=["of a mesh", "none"],
)
def test_what_names_all_groups_of_ten_thousand_ranks_is_taken(order: Sequence[int], limit: int) -> None:
    """In the order of a mesh they need next to nothing; in none at all they still come through."""
    groups = [Group.of(key, "dp", order[key % 8 :: 8]) for key in range(1, 9)]
    one = Core(BLANK, world_size=10_000)
    one.take(reading(1000, groups=[Group.of(0, "default_pg", order), *(g for g in groups if 0 in g.ranks)]))
    heard: set[int] = set()
    while groups_told := (said := one.sample()).groups:
        assert codec.unpack(Sample, codec.pack(said), limit=limit) is not None
        heard |= {group.key for group in groups_told}
        one.accepted()
    assert len(heard) == 2
