"""What becomes of a doubtful step: done again, applied, skipped, gone back from; alike on every rank."""

from __future__ import annotations

import math
from typing import Any

import pytest

from stormjib_health.integrity.judge import (
    MAX_SKIPS,
    Act,
    Judge,
    Numbers,
    Policy,
    Replay,
    Ruling,
    bits,
    unpack,
)
from stormjib_health.verdict import OnRecurrence, OnSpike
from stormjib_health.wire import Doubt, Finding

WORLD = 4
NORMS = (1.0, 1.1, 0.9, 1.05)


def numbers(step: int, loss: float = 1.0, norm: float = 0.5, **more: Any) -> Numbers:
    return Numbers(step, loss, norm, **{"norms": NORMS, **more})


def judge(policy: Policy = Policy(), **more: Any) -> Judge:  # noqa: B008  it is frozen
    return Judge(policy, **{"rank": 2, "shares": [4] * WORLD, "can_go_back": True, **more})


def warmed(policy: Policy = Policy(), **more: Any) -> Judge:  # noqa: B008
    """One that has seen a hundred calm steps."""
    made = judge(policy, **more)
    for step in range(1, 101):
        assert made.rule(numbers(step, loss=1.0 + 0.001 * (step % 7))).act is Act.APPLY
    return made


def found(ruling: Ruling) -> list[tuple[int, int, int]]:
    """Kind, step and accused of what was found."""
    return [(f.kind, f.step, f.accused) for f in ruling.findings]


def with_norm(rank: int, norm: float) -> tuple[float, ...]:
    return (*NORMS[:rank], norm, *NORMS[rank + 1 :])


def test_a_healthy_step_is_applied_and_nothing_is_said() -> None:
    assert judge().rule(numbers(1)) == Ruling(Act.APPLY)


@pytest.mark.parametrize("bad", [math.nan, math.inf, 1e30, 0.0])
def test_a_passing_fault_is_done_again_and_its_rank_named_twice(bad: float) -> None:
    made = judge()
    kind = Doubt.NORM if math.isfinite(bad) else Doubt.NOT_FINITE
    ruling = made.rule(numbers(7, norm=bad + 1.0, norms=with_norm(3, bad)))
    assert (ruling.act, found(ruling)) == (Act.AGAIN, [(kind, 7, 3)])
    ruling = made.rule(numbers(7))
    assert (ruling.act, found(ruling)) == (Act.APPLY, [(Doubt.REPLAY_DIFFERS, 7, 3)])
    assert made.rule(numbers(8)) == Ruling(Act.APPLY)


def test_every_rank_says_the_same_in_its_own_name() -> None:
    rulings = [judge(rank=rank).rule(numbers(7, norms=with_norm(3, math.nan))) for rank in range(WORLD)]
    assert [f.rank for ruling in rulings for f in ruling.findings] == [0, 1, 2, 3]
    assert len({(ruling.act, ruling.findings[0].accused) for ruling in rulings}) == 1


def test_no_finding_holds_a_number_that_json_cannot() -> None:
    bad = numbers(7, loss=math.nan, norm=math.inf, norms=with_norm(0, math.inf))
    assert all(math.isfinite(f.value) and math.isfinite(f.typical) for f in judge().rule(bad).findings)


def test_a_passing_spike_names_the_rank_whose_own_norm_was_another() -> None:
    made = warmed()
    ruling = made.rule(numbers(101, loss=9.0, norms=with_norm(1, 1.3)))
    assert (ruling.act, found(ruling)) == (Act.AGAIN, [(Doubt.SPIKE, 101, -1)])
    ruling = made.rule(numbers(101))
    assert (ruling.act, found(ruling)) == (Act.APPLY, [(Doubt.REPLAY_DIFFERS, 101, 1)])


def test_a_wrong_result_each_time_ends_the_job() -> None:
    made = judge()
    made.rule(numbers(7, norms=with_norm(3, math.nan)))
    ruling = made.rule(numbers(7, norm=2.0, norms=with_norm(3, math.inf)))
    assert (ruling.act, found(ruling)[0]) == (Act.FAIL, (Doubt.REPLAY_DIFFERS, 7, 3))


