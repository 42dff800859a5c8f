"""The judge of a node: by fixed bounds alone, and by what others measured; and what reads its command line."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from typing import TYPE_CHECKING

import pytest

from stormjib_runtime import codec, preflight
from stormjib_runtime.preflight import FLOORS, Measured, Preflight, judge, read_others

if TYPE_CHECKING:
    from pathlib import Path

MEMORY = Measured("memory", 8.0)
COMPUTE = Measured("compute cpu", 80.0, digest="a" * 64, versions="EPYC; torch 2.15")
LOOPBACK = Measured("loopback", 0.5)
PAIR = Measured("pair", 0.3)
NODE = (MEMORY, COMPUTE, LOOPBACK, PAIR)


def changed(name: str, **change: object) -> tuple[Measured, ...]:
    """The node with one thing measured otherwise."""
    return tuple(replace(one, **change) if one.name == name else one for one in NODE)  # type: ignore[arg-type]


def test_a_healthy_node_alone_is_fit_and_its_figures_are_said() -> None:
    result = judge(NODE)
    assert result == Preflight(
        True, NODE, "fit: memory 8 GB/s, compute cpu 80 Gop/s, loopback 0.5 GB/s, pair 0.3 GB/s"
    )


@pytest.mark.parametrize("name", [one.name for one in NODE])
def test_what_is_below_the_fixed_bound_is_named(name: str) -> None:
    floor = FLOORS[name.split(" ")[0]]
    assert judge(changed(name, rate=floor)).ok
    result = judge(changed(name, rate=floor * 0.99))
    assert not result.ok
    assert result.why.startswith(f"{name} ")
    assert result.why.endswith(f"is slow: any node does {floor:g}")


def test_a_wrong_result_is_named_however_fast() -> None:
    result = judge(changed("compute cpu", rate=1e6, wrong="row 3 is wrong"))
    assert (result.ok, result.why) == (False, "compute cpu: row 3 is wrong")


def test_everything_that_is_wrong_is_said() -> None:
    result = judge((replace(MEMORY, rate=0.01), replace(PAIR, wrong="nobody answers")))
    assert result.why == "memory 0.01 GB/s is slow: any node does 0.1; pair: nobody answers"


def test_what_could_not_be_measured_is_no_fault() -> None:
    result = judge((MEMORY, Measured("compute", skipped="No module named 'torch'")))
    assert result.ok
    assert "compute not measured (No module named 'torch')" in result.why


@pytest.mark.parametrize("name", [one.name for one in NODE])
def test_less_than_half_of_the_others_is_slow(name: str) -> None:
    rate = next(one.rate for one in NODE if one.name == name)
    others = [changed(name, rate=rate * factor) for factor in (0.9, 1.0, 5.0)]
    assert judge(changed(name, rate=rate * 0.5), others).ok
    result = judge(changed(name, rate=rate * 0.49), others)
    assert not result.ok
    assert result.why.startswith(f"{name} ")
    assert "is slow: the median of 3 others is" in result.why


def test_one_other_is_no_measure() -> None:
    fast = (replace(MEMORY, rate=80.0), replace(COMPUTE, digest="b" * 64))
    assert judge(NODE, [fast]).ok
    assert not judge(NODE, [fast, fast]).ok


def test_another_kind_of_device_is_no_measure() -> None:
    other = replace(COMPUTE, rate=8000.0, digest="b" * 64, versions="H100; torch 2.15")
    assert judge(NODE, [(other,)] * 5).ok


def test_other_bits_than_most_on_the_same_device_are_wrong() -> None:
    good, odd = (COMPUTE,), (replace(COMPUTE, digest="b" * 64),)
    result = judge(odd, [good, good])
    assert not result.ok
    assert result.why.startswith("compute cpu is wrong: digest bbbbbbbbbbbb, 2 of 2 others have aaaaaaaaaaaa")
    assert judge(good, [good, good, odd]).ok  # the odd one is another
    assert judge(odd, [good, good, good, odd]).ok is False
    assert judge(odd, [good, good, odd, odd]).ok  # two against two: nobody knows


def test_others_that_disagree_with_each_other_accuse_nobody() -> None:
    others = [(replace(COMPUTE, digest=letter * 64),) for letter in "bcd"]
    assert judge((COMPUTE,), others).ok


def test_others_that_measured_nothing_do_not_lower_the_median() -> None:
    failed = (replace(PAIR, rate=0.0, wrong="nobody answers"), replace(MEMORY, rate=0.0, skipped="no memory"))
    for one in (PAIR, MEMORY):
        slow = (replace(one, rate=one.rate * 0.4),)
        assert judge(slow, [failed, failed, (one,)]).ok  # one other is no measure
        assert not judge(slow, [failed, failed, (one,), (one,)]).ok


def test_the_sentence_is_bounded() -> None:
    many = tuple(Measured(f"compute cuda:{n}", wrong="x" * 500) for n in range(64))
    assert len(judge(many).why) <= 1024
    assert len(codec.encode(Preflight(False, many[:8], judge(many).why))) < 16 * 1024


def test_memory_is_measured_and_compared() -> None:
    found = preflight.measure_memory(2 << 20)
    assert found.wrong == ""
    assert found.rate > 0


async def test_loopback_is_measured() -> None:
    found = await preflight.measure_loopback()
    assert found.wrong == ""
    assert found.rate > FLOORS["loopback"]


async def test_a_peer_that_is_not_there_is_named() -> None:
    found = await preflight.measure_pair("127.0.0.1:1", "secret")
    result = judge((found,))
    assert not result.ok
    assert result.why.startswith("pair: connection to 127.0.0.1:1 failed")


def test_what_others_measured_is_read(tmp_path: Path) -> None:
    path = tmp_path / "others"
    path.write_bytes(b"\n".join([codec.encode(judge(NODE)), codec.encode(judge(NODE[:1]))]))
    assert read_others(str(path)) == [NODE, NODE[:1]]


@pytest.mark.parametrize(
    ("words", "text"),
    [
        (["--peer", "10.0.0.7"], "peer '10.0.0.7' is not an IP address and a port"),
        (["--peer", "10.0.0.7:1"], "--peer needs the token of the job's agents in STORMJIB_TOKEN"),
        (["--others", "/missing"], "No such file or directory"),
        (["--others", "OTHERS"], "line 1: Preflight has unknown key 'fit'"),
        (["--fast"], "unrecognized arguments: --fast"),
    ],
)
def test_a_bad_command_line_is_refused_by_name(words: list[str], text: str, tmp_path: Path) -> None:
    (tmp_path / "others").write_text('{"fit": true}')
    words = [str(tmp_path / "others") if word == "OTHERS" else word for word in words]
    argv = [sys.executable, "-m", "stormjib_runtime.preflight", *words]
    done = subprocess.run(argv, capture_output=True, text=True, timeout=30, check=False, env={})
    assert done.returncode == 2
    assert text in done.stderr
