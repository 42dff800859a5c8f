"""The pieces of the engine by themselves."""

from __future__ import annotations

import pytest

from stormjib_health.engine import DEFAULT, Engine, Place, explain
from stormjib_health.engine.baseline import Baseline, Cusum, chance, mad, median
from stormjib_health.engine.corners import Corners, Part, choose, confirm_compute, judge
from stormjib_health.engine.edges import cover, host
from stormjib_health.engine.ledger import Ledger
from stormjib_health.wire import (
    Answer,
    Edge,
    Evidence,
    RankSample,
    Sample,
    Scope,
    Syndrome,
    Verdict,
)  # fmt: skip

VICTIM = "RuntimeError: [gloo/transport/tcp/pair.cc:534] Connection closed by peer [10.0.0.{}]:29500"


# --- baseline ---


def test_median_and_mad() -> None:
    assert median([]) == 0
    assert median([3, 1, 2]) == 2
    assert median([4, 1, 2, 3]) == 2.5
    assert mad([1, 1, 2, 3, 100], 2) == pytest.approx(1.4826)


def test_a_baseline_leaves_out_its_warm_up_and_forgets() -> None:
    base = Baseline(2, 3, 4)
    for value in (100, 100, 1, 2):
        base.add(value)
    assert (base.warm, base.ready, base.top) == (True, False, 2)
    for value in (3, 4, 5):
        base.add(value)
    assert base.ready
    assert base.centre == 3.5


def test_one_long_step_is_no_rise_and_many_small_ones_are() -> None:
    assert not fed(50.0)
    assert not fed(*[1.03] * 50)
    assert fed(*[1.15] * 3)


def fed(*ratios: float) -> bool:
    cusum = Cusum(DEFAULT.cusum_slack, DEFAULT.cusum_limit, DEFAULT.cusum_clip)
    for ratio in ratios:
        cusum.add(ratio, 0.01)
    return cusum.rising


def test_faster_steps_are_seen_too() -> None:
    cusum = Cusum(DEFAULT.cusum_slack, DEFAULT.cusum_limit, DEFAULT.cusum_clip)
    for _ in range(5):
        cusum.add(0.85, 0.01)
    assert cusum.falling


def test_chance_of_being_last() -> None:
    assert chance(8, 8, 2) == pytest.approx(2 / 256)
    assert chance(5, 5, 4) == pytest.approx(4 / 1024)
    assert chance(0, 5, 4) == 1.0


# --- corners ---

FAST, SLOW = 0.01, 0.05
AROUND = Corners(0, 1, 2, 3)


def corner_answers(*slow: tuple[int, int], corners: Corners = AROUND) -> dict[tuple[int, int], Answer]:
    return {
        p: Answer(i, True, SLOW if p in slow else FAST, rtt_s=0.0002) for i, p in enumerate(corners.pairs())
    }


@pytest.mark.parametrize(
    ("slow", "part"),
    [
        (((0, 1),), Part.LINK),
        (((0, 1), (0, 2)), Part.SENDER),
        (((0, 1), (3, 1)), Part.RECEIVER),
        (((0, 1), (2, 3)), Part.FABRIC),
        (((0, 1), (0, 2), (3, 1)), Part.UNKNOWN),
        ((), Part.NOTHING),
        (((2, 3),), Part.NOTHING),
    ],
)
def test_four_corners(slow: tuple[tuple[int, int], ...], part: Part) -> None:
    assert judge(AROUND, corner_answers(*slow), DEFAULT).part is part


def test_three_slots_are_less_sure_and_two_cannot_tell() -> None:
    three = choose(0, 1, [0, 1, 2])
    assert three.pairs() == [(0, 1), (0, 2), (2, 1)]
    assert judge(three, corner_answers((0, 1), (0, 2), corners=three), DEFAULT).part is Part.SENDER
    full = judge(AROUND, corner_answers((0, 1)), DEFAULT)
    assert judge(three, corner_answers((0, 1), corners=three), DEFAULT).sure < full.sure
    two = choose(0, 1, [0, 1])
    assert judge(two, corner_answers(corners=two), DEFAULT).part is Part.UNKNOWN


