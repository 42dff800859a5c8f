"""Agents and ranks belong to tenants: what cannot be true is refused, and nothing that they claim is believed blindly."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import pytest

from stormjib_health.engine import Engine, Malformed, Place
from stormjib_health.engine.check import MEMBERSHIPS
from stormjib_health.wire import Answer, Call, Edge, Group, RankSample, Sample, Span, Stack, Timing

if TYPE_CHECKING:
    from stormjib_health.verdict import Verdict

GOOD = Sample(1, "u", 1, 0, "1.1", 1, 0.2, ranks=(RankSample(1),))


@pytest.fixture
def engine() -> Engine:
    return Engine([Place(0, 0), Place(1, 1)])


def ranked(**changes: object) -> Sample:
    return replace(GOOD, ranks=(replace(RankSample(1), **changes),))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("sample", "names"),
    [
        (replace(GOOD, slot=7), "slot is 7"),
        (replace(GOOD, ranks=(RankSample(0),)), "rank is 0; slot 1 has 1"),
        (replace(GOOD, ranks=(RankSample(10**9),)), "rank is 1000000000"),
        (replace(GOOD, over_s=-1.0), "over_s is -1.0"),
        (replace(GOOD, over_s=float("nan")), "over_s is nan"),
        (ranked(step=-7), "step is"),
        (ranked(idle_s=1e12), "idle_s is"),
        (ranked(process="stopped"), "process is 'stopped'"),
        (ranked(steps_s=(0.1,) * 9), "steps_s holds 9"),
        (ranked(steps_s=(0.1,), own_s=()), "own_s holds 0 items; steps_s holds 1"),
        (ranked(steps_s=(0.1,), own_s=(-0.1,)), "own_s is -0.1"),
        (ranked(calls=(Call(1, -1),)), "group 1"),
        (ranked(calls=(Call(1, 1, 99),)), "kind 99"),
        (ranked(calls=(Call(1, 1),) * 1000), "calls holds 1000"),
        (ranked(timings=(Timing(1, 1, -0.5),)), "wait_s is -0.5"),
        (replace(GOOD, edges=(Edge(0, "a:1", "b:1"),)), "rank is 0"),
        (replace(GOOD, edges=(Edge(1, "a" * 100, "b:1"),)), "address of 100"),
        (replace(GOOD, edges=(Edge(1, "a:1", "b:1", sent=-5),)), "a:1 to b:1"),
        (replace(GOOD, groups=(Group.of(1, "g", (0, 5)),)), "rank 5"),
        (replace(GOOD, groups=(Group.of(1, "g", (0, 0)),)), "each of 2 may be in it once"),
        (replace(GOOD, groups=(Group.of(1, "g", ()),)), "an empty span, or none"),
        (replace(GOOD, groups=(Group(1, "g", (Span(0, 2), Span(1, 0))),)), "an empty span, or none"),
        (replace(GOOD, groups=(Group(1, "g", (Span(0, 1 << 62),)),)), "lists 4611686018427387904 ranks"),
        (replace(GOOD, groups=(Group(1, "g", (Span(0, 2, -1),)),)), "rank -1"),
        (replace(GOOD, stacks=(Stack(0, "x"),)), "rank is 0"),
        (replace(GOOD, stacks=(Stack(1, "x" * 10_000),)), "stack holds 10000"),
    ],
)
def test_what_cannot_be_true_is_refused_by_name(engine: Engine, sample: Sample, names: str) -> None:
    with pytest.raises(Malformed, match=names.replace("(", r"\(")):
        engine.observe(sample, 1.0)


def test_groups_may_not_change_their_members_nor_be_without_end(engine: Engine) -> None:
    engine.observe(replace(GOOD, groups=(Group.of(1, "g", (0, 1)),)), 1.0)
    with pytest.raises(Malformed, match="other ranks"):
        engine.observe(replace(GOOD, number=2, groups=(Group.of(1, "g", (1, 0)),)), 1.1)
    many = tuple(Group.of(k, "g", (0,)) for k in range(2, 2 * MEMBERSHIPS + 5))
    with pytest.raises(Malformed, match="more than"):
        engine.observe(replace(GOOD, number=3, groups=many), 1.2)
    engine.observe(replace(GOOD, number=4), 1.3)


def test_an_older_sample_is_ignored(engine: Engine) -> None:
    engine.observe(replace(GOOD, number=5), 1.0)
    engine.observe(replace(ranked(process="T", process_age_s=50.0), number=4), 1.1)
    assert [engine.tick(1.2 + i / 10).verdicts for i in range(20)] == [()] * 20


def test_exits_and_answers_of_nobody(engine: Engine) -> None:
    with pytest.raises(Malformed, match="rank is 9"):
        engine.exited(9, -9, "", 1.0)
    with pytest.raises(Malformed, match="seconds is"):
        engine.answered(0, Answer(1, True, seconds=-1.0), 1.0)
    engine.answered(0, Answer(4711, True), 1.0)
    engine.silent(99, 1.0)
    assert engine.tick(1.1).verdicts == ()


def test_unknown_groups_are_asked_for(engine: Engine) -> None:
    engine.observe(ranked(calls=(Call(5, 1),)), 1.0)
    assert engine.lacks_groups(1)
    assert not engine.lacks_groups(0)
    engine.observe(replace(GOOD, number=2, groups=(Group.of(5, "g", (0, 1)),)), 1.1)
    assert not engine.lacks_groups(1)
    assert not engine.lacks_groups(99)


def test_a_rank_that_claims_to_be_far_ahead_names_nobody_while_the_others_step(engine: Engine) -> None:
    group = Group.of(5, "g", (0, 1))
    told: list[Verdict] = []
    for number in range(1, 200):
        now = number * 0.2
        honest = RankSample(
            0, number, 0.0, (0.2,), (0.1,), number, idle_s=now, calls=(Call(5, number, 1, 0.05),)
        )
        liar = RankSample(
            1, number, 0.0, (0.2,), (0.1,), number, idle_s=now, calls=(Call(5, number + 10**9, 1, now),)
        )
        engine.observe(Sample(1, "u", 0, 0, "1.1", number, 0.2, (honest,), groups=(group,)), now)
        engine.observe(Sample(1, "u", 1, 0, "1.1", number, 0.2, (liar,), groups=(group,)), now)
        told += engine.tick(now).verdicts
    assert told == []
