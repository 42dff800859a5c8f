"""The pieces of the engine by themselves."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from stormjib_health.engine import DEFAULT, Engine, Place, explain
from stormjib_health.engine.baseline import Baseline, Cusum, chance, mad, median
from stormjib_health.engine.book import Book
from stormjib_health.engine.checks import Checks
from stormjib_health.engine.cut import Cut
from stormjib_health.engine.edges import Bad, End, cover, host
from stormjib_health.engine.ledger import Ledger
from stormjib_health.engine.own import Own
from stormjib_health.engine.product import confirm_compute
from stormjib_health.engine.sweep import Part, judge, judge_reach, pairs
from stormjib_health.verdict import Evidence, Scope, Syndrome, Verdict  # fmt: skip
from stormjib_health.wire import Answer, Edge, RankSample, Sample  # fmt: skip

if TYPE_CHECKING:
    from collections.abc import Sequence

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


def test_a_baseline_that_forgets_its_oldest_stays_ready() -> None:
    baseline = Baseline(0, 4, 16)
    for value in (9.0,) * 10 + (1.0, 1.0):
        baseline.add(value)
    assert baseline.centre == 9.0
    baseline.forget_oldest()
    assert (baseline.ready, len(baseline), baseline.centre) == (True, 4, 5.0)


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


# --- bursts ---

FAST, SLOW = 0.01, 0.05
SUSPECT = [(0, 1)]


def bursts(
    *slow: tuple[int, int], slots: int = 4, hot: Sequence[tuple[int, int]] = SUSPECT
) -> dict[tuple[int, int], Answer]:
    asked = pairs(hot, range(slots))
    return {p: Answer(i, True, SLOW if p in slow else FAST, rtt_s=0.0002) for i, p in enumerate(asked)}


def test_bursts_go_both_ways_on_the_hottest_links_and_between_references() -> None:
    assert set(pairs([(0, 1)], range(4))) == {
        (0, 1), (1, 0), (0, 2), (2, 0), (3, 1), (1, 3), (2, 3), (3, 2),
    }  # fmt: skip
    assert pairs([(0, 1)], range(4))[-2:] == [(0, 1), (1, 0)], "what may take a second comes last"
    assert set(pairs([(0, 1)], range(3))) == {(0, 1), (1, 0), (0, 2), (2, 0), (2, 1), (1, 2)}
    assert set(pairs([(0, 1)], range(2))) == {(0, 1), (1, 0)}
    many = pairs([(a, (a + 1) % 20) for a in range(20)], range(20))
    assert len(many) == 14
    assert {(4, 5), (5, 4)}.isdisjoint(many)


@pytest.mark.parametrize(
    ("slow", "part", "slots"),
    [
        (((0, 1),), Part.LINK, (0, 1)),
        (((0, 1), (1, 0)), Part.LINK, (0, 1)),
        (((0, 1), (0, 2)), Part.NODE, (0,)),
        (((0, 1), (3, 1)), Part.NODE, (1,)),
        (((0, 1), (1, 0), (0, 2), (2, 0)), Part.NODE, (0,)),
        (((2, 3),), Part.LINK, (2, 3)),
        (((0, 1), (2, 3)), Part.UNKNOWN, ()),
        (((0, 1), (1, 0), (2, 3), (3, 2), (0, 2)), Part.FABRIC, ()),
        ((), Part.NOTHING, ()),
    ],
)
def test_slow_bursts_point_at(slow: tuple[tuple[int, int], ...], part: Part, slots: tuple[int, ...]) -> None:
    outcome = judge(bursts(*slow), DEFAULT)
    assert (outcome.part, outcome.slots) == (part, slots)


def test_which_side_of_a_node_is_slow() -> None:
    assert judge(bursts((0, 1), (0, 2)), DEFAULT).side == "sending"
    assert judge(bursts((1, 0), (2, 0)), DEFAULT).side == "receiving"
    assert judge(bursts((1, 0), (0, 2)), DEFAULT).side == "sending and receiving"


def test_a_burst_beside_others_may_take_a_while() -> None:
    answers = bursts()
    answers[(0, 1)] = Answer(0, True, 1.4 * FAST, rtt_s=0.0002)
    assert judge(answers, DEFAULT).part is Part.NOTHING
    answers[(0, 1)] = Answer(0, True, 1.6 * FAST, rtt_s=0.0002)
    assert judge(answers, DEFAULT).part is Part.LINK


def test_ends_that_waited_longer_for_a_processor_than_for_the_path_call_nothing_slow() -> None:
    answers = bursts()
    answers[(0, 1)] = Answer(0, True, 3 * FAST, rtt_s=0.0002, queued_s=2 * FAST)
    assert judge(answers, DEFAULT).part is Part.LINK
    answers[(0, 1)] = Answer(0, True, 3 * FAST, rtt_s=0.0002, queued_s=4 * FAST)
    assert judge(answers, DEFAULT).part is Part.NOTHING


def test_a_burst_that_cannot_explain_what_steps_lose_is_not_bad() -> None:
    answers = bursts()
    answers[(0, 1)] = Answer(0, True, 3 * FAST, bytes=1000, rtt_s=0.0002)
    assert judge(answers, DEFAULT, lost_per_byte=0.9 * 2 * FAST / 1000).part is Part.LINK
    assert judge(answers, DEFAULT, lost_per_byte=1.1 * 2 * FAST / 1000).part is Part.NOTHING


def test_two_slots_cannot_tell_and_a_link_without_good_neighbours_is_less_sure() -> None:
    assert judge(bursts((0, 1), slots=2), DEFAULT).part is Part.UNKNOWN
    answers = {p: a for p, a in bursts((0, 1)).items() if 1 not in p or p == (0, 1)}
    assert judge(answers, DEFAULT).sure < judge(bursts((0, 1)), DEFAULT).sure


def test_a_round_trip_or_a_failed_burst_is_bad_too() -> None:
    answers = bursts()
    answers[(0, 1)] = Answer(0, True, FAST, rtt_s=0.02)
    assert judge(answers, DEFAULT).slots == (0, 1)
    answers[(0, 1)] = Answer(0, False, text="timed out")
    assert judge(answers, DEFAULT).slots == (0, 1)
    answers[(0, 1)] = Answer(0, True, FAST, again=9, rtt_s=0.0002)
    assert judge(answers, DEFAULT).slots == (0, 1)


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


# --- own work ---


def worked(*own: Sequence[float]) -> Own:
    """Ranks 0, 1, ... with their own work step by step, a step each second."""
    book = Book([Place(rank, rank) for rank in range(len(own))], DEFAULT, 0.0)
    found = Own(book)
    for rank, series in enumerate(own):
        for step, seconds in enumerate(series):
            found.take(RankSample(rank, steps_s=(0.1,), own_s=(seconds,), steps_to=step), float(step))
    return found


def test_own_work_that_grows_is_its_ranks() -> None:
    healthy = [0.05] * 40
    growth = worked(healthy, [*healthy[:36], 0.09, 0.08, 0.09, 0.08]).growth(35.5, 0.01)
    assert growth.more[0] == pytest.approx(0.0)
    assert growth.more[1] == pytest.approx(0.035)
    assert growth.ratio[1] == pytest.approx(1.7)
    assert growth.most == {1: 4}
    assert growth.longest == pytest.approx(0.035)


def test_own_work_of_too_few_steps_or_of_an_old_step_says_nothing() -> None:
    assert worked([0.05] * 20).growth(0.0, 0.01).more == {}, "16 are looked back on, and 4 are no baseline"
    own = worked([0.05] * 40)
    own.take(RankSample(0, steps_s=(0.1,), own_s=(9.0,), steps_to=39), 40.0)
    assert own.growth(30.0, 0.01).more[0] == pytest.approx(0.0), "step 39 was told"


def test_nothing_is_learned_while_something_is_suspicious() -> None:
    own = worked([0.05] * 30)
    own.frozen = True
    for step in range(30, 80):
        own.take(RankSample(0, steps_s=(0.1,), own_s=(0.1,), steps_to=step), float(step))
    assert own.growth(60.0, 0.01).ratio[0] == pytest.approx(2.0)


def test_own_work_says_how_far_off_healthy_steps_are() -> None:
    noisy = [0.04, 0.06] * 30
    growth = worked(noisy, [0.05] * 60).growth(55.5, 0.0)
    assert growth.noise[0] == pytest.approx(0.01 / 2, rel=0.3), "four steps"
    assert growth.noise[1] == pytest.approx(0.0, abs=1e-6)


# --- edges ---


def test_cover_and_host() -> None:
    assert cover([(0, 1, 1.0), (0, 2, 1.0)]) == (0, 1.0, 2)
    assert cover([(0, 1, 1.0), (1, 2, 1.0), (2, 0, 1.0)])[1] == pytest.approx(2 / 3)
    assert cover([])[2] == 0
    assert host("10.0.0.1:80") == "10.0.0.1"
    assert host("[fd00::1]:80") == "fd00::1"


@pytest.mark.parametrize(
    ("dead", "part", "slots"),
    [
        (((0, 1), (1, 0)), Part.LINK, (0, 1)),
        (((0, 1), (1, 0), (1, 3), (3, 1)), Part.NODE, (1,)),
        ((), Part.NOTHING, ()),
    ],
)
def test_where_something_stands_only_bursts_that_fail_count(
    dead: tuple[tuple[int, int], ...], part: Part, slots: tuple[int, ...]
) -> None:
    answers = bursts((0, 2), (3, 2))
    answers |= {pair: Answer(0, False, text="timed out") for pair in dead}
    outcome = judge_reach(answers, DEFAULT)
    assert (outcome.part, outcome.slots) == (part, slots)


def standing() -> tuple[Cut, Checks, Bad]:
    """Four slots that are heard, and what rank 0 sends to rank 1 is not acknowledged."""
    book, checks = Book([Place(rank, rank) for rank in range(4)], DEFAULT, 0.0), Checks(DEFAULT)
    for slot in book.slots.values():
        slot.quiet, slot.heard = False, 1.0
    cut = Cut(book, checks)
    bad = Bad(0, 1, End(Edge(0, "10.0.0.1:1", "10.0.0.2:2", unacked=1)), 1)
    return cut, checks, bad


@pytest.mark.parametrize(
    ("dead", "scope", "culprits"), [((0, 1), Scope.LINK, (0, 1)), ((1, 3), Scope.NODE, (1,))]
)
def test_a_connection_that_stands_is_called_a_link_or_a_node_only_once_bursts_have_told(
    dead: tuple[int, int], scope: Scope, culprits: tuple[int, ...]
) -> None:
    cut, checks, bad = standing()
    cut.prepare([bad], 0.7)
    cut.prepare([bad], 0.8)
    asked = checks.new()
    assert len(asked) == len(pairs([(0, 1)], range(4))), "asked once"
    assert cut.of_bad([bad], 1.2, 1.2) is None
    gone = {(0, 1), (1, 0)} | {dead, dead[::-1]}
    for ask in asked:
        ok = (ask.slot, ask.peer_slot) not in gone
        checks.answered(ask.slot, Answer(ask.id, ok, FAST, bytes=1000, rtt_s=0.0002))
    verdict = cut.of_bad([bad], 1.3, 1.3)
    assert verdict is not None
    assert (verdict.scope, verdict.culprits, verdict.confirmed) == (scope, culprits, True)


def test_who_turns_bursts_away_is_not_cut_off_for_that() -> None:
    cut, checks, bad = standing()
    cut.prepare([bad], 0.7)
    for ask in checks.new():
        away = 1 in (ask.slot, ask.peer_slot)  # of another version than all others
        checks.answered(
            ask.slot, Answer(ask.id, not away, 0.0 if away else FAST, bytes=1000, turned_away=away)
        )
    verdict = cut.of_bad([bad], 1.3, 1.3)
    assert verdict is not None
    assert (verdict.scope, verdict.confirmed) == (Scope.LINK, False)


def test_bursts_that_nobody_answers_are_not_waited_for_long() -> None:
    cut, _, bad = standing()
    cut.prepare([bad], 0.7)
    assert cut.of_bad([bad], 1.5, 1.5) is None
    verdict = cut.of_bad([bad], 1.6, 1.6)
    assert verdict is not None
    assert (verdict.scope, verdict.confirmed) == (Scope.LINK, False)


# --- crash ---


def engine_of(ranks: int) -> Engine:
    engine = Engine([Place(rank, rank) for rank in range(ranks)])
    for rank in range(ranks):
        edge = Edge(rank, f"10.0.0.{rank}:{rank}", f"10.0.0.{(rank + 1) % ranks}:9", sent=100)
        engine.observe(Sample(1, "u", rank, 0, "1.1", 1, 0.2, (RankSample(rank),), (edge,)), 0.1)
    return engine


def spoken(engine: Engine, *slots: int) -> Engine:
    """Samples of these slots that came after the exits that a test is about to tell."""
    for slot in slots:
        engine.observe(Sample(1, "u", slot, 0, "1.1", 2, 0.2, (RankSample(slot),)), 0.6)
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


def test_a_rank_that_was_sent_something_else_shows_a_desync_of_the_program() -> None:
    gloo = (
        "what(): [enforce fail at gloo/transport/tcp/pair.cc:464] op.preamble.length <= op.nbytes. 52 vs 16"
    )
    exits = [
        (0.5, 1, -6, f"terminate called after throwing an instance\n{gloo}"),
        (0.55, 0, 1, VICTIM.format(1)),
    ]
    (verdict,) = crash(engine_of(3), *exits)
    assert (verdict.syndrome, verdict.scope, verdict.slots) == (Syndrome.DESYNC, Scope.JOB, ())
    assert verdict.software
    assert verdict.sentence == "rank 1 was sent something else than it had called for, and ended"


def test_only_victims_name_the_silent_rank_or_the_link_or_nobody() -> None:
    engine = engine_of(3)
    engine.silent(2, 0.2)
    (verdict,) = crash(engine, (0.5, 0, 1, VICTIM.format(2)), (0.5, 1, 1, VICTIM.format(2)))
    assert (verdict.scope, verdict.culprits) == (Scope.NODE, (2,))
    (verdict,) = crash(spoken(engine_of(3), 2), (0.5, 0, 1, VICTIM.format(2)))
    assert (verdict.scope, verdict.culprits) == (Scope.LINK, (0, 2))
    (verdict,) = crash(spoken(engine_of(3), 1, 2), (0.5, 0, 1, VICTIM.format(77)))
    assert (verdict.scope, verdict.culprits) == (Scope.JOB, ())


def test_a_slot_that_says_nothing_after_the_others_ended_has_gone_first() -> None:
    (verdict,) = crash(spoken(engine_of(3), 1), (0.5, 0, 1, VICTIM.format(77)))
    assert (verdict.scope, verdict.culprits, verdict.slots) == (Scope.NODE, (2,), (2,))
    assert verdict.sentence == "rank 0 lost the connection to slot 2, and its agent has been silent since"
    assert verdict.lasted_s <= 0.4
    begun = Engine([Place(rank, rank) for rank in range(2)])
    begun.observe(Sample(1, "u", 0, 0, "1.1", 1, 0.2, (RankSample(0),)), 0.6)
    (verdict,) = crash(begun, (0.5, 0, 1, VICTIM.format(77)))
    assert verdict.scope is Scope.JOB, "the other slot was never heard: it may be about to begin"
    exits = [(0.5, rank, 1, VICTIM.format(77)) for rank in range(3)]
    (verdict,) = crash(engine_of(3), *exits)
    assert verdict.scope is Scope.JOB, "all ranks of the silent slot are accounted for"
    (verdict,) = crash(engine_of(3), (0.5, 0, 1, VICTIM.format(77)))
    assert verdict.scope is Scope.JOB, "two are silent"


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