def test_data_may_give_one_rank_a_large_gradient_but_not_two_steps_in_a_row() -> None:
    made = judge()
    for step in (7, 9):  # step 8 is calm
        large = numbers(step, norms=with_norm(3, 50.0))
        assert made.rule(large).act is Act.AGAIN
        ruling = made.rule(large)
        assert (ruling.act, found(ruling)) == (Act.APPLY, [(Doubt.REPLAY_AGREES, step, -1)])
        if step == 7:
            made.rule(numbers(8))
    large = numbers(10, norms=with_norm(3, 40.0))
    made.rule(large)
    ruling = made.rule(large)
    assert (ruling.act, found(ruling)) == (Act.FAIL, [(Doubt.NORM, 10, 3)])
    assert "rank 3" in ruling.why


def test_numbers_that_are_none_again_fail_unless_the_step_may_be_skipped() -> None:
    bad = numbers(7, loss=math.nan, norm=math.nan)
    for on_spike, wanted in (
        (OnSpike.NOTIFY, Act.FAIL),
        (OnSpike.FAIL, Act.FAIL),
        (OnSpike.SKIP, Act.SKIP),
        (OnSpike.REPLAY, Act.ROLL_BACK),
    ):
        made = judge(Policy(on_spike=on_spike))
        assert made.rule(bad).act is Act.AGAIN
        assert made.rule(bad).act is wanted, on_spike


def test_without_a_storage_there_is_no_going_back() -> None:
    made = judge(Policy(on_spike=OnSpike.REPLAY), can_go_back=False)
    bad = numbers(7, loss=math.nan)
    made.rule(bad)
    assert made.rule(bad).act is Act.FAIL


@pytest.mark.parametrize(
    ("on_spike", "wanted"),
    [
        (OnSpike.NOTIFY, Act.APPLY),
        (OnSpike.FAIL, Act.FAIL),
        (OnSpike.SKIP, Act.SKIP),
        (OnSpike.REPLAY, Act.ROLL_BACK),
    ],
)
def test_a_spike_that_comes_again_is_handled_as_the_job_wants(on_spike: OnSpike, wanted: Act) -> None:
    made = warmed(Policy(on_spike=on_spike))
    assert made.rule(numbers(101, loss=9.0)).act is Act.AGAIN
    assert made.rule(numbers(101, loss=9.0)).act is wanted


def test_a_spike_that_goes_on_is_told_once() -> None:
    made = warmed()
    made.rule(numbers(101, loss=9.0))
    acts = [made.rule(numbers(101, loss=9.0)).act]
    acts += [made.rule(numbers(step, loss=9.0 - 0.1 * step / 100)).act for step in range(102, 130)]
    assert set(acts) == {Act.APPLY}


def test_a_loss_that_never_comes_back_is_not_skipped_for_ever() -> None:
    made = warmed(Policy(on_spike=OnSpike.SKIP))
    for step in range(101, 101 + MAX_SKIPS):
        made.rule(numbers(step, loss=9.0))
        assert made.rule(numbers(step, loss=9.0)).act is Act.SKIP
    made.rule(numbers(9999, loss=9.0))
    assert made.rule(numbers(9999, loss=9.0)).act is Act.FAIL


@pytest.mark.parametrize("seen", ["its rank", "nobody"])
def test_where_bits_are_never_equal_only_who_was_suspected_is_named(seen: str) -> None:
    made = warmed(exact=False)
    norms, loss = (with_norm(3, math.nan), 1.0) if seen == "its rank" else (NORMS, 9.0)
    made.rule(numbers(101, loss, norms=norms))
    ruling = made.rule(numbers(101, norms=with_norm(1, 1.2)))
    assert (ruling.act, found(ruling)) == (
        Act.APPLY,
        [(Doubt.REPLAY_DIFFERS, 101, 3 if seen == "its rank" else -1)],
    )


def test_where_bits_are_never_equal_the_same_spike_is_one_that_came_again() -> None:
    made = warmed(Policy(on_spike=OnSpike.SKIP), exact=False)
    made.rule(numbers(101, loss=9.0))
    assert made.rule(numbers(101, loss=9.001)).act is Act.SKIP


