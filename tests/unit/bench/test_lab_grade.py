"""What counts as right, as exact and as wrong blame, and the figures made of it."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest

from bench.lab import grade as g
from bench.lab import report
from bench.lab.grade import Record, Seen, confusion, counts, f1, grade, percentile, wilson
from stormjib_fault.words import Answer, Truth
from stormjib_runtime import codec

HANG = Truth("NonCommunicationHang", "Rank", (3,), answers=(Answer("Rank", (3,)),), slots=(3,))
LINK = Truth("CommunicationHang", "Link", (1, 2), answers=(Answer("Link", (1, 2)),), slots=(1, 2))
NOBODY = Truth("Congestion", "Job", answers=(Answer("Job"),))


def record(truth: Truth = HANG, *verdicts: Seen, **more: object) -> Record:
    base = Record("F3-1", "F3", "stop", 4, "dp", 1.0, 3, 1, truth, proof="state T", verdicts=verdicts)
    return replace(base, **more)  # type: ignore[arg-type]


def said(
    at_s: float = 1.0, syndrome: str = "NonCommunicationHang", scope: str = "Rank", **more: object
) -> Seen:
    return replace(Seen(at_s, 1, syndrome, scope, (3,), (3,), 0.9), **more)  # type: ignore[arg-type]


def test_the_right_rank_is_exact_and_another_one_is_wrong_blame() -> None:
    good = grade(record(HANG, said()))
    assert (good.right, good.exact, good.detected_s, good.wrongly_blamed) == (True, True, 1.0, False)
    bad = grade(record(HANG, said(culprits=(2,), slots=(2,))))
    assert (bad.right, bad.exact, bad.wrongly_blamed) == (True, False, True)


def test_a_check_may_correct_a_verdict_but_not_for_long_and_time_runs_to_the_one_that_counts() -> None:
    first, second = said(1.0, culprits=(2,)), said(1.9, confirmed=True)
    late = grade(record(HANG, first, replace(second, at_s=1.0 + g.SETTLE_S + 0.1)))
    assert grade(record(HANG, first, second)).detected_s == 1.9
    assert grade(record(HANG, first, second)).exact
    assert not late.exact
    assert not grade(record(HANG, first, replace(second, id=2))).exact, "another trouble is another verdict"


def test_a_note_does_not_hide_the_verdict_after_it() -> None:
    note = said(0.2, "Imbalance", "Job", culprits=(), slots=(), id=1)
    assert grade(record(HANG, note, said(1.5, id=2))).exact
    assert grade(record(HANG, note)).syndrome == "Imbalance"
    assert not grade(record(HANG, note)).right


def test_a_link_is_exact_in_either_order() -> None:
    hang = said(1.0, "CommunicationHang", "Link", culprits=(2, 1), slots=(2, 1))
    assert grade(record(LINK, hang)).exact
    assert not grade(record(LINK, replace(hang, scope="Node", slots=(1,)))).exact


def test_the_programs_fault_must_be_called_that() -> None:
    truth = replace(HANG, syndrome="Desync", software=True, slots=())
    assert not grade(record(truth, said(1.0, "Desync"))).right
    found = grade(record(truth, said(1.0, "Desync", software=True), accused=(3,)))
    assert (found.exact, found.wrongly_accused) == (True, True)


def test_nobody_may_be_blamed_or_restarted_for_what_is_harmless() -> None:
    note = said(1.0, "Congestion", "Job", culprits=(), slots=())
    assert grade(record(NOBODY, note)).exact
    assert grade(record(NOBODY)).exact
    assert not grade(record(NOBODY, note, restarts=("RankHang rank 1",))).exact
    blamed = grade(record(NOBODY, said(2.0, "CommunicationSlow", "Node", id=2), accused=(1,)))
    assert (blamed.exact, blamed.wrongly_blamed, blamed.wrongly_accused) == (False, True, True)


def test_a_flapping_node_may_be_named_or_not_but_no_other() -> None:
    flap = Truth("", "Job", answers=(Answer("Node", (1,)),), slots=(1,))
    named = said(1.0, "CommunicationHang", "Node", culprits=(1,), slots=(1,))
    assert grade(record(flap)).exact
    assert grade(record(flap, named)).exact
    assert not grade(record(flap, replace(named, slots=(2,)))).right
    assert not grade(record(flap, named, restarts=("RankHang rank 2",))).exact


def test_nothing_seen_is_nothing_found() -> None:
    found = grade(record(HANG))
    assert (found.syndrome, found.right, math.isinf(found.detected_s)) == ("none", False, True)


@pytest.mark.parametrize(
    ("hits", "trials", "low", "high"),
    [
        (0, 0, 0.0, 1.0),
        (100, 100, 0.9630, 1.0),
        (97, 100, 0.9155, 0.9897),
        (0, 20, 0.0, 0.1611),
        (5, 10, 0.2366, 0.7634),
    ],
)
def test_wilson_intervals_are_those_of_the_tables(hits: int, trials: int, low: float, high: float) -> None:
    assert wilson(hits, trials) == pytest.approx((low, high), abs=1e-4)


def test_percentiles_are_values_that_occurred() -> None:
    values = [float(number) for number in range(1, 101)]
    assert (percentile(values, 0.5), percentile(values, 0.95), percentile(values[:1], 0.95)) == (50, 95, 1)
    assert math.isinf(percentile([], 0.5))


def test_the_confusion_matrix_counts_every_trial_once() -> None:
    records = [record(HANG, said()), record(HANG), record(LINK, said()), record(NOBODY)]
    assert confusion(records) == {
        "NonCommunicationHang": {"NonCommunicationHang": 1, "none": 1},
        "CommunicationHang": {"NonCommunicationHang": 1},
        "Congestion": {"none": 1},
    }


def test_f1_takes_false_alarms_of_other_rows_and_wrong_ranks_against_it() -> None:
    slow = replace(HANG, syndrome="NonCommunicationSlow")
    right = [record(slow, said(1.0, "NonCommunicationSlow"))] * 8
    wrong_rank = record(slow, said(1.0, "NonCommunicationSlow", culprits=(1,)))
    false_alarm = record(NOBODY, said(1.0, "NonCommunicationSlow"))
    assert f1([*right]) == (1.0, 1.0, 1.0)
    assert f1([*right, wrong_rank]) == pytest.approx((8 / 9, 8 / 9, 8 / 9))
    assert f1([*right, false_alarm])[:2] == pytest.approx((8 / 9, 1.0))
    assert f1([record(NOBODY)]) == (0.0, 0.0, 0.0)


def test_only_faults_that_fired_count_and_slow_ones_only_above_their_bound() -> None:
    assert not counts(record(proof=""))
    slow = replace(HANG, syndrome="NonCommunicationSlow")
    assert not counts(record(slow, slowdown=1.1))
    assert counts(record(slow, slowdown=1.2))
    assert not counts(record(replace(LINK, syndrome="CommunicationSlow"), slowdown=1.2))
    assert counts(record(slow, slowdown=0.0)), "so slow that no step ended"


def test_a_record_survives_its_file() -> None:
    one = record(HANG, said(), trace={"0": ((-0.1, 0.08, 0.06), (0.1, 0.08, 0.06))})
    assert codec.decode(Record, codec.encode(one)) == one


def test_the_figures_name_every_syndrome_and_fault_with_its_interval() -> None:
    records = [record(HANG, said(number / 10), id=f"F3-{number}") for number in range(1, 21)]
    rows = {(row.metric, row.case, row.subject): row for row in report.rows([*records, record(proof="")])}
    exact = rows["exact", "NonCommunicationHang", "stormjib"]
    assert (exact.median, exact.n) == (1.0, 20)
    assert exact.min == pytest.approx(wilson(20, 20)[0], abs=1e-4)
    assert rows["detected_p95_s", "F3 stop", "stormjib"].median == 1.9
    assert rows["not_fired", "all", "stormjib"].median == 1
    assert rows["wrong_isolations", "all", "stormjib"].median == 0
    assert "exact" in report.line(records[0], grade(records[0]))


def test_what_is_not_sure_blames_nobody() -> None:
    guess = said(0.5, confidence=0.4, culprits=(9,), slots=(9,))
    found = grade(record(HANG, guess, said(1.0, id=2)))
    assert found.exact
    assert not found.wrongly_blamed