def test_a_missing_corner_makes_less_sure_and_a_missing_suspect_says_nothing() -> None:
    answers = corner_answers((0, 1))
    del answers[(0, 2)]
    assert judge(AROUND, answers, DEFAULT).sure < 0.7
    del answers[(0, 1)]
    assert judge(AROUND, answers, DEFAULT).part is Part.UNKNOWN


def test_a_round_trip_or_a_failed_burst_is_bad_too() -> None:
    answers = corner_answers()
    answers[(0, 1)] = Answer(0, True, FAST, rtt_s=0.02)
    assert judge(AROUND, answers, DEFAULT).part is Part.LINK
    answers[(0, 1)] = Answer(0, False, text="timed out")
    assert judge(AROUND, answers, DEFAULT).part is Part.LINK


def test_the_product_confirms_clears_or_says_nothing() -> None:
    good = Answer(1, True, 0.05, digest="a", versions="v")
    assert confirm_compute(good, good, 1.1) is False
    assert confirm_compute(Answer(1, True, 0.08, digest="a", versions="v"), good, 1.1) is True
    assert confirm_compute(Answer(1, True, 0.05, digest="b", versions="v"), good, 1.1) is True
    assert confirm_compute(Answer(1, True, 0.05, digest="b", versions="w"), good, 1.1) is None
    busy = Answer(1, True, 0.2, cpu_s=0.05, digest="a", versions="v")
    alone = Answer(1, True, 0.05, cpu_s=0.05, digest="a", versions="v")
    assert confirm_compute(busy, alone, 1.1) is False, "a neighbour on its core is not the node's fault"
    assert confirm_compute(Answer(1, False), good, 1.1) is None
    assert confirm_compute(None, good, 1.1) is None


# --- edges ---


def test_cover_and_host() -> None:
    assert cover([(0, 1, 1.0), (0, 2, 1.0)]) == (0, 1.0, 2)
    assert cover([(0, 1, 1.0), (1, 2, 1.0), (2, 0, 1.0)])[1] == pytest.approx(2 / 3)
    assert cover([])[2] == 0
    assert host("10.0.0.1:80") == "10.0.0.1"
    assert host("[fd00::1]:80") == "fd00::1"


# --- crash ---


def engine_of(ranks: int) -> Engine:
    engine = Engine([Place(rank, rank) for rank in range(ranks)])
    for rank in range(ranks):
        edge = Edge(rank, f"10.0.0.{rank}:{rank}", f"10.0.0.{(rank + 1) % ranks}:9", sent=100)
        engine.observe(Sample(1, "u", rank, 0, "1.1", 1, 0.2, (RankSample(rank),), (edge,)), 0.1)
    return engine


def crash(engine: Engine, *exits: tuple[float, int, int, str], until: float = 2.0) -> list[Verdict]:
    told: list[Verdict] = []
    for tenth in range(1, int(until * 10)):
        now = tenth / 10
        for at, rank, code, lines in exits:
            if now - 0.1 < at <= now:
                engine.exited(rank, code, lines, at)
        told += engine.tick(now).verdicts
    return told


def test_the_rank_that_died_of_a_signal_is_the_root_though_it_is_heard_last() -> None:
    victims = [(0.5 + r / 100, r, 1, VICTIM.format(2)) for r in (0, 1, 3)]
    (verdict,) = crash(engine_of(4), *victims, (0.6, 2, -9, ""))
    assert (verdict.syndrome, verdict.culprits, verdict.slots) == (Syndrome.CRASH, (2,), (2,))
    assert verdict.sentence.startswith(
        "rank 2 was ended by signal 9 without a communication error; 3 of the others"
    )
    assert verdict.lasted_s <= 0.5


