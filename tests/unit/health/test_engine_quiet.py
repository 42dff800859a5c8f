"""Whatever is no fault: nobody is named."""

from __future__ import annotations

from dataclasses import replace

import pytest

from fakes.traces import Fault, Shape, Trace
from fakes.traces_play import Play, Told, blames
from stormjib_health.engine import Engine, Place
from stormjib_health.verdict import Syndrome
from stormjib_health.wire import Call, Group, Kind, Phase, RankSample, Sample

SHAPE = Shape(world=4, noise=0.02)
FAULT_AT = 8.0


def above_a_note(told: list[Told]) -> list[str]:
    return [t.verdict.sentence for t in told if blames(t.verdict)]


@pytest.mark.parametrize("layout", ["dp", "tp_dp", "pp_dp"])
def test_ten_thousand_healthy_steps(layout: str) -> None:
    shape = Shape(
        layout, 4, step_s=0.05, noise=0.03, asleep=layout == "dp", checkpoint_every=150, checkpoint_s=3.0, start_s=4.0,
        stall=0.01,
    )  # fmt: skip
    trace = Trace(shape, 1010)
    play = Play(trace, 1010, interval=1.0 if layout != "dp" else 0.2)
    while trace.steps < 3400:
        play.run(play.now + 10)
    assert above_a_note(play.told) == []


@pytest.mark.parametrize("seed", [1020, 1021])
def test_an_agent_that_is_cut_off_is_no_culprit_while_the_others_advance(seed: int) -> None:
    trace = Trace(SHAPE, seed)
    play = Play(trace, seed, cut_off=lambda slot, now: slot == 2 and 6 < now < 12)
    play.run(9)
    play.engine.silent(2, play.now)
    play.run(16)
    assert trace.steps > 150
    assert play.told == []


def test_a_stopped_agent_that_nobody_reports_is_no_culprit() -> None:
    trace = Trace(SHAPE, 1022)
    play = Play(trace, 1022, cut_off=lambda slot, now: slot == 0 and now > 5)
    assert play.run(14) == []


@pytest.mark.parametrize("at", [1.0, 8.0])
def test_a_coordinator_that_was_stopped_for_90_s_blames_nobody(at: float) -> None:
    play = Play(Trace(SHAPE, 1030), 1030)
    play.run(at)
    play.shift += 90.0
    assert play.run(at + 8) == []


def test_a_machine_that_was_stopped_for_90_s_blames_nobody() -> None:
    """All clocks jump, of agents and coordinator alike: every age in the first samples is 90 s too long."""
    trace = Trace(SHAPE, 1031)
    play = Play(trace, 1031)
    play.run(8)
    trace.skip(90.0)
    play.now += 90.0
    play.restart_agents()
    assert play.run(play.now + 8) == []


@pytest.mark.parametrize("seed", [1040, 1041])
def test_a_new_coordinator_in_the_middle_of_the_job_blames_nobody_and_learns(seed: int) -> None:
    trace = Trace(SHAPE, seed, Fault("stop", 16.0, 1))
    play = Play(trace, seed)
    play.run(6)
    play.restart_coordinator()
    assert play.run(16) == []
    told = play.run(20)
    assert [t.verdict.culprits for t in told][:1] == [(1,)]


def test_a_third_of_the_samples_may_be_lost() -> None:
    play = Play(Trace(SHAPE, 1050), 1050, lost=0.33)
    assert play.run(20) == []


def engine_of_two() -> Engine:
    return Engine([Place(0, 0), Place(1, 1)])


def sample(slot: int, number: int, rank: RankSample, group: Group) -> Sample:
    return Sample(1, "u", slot, 0, "1.1", number, 0.2, ranks=(rank,), groups=(group,))


def drive(first: RankSample, second: RankSample, seconds: float, warm: int = 60) -> list[Syndrome]:
    """Two ranks step `warm` times and then stand as given, their ages growing."""
    engine, group = engine_of_two(), Group.of(7, "default_pg", (0, 1))
    told, now = [], 0.0
    for number in range(warm):
        now += 0.2
        for slot in (0, 1):
            call = Call(7, 10 * number + 1, Kind.ALL_REDUCE, 0.01)
            step = RankSample(
                slot, number, 0.0, (0.2,), (0.1,), number, Phase.STEP, idle_s=now, calls=(call,)
            )
            engine.observe(sample(slot, number, step, group), now)
        told += [v.syndrome for v in engine.tick(now).verdicts]
    stood = 0.0
    for number in range(warm, warm + int(seconds / 0.2)):
        now, stood = now + 0.2, stood + 0.2
        for slot, rank in enumerate((first, second)):
            calls = tuple(replace(call, age_s=stood) for call in rank.calls)
            idle = stood if rank.idle_s else 0.0
            engine.observe(
                sample(slot, number, replace(rank, step=warm - 1, idle_s=idle, calls=calls), group), now
            )
        told += [v.syndrome for v in engine.tick(now).verdicts]
    return told


LAST = 10 * 59 + 1


def standing(rank: int, issued: int, phase: Phase = Phase.STEP, idle: bool = True) -> RankSample:
    call = Call(7, issued, Kind.ALL_REDUCE)
    return RankSample(rank, phase=phase, idle_s=1.0 if idle else 0.0, calls=(call,))


def test_the_drive_finds_a_rank_that_does_not_come() -> None:
    assert drive(standing(0, LAST + 1), standing(1, LAST), 3) == [Syndrome.NON_COMMUNICATION_HANG]


@pytest.mark.parametrize("phase", [p for p in Phase if p.may_last and p is not Phase.DATA])
def test_a_rank_in_a_phase_that_may_last_is_waited_for(phase: Phase) -> None:
    assert drive(standing(0, LAST + 1), standing(1, LAST, phase), 30) == []


@pytest.mark.parametrize("phase", [Phase.CHECKPOINT, Phase.EVALUATION])
def test_ranks_that_checkpoint_together_after_their_last_call_hang_in_nothing(phase: Phase) -> None:
    assert drive(standing(0, LAST, phase), standing(1, LAST, phase), 30) == []


def test_a_call_that_is_open_while_all_ranks_compute_is_computing() -> None:
    assert drive(standing(0, LAST, idle=False), standing(1, LAST, idle=False), 30) == []


def test_nothing_is_judged_in_the_first_steps() -> None:
    late = LAST - 10 * 57
    assert drive(standing(0, late + 1), standing(1, late), 30, warm=3) == []


def test_a_common_stall_of_the_data_names_nobody() -> None:
    assert drive(standing(0, LAST, Phase.DATA), standing(1, LAST, Phase.DATA), 30) == []


@pytest.mark.parametrize("tenths", [4, 6])
def test_of_a_slowdown_that_is_over_nothing_more_is_told(tenths: int) -> None:
    """Checks that run after it find nothing, and would take back what was true."""
    trace = Trace(Shape(world=8, noise=0.02), 1060, Fault("slow", 12.0, 1, severity=1.8))
    play = Play(trace, 1060)
    play.run(12.0 + tenths / 10)
    trace.fault = Fault()
    told = play.run(20.0)
    assert told or tenths < 6, "it was not even seen"
    assert [each.verdict for each in told if each.verdict.severity < 1.2] == []
