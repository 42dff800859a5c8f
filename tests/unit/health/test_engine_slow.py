"""What slow is measured against, and how a slow connection is named: the parts alone, fed by hand."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from itertools import pairwise
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, cast

import pytest

from stormjib_health.engine import DEFAULT, Place
from stormjib_health.engine.book import Book, Standing
from stormjib_health.engine.checks import Checks
from stormjib_health.engine.edges import Edges, End, Heat
from stormjib_health.engine.hang import Hang
from stormjib_health.engine.late import Blame
from stormjib_health.engine.links import Links
from stormjib_health.engine.own import Growth
from stormjib_health.engine.pace import Pace
from stormjib_health.engine.slow import Slow
from stormjib_health.engine.usual import PAIRS, Usual
from stormjib_health.verdict import Scope, Syndrome
from stormjib_health.wire import Answer, Call, Edge, Group, Kind, Pair, RankSample

if TYPE_CHECKING:
    from stormjib_health.verdict import Verdict


def paced(*steps: float) -> Pace:
    """A job of two ranks that made these steps."""
    book = Book([Place(0, 0), Place(1, 1)], DEFAULT, 0.0)
    pace = Pace(book)
    for number, seconds in enumerate(steps):
        feed(pace, book, number, seconds)
    return pace


def feed(pace: Pace, book: Book, number: int, seconds: float) -> None:
    book.top_step = number
    for rank in (0, 1):
        pace.take(RankSample(rank, steps_s=(seconds,), own_s=(0.0,), steps_to=number), float(number))


def test_a_job_that_becomes_quicker_is_judged_all_the_time() -> None:
    slow_start = (0.2,) * 40
    assert paced(*slow_start, *(0.1,) * 3).steps.ready
    settled = paced(*slow_start, *(0.1,) * 25)
    assert settled.steps.ready
    assert settled.steps.centre == 0.1
    slowed = paced(*slow_start, *(0.1,) * 25, *(0.15,) * 5)
    assert slowed.slow, "against what steps have been like lately"


def test_what_is_slow_now_is_told_from_what_was() -> None:
    slowed = paced(*(0.1,) * 50, *(0.2,) * 5)
    assert (slowed.slow, slowed.above) == (True, True)
    pausing = paced(*(0.1,) * 50, *(0.2,) * 5, *(0.1,) * 4)
    assert (pausing.slow, pausing.above) == (True, False)


@pytest.mark.parametrize(("steps", "patience"), [(7, 4.83), (20, 2.67), (34, 1.0)])
def test_the_more_is_known_of_a_job_the_less_patience_it_gets(steps: int, patience: float) -> None:
    pace = paced(*(0.1,) * steps)
    hang = Hang(pace._book, Edges(pace._book.slot_of, DEFAULT), pace, Checks(DEFAULT))
    assert hang.patience() == pytest.approx(patience, abs=0.2)


@pytest.mark.parametrize(
    ("kind", "sent", "received", "found"),
    [
        (Kind.RECV, 4, 5, Syndrome.DESYNC),  # rank 0 has left a send out
        (Kind.SEND, 5, 4, Syndrome.DESYNC),  # rank 1 has left a receive out
        (
            Kind.RECV,
            5,
            5,
            Syndrome.NON_COMMUNICATION_HANG,
        ),  # it was sent: rank 1 has come back from it, and sleeps
        (Kind.SEND, 5, 5, Syndrome.NON_COMMUNICATION_HANG),
    ],
)
def test_a_message_and_a_collective_that_wait_for_each_other_are_the_programs_fault(
    kind: Kind, sent: int, received: int, found: Syndrome
) -> None:
    pace = paced(*(0.1,) * 40)
    book, now = pace._book, 45.0
    hang = Hang(book, Edges(book.slot_of, DEFAULT), pace, Checks(DEFAULT))
    book.groups[7] = Group.of(7, "pipeline", (0, 1))
    in_pair = int(
        kind is Kind.RECV
    )  # the rank that stands in the message; the other has gone on to the collective
    for rank in book.ranks.values():
        counts = (sent, 0) if rank.rank == 0 else (0, received)
        what = kind if rank.rank == in_pair else Kind.ALL_REDUCE
        call = Call(
            7,
            9 + (rank.rank != in_pair),
            int(what),
            peer=1 - rank.rank,
            pairs=(Pair(1 - rank.rank, *counts),),
        )
        rank.calls[7] = Standing(call, 41.0)
        rank.idle_since = 41.0
        slot = book.slots[rank.slot]
        slot.quiet, slot.heard, slot.interval = False, now, 0.2
    book.advanced_at = 41.0
    hang.look(now)
    verdict = hang.look(now + 0.1)
    assert verdict is not None
    assert (verdict.syndrome, verdict.software) == (found, found is Syndrome.DESYNC)


class Suspicion:
    """Four slots, one rank each; what rank 0 sends to rank 1 is hot, and bursts answer as the test says."""

    def __init__(self, severity: float = 1.5, usual: float = 0.0) -> None:
        self.checks = Checks(DEFAULT)
        book = Book([Place(rank, rank) for rank in range(4)], DEFAULT, 0.0)
        for slot in book.slots.values():
            slot.quiet = False
        end = End(Edge(0, "10.0.0.1:1", "10.0.0.2:2"))
        end.now = [0.1, 1e6, 0.0, 1.0]
        heat = Heat(0, 1, 3.0, 0.9, end)
        edges: Any = SimpleNamespace(heats=lambda: ([heat], 8))
        steps = SimpleNamespace(centre=0.1, ready=False)
        self.pace: Any = SimpleNamespace(
            severity=severity, recent=0.1 * severity, excess=0.1 * (severity - 1), since=0.0, steps_since=3, steps=steps
        )  # fmt: skip
        known: Any = SimpleNamespace(per_byte=lambda: usual)
        self.links = Links(book, cast("Edges", edges), cast("Pace", self.pace), self.checks, known)

    def look(self) -> Verdict | None:
        return self.links.look(1.0)

    def answer(self, *slow: tuple[int, int], seconds: float = 0.5) -> Verdict | None:
        """All bursts that were asked for, these slow ones; what is said then."""
        asked = self.checks.new()
        assert asked, "no bursts were asked for"
        for ask in asked:
            good = Answer(ask.id, True, 0.002, bytes=1 << 20, rtt_s=0.0001)
            bad = (ask.slot, ask.peer_slot) in slow
            self.checks.answered(ask.slot, replace(good, seconds=seconds) if bad else good)
        return self.look()


def test_two_rounds_of_bursts_that_agree_name_a_link_surely() -> None:
    suspicion = Suspicion()
    first = suspicion.look()
    assert first is not None
    assert first.confidence < DEFAULT.act_confidence
    once = suspicion.answer((0, 1))
    assert once is not None
    assert (once.scope, once.culprits, once.confirmed) == (Scope.LINK, (0, 1), False)
    assert once.confidence < DEFAULT.act_confidence
    twice = suspicion.answer((0, 1))
    assert twice is not None
    assert (twice.scope, twice.culprits, twice.confirmed) == (Scope.LINK, (0, 1), True)
    assert twice.confidence > DEFAULT.act_confidence


def test_a_slow_link_in_a_network_that_is_slow_for_everybody_is_congestion() -> None:
    burst = 0.002 / (1 << 20)
    for usual, named in ((burst, Syndrome.COMMUNICATION_SLOW), (burst / 4, Syndrome.CONGESTION)):
        suspicion = Suspicion(usual=usual)
        suspicion.look()
        verdict = suspicion.answer((0, 1))
        assert verdict is not None
        assert verdict.syndrome is named


def test_what_bursts_usually_take_is_asked_for_once_in_good_health() -> None:
    book = Book([Place(rank, rank) for rank in range(24)], DEFAULT, 0.0)
    for slot in book.slots.values():
        slot.quiet = slot is book.slots[3]
    checks, pace = Checks(DEFAULT), SimpleNamespace(steps=SimpleNamespace(ready=False), uneasy=False)
    usual = Usual(book, cast("Pace", pace), checks)
    usual.look(1.0)
    pace.steps.ready, pace.uneasy = True, True
    usual.look(2.0)
    assert (checks.new(), usual.per_byte()) == ((), 0.0)
    pace.uneasy = False
    usual.look(3.0)
    asked = checks.new()
    assert len(asked) == 2 * PAIRS
    assert 3 not in {slot for ask in asked for slot in (ask.slot, ask.peer_slot)}
    for ask in asked:
        checks.answered(ask.slot, Answer(ask.id, ask.slot != 0, 0.001 * (1 + ask.slot), bytes=1000))
    usual.look(4.0)
    assert checks.new() == ()
    assert 1e-6 < usual.per_byte() < 25e-6


def test_a_round_that_does_not_say_the_same_again_names_nobody_surely() -> None:
    suspicion = Suspicion()
    suspicion.look()
    suspicion.answer((0, 1))
    other = suspicion.answer((2, 3))
    assert other is not None
    assert (other.culprits, other.confirmed) == ((0, 1), False), (
        "no hot connection on the link of the second round"
    )
    nothing = suspicion.answer()
    assert nothing is not None
    assert (nothing.syndrome, nothing.culprits) == (Syndrome.CONGESTION, ())


def test_bursts_that_are_a_little_slow_do_not_explain_what_steps_lose() -> None:
    suspicion = Suspicion()
    suspicion.look()
    said = suspicion.answer((0, 1), seconds=0.01)
    assert said is not None
    assert said.syndrome is Syndrome.CONGESTION


def test_connections_are_looked_at_ever_more_seldom_and_not_for_small_slowdowns() -> None:
    assert Suspicion(severity=1.15).look() is None
    suspicion = Suspicion()
    suspicion.look()
    rounds = [suspicion.pace.steps_since]
    suspicion.answer()
    while suspicion.pace.steps_since < 100:
        suspicion.pace.steps_since += 1
        if suspicion.look() is not None:
            rounds.append(suspicion.pace.steps_since)
            suspicion.answer()
    waits = [later - earlier for earlier, later in pairwise(rounds)]
    assert waits == [4, 8, 16, 32]


# --- whose slowness it is ---


def told(
    blame: Blame | None = None,
    growth: Growth | None = None,
    throttled: dict[int, tuple[float, float]] | None = None,
    queued: dict[int, float] | None = None,
    now: float = 1.0,
) -> Verdict | None:
    """What is said of steps that last half as long again, by two ranks in one group. `throttled`: now and usually;
    `queued`: seconds that a rank has waited for a processor."""
    book = Book([Place(0, 0), Place(1, 1)], DEFAULT, 0.0)
    book.groups[7] = Group.of(7, "default_pg", (0, 1))
    for rank, (part, usually) in (throttled or {}).items():
        book.ranks[rank].throttled, book.ranks[rank].throttled_usually = part, usually
    for rank, seconds in (queued or {}).items():
        book.ranks[rank].queued.append((0.5, seconds))
    pace: Any = SimpleNamespace(
        slow=True, above=True, severity=1.5, recent=0.15, excess=0.05, since=0.25, steps_since=8, steps=SimpleNamespace(centre=0.1, ready=False)
    )  # fmt: skip
    edges: Any = SimpleNamespace(heats=lambda: ([], 2))
    late: Any = SimpleNamespace(blame=lambda since, least: blame or Blame())
    own: Any = SimpleNamespace(growth=lambda since, least: growth or Growth())
    return Slow(book, edges, pace, late, own, Checks(DEFAULT)).look(now)


def test_a_rank_whose_processor_is_refused_more_than_usual_is_slow() -> None:
    found = told(throttled={1: (0.3, 0.02)})
    assert found is not None
    assert (found.scope, found.culprits) == (Scope.RANK, (1,))
    assert "its processor is refused 30% of the time" in found.sentence
    assert told(throttled={1: (0.3, 0.3)}) is None, "it always was"
    assert told(throttled={0: (0.3, 0.0), 1: (0.25, 0.0)}) is None, "so is the other's"


@pytest.mark.parametrize(("noise", "named"), [(0.001, True), (0.02, False)])
def test_own_work_must_have_grown_beyond_its_noise(noise: float, named: bool) -> None:
    growth = Growth({0: 0.0, 1: 0.03}, {0: 1.0, 1: 1.6}, {0: noise, 1: noise}, Counter({1: 8}), 0.03)
    found = told(growth=growth)
    assert (found is not None and found.culprits == (1,)) == named


@pytest.mark.parametrize(("noise", "named"), [(0.001, True), (0.02, False)])
def test_lateness_must_be_beyond_its_noise(noise: float, named: bool) -> None:
    blame = Blame({0: -0.04, 1: 0.04}, {0: noise**2, 1: noise**2}, {7: Counter({1: 8})}, 0.04)
    found = told(blame=blame)
    assert (found is not None and found.culprits == (1,)) == named


@pytest.mark.parametrize(
    ("queued", "now", "confidence"),
    [
        ({}, 1.0, 0.8),
        ({1: 0.3}, 1.0, 0.5),  # 8 steps, 40 ms late in each: it waited for nearly all of that
        ({1: 0.1}, 1.0, 0.8),  # for less than half of it
        ({0: 0.3, 1: 0.3}, 1.0, 0.8),  # so did the other
        ({1: 0.3}, 31.0, 0.8),  # whose work it is, does not end
    ],
)
def test_a_rank_that_waits_for_a_processor_is_blamed_when_that_lasts(
    queued: dict[int, float], now: float, confidence: float
) -> None:
    blame = Blame({0: -0.04, 1: 0.04}, {0: 1e-6, 1: 1e-6}, {7: Counter({1: 8})}, 0.04)
    found = told(blame=blame, queued=queued, now=now)
    assert found is not None
    assert (found.culprits, found.confidence) == ((1,), confidence)
    assert ("its processor is busy with others" in found.sentence) == (queued == {1: 0.3})


def test_a_product_that_was_asked_for_before_the_processor_was_busy_confirms_nothing() -> None:
    for queued_s, confidence in ((0.0, 0.95), (0.3, 0.5)):
        book = Book([Place(0, 0), Place(1, 1)], DEFAULT, 0.0)
        book.groups[7] = Group.of(7, "default_pg", (0, 1))
        pace: Any = SimpleNamespace(
            slow=True, above=True, severity=1.5, recent=0.15, excess=0.05, since=0.25, steps_since=5, steps=SimpleNamespace(centre=0.1, ready=False)
        )  # fmt: skip
        blame = Blame({0: -0.04, 1: 0.04}, {0: 1e-6, 1: 1e-6}, {7: Counter({1: 5})}, 0.04)
        late: Any = SimpleNamespace(blame=lambda since, least, blame=blame: blame)
        own: Any = SimpleNamespace(growth=lambda since, least: Growth())
        checks = Checks(DEFAULT)
        slow = Slow(book, SimpleNamespace(heats=lambda: ([], 2)), pace, late, own, checks)  # type: ignore[arg-type]
        hint = slow.look(1.0)
        assert hint is not None
        assert hint.confidence == 0.5
        asks = checks.new()
        assert {ask.rank for ask in asks} == {0, 1}
        if queued_s:
            book.ranks[1].queued.append((1.1, queued_s))
        pace.steps_since = 6
        slow.look(1.2)
        for ask in asks:
            took_s = 0.2 if ask.rank == 1 else 0.05
            checks.answered(ask.slot, Answer(ask.id, True, took_s, digest="a", versions="v"))
        found = slow.look(1.3)
        assert found is not None
        assert (found.culprits, found.confidence) == ((1,), confidence)


def test_what_a_connection_loses_is_the_time_that_its_bytes_used_not_to_take() -> None:
    edge = Edge(0, "10.0.0.1:1", "10.0.0.2:2", sent=1000, busy_s=0.1, over_s=1.0)
    end = End(edge)
    end.take(edge, frozen=False)
    assert end.lost() == pytest.approx(0.0)
    end.take(replace(edge, busy_s=0.5), frozen=True)
    more, passed = 0.4, 1.5  # the sample before counts half
    assert end.lost() == pytest.approx(more / passed)
    end.take(replace(edge, sent=5000, busy_s=0.5), frozen=True)
    assert end.lost() == pytest.approx(0.5 * more / (0.5 * passed + 1.0)), "more bytes may take longer"