def test_a_cascade_blames_the_rank_that_most_were_cut_from() -> None:
    exits = [
        (0.5, 2, -9, ""),
        (0.52, 3, -9, ""),
        (0.6, 0, 1, VICTIM.format(3)),
        (0.6, 1, 1, VICTIM.format(3)),
    ]
    (verdict,) = crash(engine_of(4), *exits)
    assert verdict.culprits == (3,)
    assert verdict.confidence < 0.98


def test_a_program_error_is_the_programs() -> None:
    (verdict,) = crash(engine_of(2), (0.5, 1, 1, "Traceback ...\nKeyError: 'x'"))
    assert verdict.software
    (verdict,) = crash(engine_of(2), (0.5, 1, 1, "RuntimeError: CUDA error: uncorrectable ECC error"))
    assert not verdict.software


def test_only_victims_name_the_silent_rank_or_the_link_or_nobody() -> None:
    engine = engine_of(3)
    engine.silent(2, 0.2)
    (verdict,) = crash(engine, (0.5, 0, 1, VICTIM.format(2)), (0.5, 1, 1, VICTIM.format(2)))
    assert (verdict.scope, verdict.culprits) == (Scope.RANK, (2,))
    (verdict,) = crash(engine_of(3), (0.5, 0, 1, VICTIM.format(2)))
    assert (verdict.scope, verdict.culprits) == (Scope.LINK, (0, 2))
    (verdict,) = crash(engine_of(3), (0.5, 0, 1, VICTIM.format(77)))
    assert (verdict.scope, verdict.culprits) == (Scope.JOB, ())


def test_an_end_in_order_is_no_crash() -> None:
    assert crash(engine_of(2), (0.5, 0, 0, ""), (0.6, 1, 0, "")) == []


# --- verdicts ---


def draft(**changes: object) -> Verdict:
    given = {"culprits": (1,), "slots": (1,), "confidence": 0.5, **changes}
    return Verdict(0, Syndrome.NON_COMMUNICATION_SLOW, Scope.RANK, **given)  # type: ignore[arg-type]


def test_a_trouble_keeps_its_id_and_is_told_on_change_only() -> None:
    ledger = Ledger()
    first = ledger.tell("slow", draft(severity=1.2), 1.5)
    assert first is not None
    assert ledger.tell("slow", draft(severity=1.3, lasted_s=4.0), 1.5) is None
    worse = ledger.tell("slow", draft(severity=1.6), 1.5)
    assert worse is not None
    assert worse.id == first.id
    for severity in (1.2, 1.6, 1.3, 2.0):  # how bad it is comes and goes
        assert ledger.tell("slow", draft(severity=severity), 1.5) is None
    ledger.close("slow")
    later = ledger.tell("slow", draft(), 1.5)
    assert later is not None
    assert later.id > first.id


def test_explain_is_a_sentence_and_a_table() -> None:
    verdict = Verdict(
        3, Syndrome.NON_COMMUNICATION_HANG, Scope.RANK, (5,), (2,), 0.98, True, False, 1.0, 1.25,
        "rank 5 issued 1,204 collectives of default_pg, the others 1,205; its process is stopped",
        (Evidence("issued", "rank 5", "1,204", "1,205"), Evidence("process", "rank 5\x1b[31m", "T")), "state T",
    )  # fmt: skip
    lines = explain(verdict).splitlines()
    assert lines[0] == "NonCommunicationHang @ rank 5 (slot 2): 98 %, confirmed, after 1.2 s"
    assert lines[1] == verdict.sentence
    assert lines[5].split() == ["issued", "rank", "5", "1,204", "1,205"]
    assert "\x1b" not in lines[6]
    assert lines[-1] == "  state T"


def test_explain_names_links_nodes_and_nobody() -> None:
    link = Verdict(1, Syndrome.COMMUNICATION_HANG, Scope.LINK, (2, 1), (2, 1))
    assert "link rank 2 -> rank 1 (slots 2, 1)" in explain(link)
    assert "@ slot 4:" in explain(Verdict(1, Syndrome.COMMUNICATION_SLOW, Scope.NODE, (4,), (4,)))
    assert "@ nobody:" in explain(Verdict(1, Syndrome.CONGESTION, Scope.JOB))
