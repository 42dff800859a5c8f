"""One rank's story from its ring: what stands, what is over, what is told, and that all of it is bounded."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fakes.readings import MS, batch, call, phase, step
from stormjib_health.records.ring import State
from stormjib_health.sampler.calls import (
    MAX_CALLS,
    MAX_FINDINGS,
    MAX_STEPS,
    MAX_TIMINGS,
    OLD_S,
    Calls,
    Thinned,
)
from stormjib_health.wire import Call, Doubt, Finding, Group, Kind, Pair, Phase, RankSample, Timing

ALL, PAIR = Group.of(77, "default_pg", (0, 1)), Group.of(78, "pp", (0, 1))


def story(rank: int = 0) -> Calls:
    calls = Calls(rank, world_size=2)
    calls.take(batch(), [ALL, PAIR])
    return calls


def only(calls: Calls, now_ms: float) -> Call:
    (one,) = calls.calls(round(now_ms * MS))
    return one


def tell(calls: Calls, now_ms: float) -> tuple[Call, ...]:
    """Tell what there is; what that was."""
    told = calls.calls(round(now_ms * MS))
    calls.told(
        RankSample(
            0, calls=told, timings=calls.timings(), steps_to=calls.steps[-1].number if calls.steps else -1
        ),
        (),
    )
    return told


def test_the_newest_call_of_a_group_is_where_it_stands() -> None:
    calls = story()
    calls.take(batch(call(1, 100, signature=9), call(2, 200, kind=Kind.BARRIER)))
    one = only(calls, 230)
    assert (one.group, one.issued, one.kind, one.done) == (77, 2, Kind.BARRIER, False)
    assert one.age_s == pytest.approx(0.03)
    assert (one.signature, one.signed) == (9, 1)


def test_sends_and_receives_are_counted_apart() -> None:
    calls = story()
    calls.take(
        batch(call(1, 100), call(5, 110, kind=Kind.SEND, peer=1), call(3, 120, kind=Kind.RECV, peer=0))
    )
    one = only(calls, 130)
    assert (one.issued, one.peer, one.kind) == (1, 0, Kind.RECV)
    assert one.pairs == (Pair(1, 5, 0), Pair(0, 0, 3))
    calls.take(batch(call(6, 140, kind=Kind.RECV, peer=1)))
    assert only(calls, 150).pairs == (Pair(0, 0, 3), Pair(1, 5, 6)), "the newest last"
    calls.take(batch(*(call(1, 160 + peer, kind=Kind.SEND, peer=peer) for peer in range(2, 10))))
    assert [pair.peer for pair in only(calls, 180).pairs] == list(range(2, 10)), "the oldest are forgotten"


@pytest.mark.parametrize(
    "later",
    [
        batch(call(1, 150, group=1)),
        batch(step(0, 150)),
        batch(phase(Phase.DATA, 150)),
        batch(ended=(call(1, 100, done_ms=140),)),
    ],
)
def test_a_call_is_over_when_its_end_is_known_or_its_rank_has_gone_on(later: object) -> None:
    calls = story()
    calls.take(batch(call(1, 100, pending=True)))
    assert not only(calls, 200).done
    calls.take(later)  # type: ignore[arg-type]
    done = {one.group: one.done for one in calls.calls(200 * MS)}
    assert done[77]


def test_a_step_that_only_the_clock_beside_the_ring_tells_ends_its_calls() -> None:
    calls = story()
    calls.take(batch(call(1, 100, step=4), state=State(step=4, count=1)))
    assert not only(calls, 200).done
    calls.take(batch(state=State(step=4, count=1)), step=5)
    assert only(calls, 200).done
    assert calls.step == 5


def test_what_was_told_is_told_again_only_when_it_changes_or_is_old() -> None:
    calls = story()
    calls.take(batch(call(1, 100)))
    assert len(tell(calls, 150)) == 1
    assert tell(calls, 200) == ()
    calls.take(batch(call(2, 250)))
    assert tell(calls, 260)[0].issued == 2
    assert tell(calls, 270) == ()
    old = 250 + 1000 * OLD_S + 1
    assert len(tell(calls, old)) == len(tell(calls, old + 200)) == 1
    calls.take(batch(step(0, old + 210)))
    assert tell(calls, old + 220)[0].done
    assert tell(calls, old + 9000) == ()
    calls.forget()
    assert len(tell(calls, old + 9000)) == 1


def test_a_call_of_a_group_whose_line_has_not_come_waits_for_it() -> None:
    calls = Calls(0, world_size=2)
    calls.take(batch(call(1, 100)))
    assert calls.calls(150 * MS) == ()
    calls.take(batch(), [ALL])
    assert only(calls, 150).group == 77


@pytest.mark.parametrize(
    "group",
    [None, Group.of(5, "x", (0, 2)), Group.of(5, "x", (1,)), Group.of(5, "x", tuple(range(1, 20_000)))],
)
def test_a_group_that_its_rank_cannot_be_in_is_not_told(group: Group | None) -> None:
    calls = Calls(0, world_size=2)
    calls.take(batch(call(1, 100), call(1, 101, group=1)), [group, ALL])
    assert only(calls, 150).group == 77


def test_a_call_waits_when_it_is_older_than_is_usual_and_the_phase_does_not_explain_it() -> None:
    calls = story()
    calls.take(batch(call(1, 1000), call(2, 1100)))
    assert not calls.waits(1500 * MS)
    assert calls.waits(1700 * MS)
    slow = story()
    slow.take(batch(call(1, 1000), call(2, 3000)))
    assert not slow.waits(5900 * MS)
    assert slow.waits(6100 * MS)
    resting = story()
    resting.take(batch(call(1, 1000), phase(Phase.CHECKPOINT, 1001), state=State(Phase.CHECKPOINT, count=2)))
    assert not resting.waits(9000 * MS)
    evaluating = story()
    evaluating.take(batch(call(1, 1000), state=State(Phase.EVALUATION, count=2)))
    assert not evaluating.waits(9000 * MS)


def test_a_legal_long_phase_does_not_make_waiting_usual() -> None:
    calls = story()
    calls.take(
        batch(call(1, 1000), phase(Phase.CHECKPOINT, 1001), phase(Phase.STEP, 60_000), call(2, 60_001))
    )
    assert calls.waits(60_700 * MS)


def test_an_end_gives_a_timing() -> None:
    calls = story()
    calls.take(batch(call(1, 100, pending=True, done_ms=0), call(2, 130, done_ms=150)))
    calls.take(batch(ended=(call(1, 100, done_ms=120),)))
    calls.take(batch(call(3, 180, done_ms=181, group=1)))
    first, second, third = sorted(calls.timings(), key=lambda one: one.number)
    assert (second.group, second.number) == (77, 2)
    assert second.wait_s == pytest.approx(0.02)
    assert first.wait_s == pytest.approx(0.02)
    assert third.group == 78


def test_own_work_is_what_lies_between_an_end_and_the_next_call_of_any_group() -> None:
    calls = story()
    calls.take(
        batch(
            call(1, 100, done_ms=120),
            call(2, 130),
            step(0, 140, 90),
            call(1, 150, done_ms=0, pending=True, group=1),
        )
    )
    calls.take(
        batch(call(3, 175, done_ms=176), step(1, 190, 50), ended=(call(1, 150, done_ms=160, group=1),))
    )
    calls.take(batch(call(4, 200), step(2, 210, 20)))
    own = [one.own_s for one in calls.steps]
    assert own == pytest.approx([0.01, 0.015, 0.024]), (
        "what follows call 2, whose end is not known, is not counted"
    )


def test_a_step_is_told_by_the_number_of_its_record_though_the_clock_is_ahead() -> None:
    calls = story()
    calls.take(batch(call(1, 100, done_ms=120), step(4, 130, 77)), step=5)
    assert calls.step == 5
    assert [one.number for one in calls.steps] == [4]


def test_a_timing_is_told_once() -> None:
    calls = story()
    calls.take(batch(call(1, 100, done_ms=120), step(0, 130, 77)))
    sent = RankSample(0, timings=calls.timings(), steps_to=calls.steps[-1].number if calls.steps else -1)
    calls.take(batch(call(2, 200, done_ms=220), step(1, 230, 78)))
    calls.told(sent, ())
    assert [one.number for one in calls.timings()] == [2]
    assert [one.seconds for one in calls.steps] == [0.078]


def test_agents_that_send_at_other_times_tell_of_the_same_steps() -> None:
    often, seldom = Thinned(8), Thinned(8)
    told: set[int] = set()
    for at in range(1000):
        for thinned in (often, seldom):
            thinned.add(at, Timing(77, at + 1, 0.1))
        if at % 4 == 3:
            told.update(one.number for one in often.items())
            often.told(often.items())
    kept = {one.number for one in seldom.items()}
    assert 4 < len(kept) <= 8
    assert kept <= told


def test_a_step_with_more_calls_than_fit_tells_of_its_first_ones() -> None:
    thinned = Thinned(4)
    for number in range(1, 9):
        thinned.add(3, Timing(77, number, 0.1))
    assert [one.number for one in thinned.items()] == [1, 2, 3, 4]
    thinned.add(4, Timing(77, 9, 0.1))
    assert 0 < len(thinned.items()) <= 4


def test_findings_are_of_the_rank_whose_ring_it_is() -> None:
    calls = story(rank=1)
    calls.take(batch(Finding(0, Doubt.NORM, 7, accused=0), Finding(1, Doubt.SPIKE, 8)))
    assert [finding.rank for finding in calls.findings] == [1, 1]
    calls.told(RankSample(1), calls.findings[:1])
    assert [finding.step for finding in calls.findings] == [8]


numbers = st.integers(1, 1 << 40)
times = st.integers(1, 1 << 40).map(lambda us: us / 1e3)
anything = st.one_of(
    st.builds(
        call,
        numbers,
        times,
        group=st.integers(0, 1023),
        kind=st.sampled_from(Kind),
        pending=st.booleans(),
        step=st.integers(-1, 1 << 30),
    ),
    st.builds(step, st.integers(0, 1 << 30), times, times),
    st.builds(phase, st.sampled_from(Phase), times),
    st.builds(Finding, st.integers(0, 9), st.sampled_from(Doubt).map(int), st.integers(0, 99)),
)


@given(st.lists(st.lists(anything, max_size=40), max_size=6), st.integers(0, 1 << 50))
def test_whatever_a_rank_writes_what_is_told_is_bounded(batches: list[list[object]], now_ns: int) -> None:
    calls = Calls(0, world_size=2)
    calls.take(batch(), [Group.of(index, "g", (0, 1)) for index in range(1024)])
    for records in batches:
        calls.take(batch(*records, lost=3))  # type: ignore[arg-type]
        calls.waits(now_ns)
    found = calls.calls(now_ns)
    assert len(found) <= MAX_CALLS
    assert all(one.age_s >= 0 for one in found)
    assert len(calls.timings()) <= MAX_TIMINGS
    assert len(calls.steps) <= MAX_STEPS
    assert len(calls.findings) <= MAX_FINDINGS
    assert calls.lost == 3 * len(batches)
