"""Others' rules, on traces made by hand."""

from __future__ import annotations

from bench.lab import peers, traces
from bench.lab.peers import Said
from bench.lab.traces import Step


def steady(until_s: float, work_s: float = 0.06) -> list[Step]:
    return [Step(number / 10, 0.1, work_s) for number in range(-20, int(until_s * 10) + 1)]


HUNG = {0: steady(0.2), 1: steady(0.1), 2: steady(0.2)}


def test_a_hang_is_a_stand_still_at_the_end() -> None:
    assert peers.last_step_s(HUNG) == 0.1
    assert peers.hangs(HUNG, 3.0, 0.1)
    assert not peers.hangs(HUNG, 0.9, 0.1)
    assert not peers.hangs({0: steady(3.0)}, 3.05, 0.1)
    assert not peers.hangs({0: steady(0.0)}, 5.0, 1.0), "ten steps of a second may last"


def test_gloo_speaks_half_an_hour_after_the_last_step() -> None:
    assert peers.gloo(HUNG, True) == Said(1800.1)
    assert peers.gloo(HUNG, False) is None


def test_nvrx_waits_longer_for_who_cannot_answer() -> None:
    assert peers.nvrx(HUNG, True, "loader-hang") == Said(61.1)
    assert peers.nvrx(HUNG, True, "hold-gil") == Said(91.1)
    assert peers.nvrx(HUNG, False, "delay") is None


def test_dlrover_names_who_takes_more_than_twice_the_median() -> None:
    slow = {0: steady(1.0), 1: steady(1.0, 0.13), 2: steady(1.0)}
    assert peers.dlrover(slow, False) == Said(0.1, 1)
    assert peers.dlrover({**slow, 1: steady(1.0, 0.11)}, False) is None
    assert peers.dlrover(HUNG, True) == Said(300.1)


def test_traces_keep_what_surrounds_the_injection() -> None:
    kept = traces.pack({0: steady(3.0)}, 5, 10)
    steps = traces.unpack(kept)[0]
    assert [step.at_s for step in steps] == [number / 10 for number in range(-4, 11)]
    assert traces.steps_until({0: steady(3.0), 1: steady(1.0)}, 2.0) == 20
    assert traces.median_step({0: steady(3.0)}, -1.0, 0.0) == 0.1
    assert traces.median_step({0: []}, -1.0, 0.0) == 0.0
