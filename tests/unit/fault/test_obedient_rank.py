"""A rank obeys orders that are for it, once, and says so first."""

from __future__ import annotations

import ctypes
import json
import math
import os
import signal
import time
from typing import TYPE_CHECKING

import pytest

from stormjib_fault.commands import main
from stormjib_fault.rank import ANY, Control, InjectedError, Obedient

if TYPE_CHECKING:
    from pathlib import Path


@pytest.fixture
def control(tmp_path: Path) -> Control:
    return Control(tmp_path)


def test_an_order_for_another_life_is_not_obeyed(control: Control, tmp_path: Path) -> None:
    rank = Obedient(tmp_path, 0)
    control.order(0, os.getpid() + 1, "raise")
    control.order(1, os.getpid(), "raise")
    rank.step(1)
    control.order(0, os.getpid(), "raise")
    with pytest.raises(InjectedError):
        rank.step(2)
    assert [(one["do"], one["step"]) for one in control.done(0)] == [("raise", 2)]


def test_whoever_reads_it_obeys_an_order_for_anybody_from_its_step_on(
    control: Control, tmp_path: Path
) -> None:
    said: list[str] = []
    rank = Obedient(tmp_path, 0, said.append)
    control.order(0, ANY, "phase", phase="Checkpoint", seconds=0.0, step=3)
    for step in range(1, 6):
        rank.step(step)
    assert said == ["Checkpoint", "Step"]
    assert [one["step"] for one in control.done(0)] == [3]


def test_a_signal_does_not_end_the_hold_on_the_interpreter(control: Control, tmp_path: Path) -> None:
    """The agent asks for stacks by one, and the fault would be over when it is looked at."""
    rung: list[int] = []
    before = signal.signal(signal.SIGALRM, lambda number, _: rung.append(number))
    control.order(0, os.getpid(), "gil", seconds=0.3)
    began = time.monotonic()
    signal.setitimer(signal.ITIMER_REAL, 0.05, 0.05)
    try:
        Obedient(tmp_path, 0).step(1)
        assert time.monotonic() - began >= 0.29
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    assert rung, "no signal came"


def test_a_skipped_collective_is_one_collective(control: Control, tmp_path: Path) -> None:
    rank = Obedient(tmp_path, 0)
    control.order(0, os.getpid(), "skip", index=1)
    acts = []
    for step in (1, 2):
        rank.step(step)
        acts += [rank.before(index) for index in range(3)]
    assert acts == ["", "skip", "", "", "", ""]


def test_a_cancelled_order_is_over(control: Control, tmp_path: Path) -> None:
    rank = Obedient(tmp_path, 0)
    control.order(0, os.getpid(), "stop-inside")
    rank.step(1)
    assert rank.stops_inside()
    control.cancel(0)
    rank.step(2)
    assert not rank.stops_inside()


@pytest.mark.parametrize(("bit", "wanted"), [(31, -1.0), (23, 0.5)])
def test_one_bit_is_flipped_once_in_the_tensor_that_is_meant(
    control: Control, tmp_path: Path, bit: int, wanted: float
) -> None:
    memory = (ctypes.c_float * 8)(*[1.0] * 8)
    rank = Obedient(tmp_path, 0)
    control.order(0, os.getpid(), "flip", tensor="parameter", element=11, bit=bit)
    rank.step(1)
    for name in ("gradient", "parameter", "parameter"):
        rank.change(name, ctypes.addressof(memory), ctypes.sizeof(memory))
    assert list(memory) == [1.0, 1.0, 1.0, wanted, *[1.0] * 4]
    assert control.done(0)[0]["was"] == 1.0


def test_a_number_that_is_none_and_a_column_that_is_stuck(control: Control, tmp_path: Path) -> None:
    memory = (ctypes.c_float * 256)(*[2.0] * 256)
    where = (ctypes.addressof(memory), ctypes.sizeof(memory))
    rank = Obedient(tmp_path, 0)
    control.order(0, os.getpid(), "nan", tensor="gradient", element=5)
    rank.step(1)
    rank.change("gradient", *where)
    assert math.isnan(memory[5])
    control.order(0, os.getpid(), "stuck", tensor="gradient", element=3)
    for step in (2, 3):
        memory[67] = 2.0
        rank.step(step)
        rank.change("gradient", *where)
        assert [memory[place] for place in (3, 67, 131)] == [1.0, 1.0, 1.0]
    assert len(control.done(0)) == 2, "a fault that stays is said once"


def test_a_torn_proof_is_left_out(control: Control, tmp_path: Path) -> None:
    (tmp_path / "rank-0.did").write_text(json.dumps({"do": "stop"}) + '\n{"do": "st')
    assert control.done(0) == [{"do": "stop"}]
    control.clear()
    assert control.done(0) == []


def test_the_command_lists_every_row(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["list"]) == 0
    said = capsys.readouterr().out
    assert all(f"F{row} " in said for row in range(1, 18))
    assert main(["inject", "link-down", "--rank", "0"]) == 1
    assert "use the laboratory" in capsys.readouterr().err