# --- votes ----------------------------------------------------------------------------------------------------------


def test_a_replica_that_differs_is_named_and_the_job_goes_back() -> None:
    made = judge(groups=[(0, 1, 2, 3)])
    assert made.rule(numbers(1, digests=(5, 5, 5, 5))).act is Act.APPLY
    ruling = made.rule(numbers(2, digests=(5, 6, 5, 5)))
    assert ruling.act is Act.ROLL_BACK
    assert ruling.findings == (Finding(2, Doubt.DIGEST, step=1, accused=1, votes=3),)


def test_digests_that_are_switched_off_are_not_voted_on() -> None:
    made = judge(Policy(digests=False), groups=[(0, 1, 2, 3)])
    assert made.rule(numbers(2, digests=(5, 6, 5, 5))).act is Act.APPLY


# --- after going back -------------------------------------------------------------------------------------------------


def record(upto: int, **odd: float) -> dict[int, str]:
    return {step: bits(odd.get(f"s{step}", 1.0), 0.5) for step in range(1, upto + 1)}


def replaying(policy: Policy, **more: Any) -> Judge:
    replay = Replay(**{"doubted": 105, "recorded": record(105, s105=9.0), "done": 100, **more})
    return judge(policy, replay=replay)


@pytest.mark.parametrize(
    ("on_recurrence", "wanted"), [(OnRecurrence.FAIL, Act.FAIL), (OnRecurrence.SKIP, Act.SKIP)]
)
def test_what_recurs_bit_for_bit_is_data_or_program(on_recurrence: OnRecurrence, wanted: Act) -> None:
    made = replaying(Policy(on_spike=OnSpike.REPLAY, on_recurrence=on_recurrence))
    for step in range(101, 105):
        assert made.rule(numbers(step)) == Ruling(Act.APPLY)
    ruling = made.rule(numbers(105, loss=9.0))
    assert (ruling.act, found(ruling)) == (wanted, [(Doubt.REPLAY_AGREES, 105, -1)])


def test_what_vanishes_was_hardware() -> None:
    made = replaying(Policy(on_spike=OnSpike.REPLAY))
    for step in range(101, 105):
        assert made.rule(numbers(step)) == Ruling(Act.APPLY)
    ruling = made.rule(numbers(105))
    assert (ruling.act, found(ruling)) == (Act.APPLY, [(Doubt.REPLAY_DIFFERS, 105, -1)])


def test_the_first_step_that_differs_is_told_and_no_other() -> None:
    made = replaying(Policy(on_spike=OnSpike.REPLAY))
    rulings = [made.rule(numbers(step, loss=1.0 if step < 103 else 1.001)) for step in range(101, 106)]
    assert [found(ruling) for ruling in rulings] == [[], [], [(Doubt.REPLAY_DIFFERS, 103, -1)], [], []]


def test_a_spike_that_comes_again_with_other_bits_is_not_gone_back_from_twice() -> None:
    made = replaying(Policy(on_spike=OnSpike.REPLAY), exact=False)
    for step in range(101, 105):
        assert made.rule(numbers(step, loss=1.001)) == Ruling(Act.APPLY)
    assert made.rule(numbers(105, loss=8.9)).act is Act.AGAIN, "the window knows the steps before"
    assert made.rule(numbers(105, loss=8.9)).act is Act.FAIL


def test_a_vote_that_sent_the_job_back_makes_no_step_a_recurrence() -> None:
    made = replaying(Policy(on_spike=OnSpike.REPLAY), doubted=None)
    for step in range(101, 105):
        made.rule(numbers(step))
    assert made.rule(numbers(105, loss=9.0)).act is Act.AGAIN


def test_bits_are_what_they_were_and_nothing_else_is_taken() -> None:
    assert bits(math.nan) == bits(math.nan)
    assert bits(0.0) != bits(-0.0)
    assert unpack(bits(1.5, -2.0)) == (1.5, -2.0)
    for text in ("", "00", "zz" * 16, "00" * 17):
        with pytest.raises(ValueError, match="hexadecimal"):
            unpack(text)
