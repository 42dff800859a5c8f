"""What the demo reads in a coordinator's log: its own words for verdicts."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

from bench.follow import Line
from bench.slowness import AFTERMATH_S, VERDICT, without_fault
from stormjib_health.verdict import Scope, Syndrome, Verdict
from stormjib_runtime.kept import fresh
from stormjib_runtime.narrate import describe

SLOW = Verdict(
    3,
    Syndrome.NON_COMMUNICATION_SLOW,
    Scope.RANK,
    (2,),
    (1,),
    0.8,
    sentence="rank 2 keeps the others waiting",
)

DESYNC = Verdict(4, Syndrome.DESYNC, Scope.JOB, (), (), 0.9, software=True, sentence="ranks differ")
NOTE = replace(DESYNC, syndrome=Syndrome.CONGESTION)


def said(verdict: Verdict) -> str:
    """The line that a coordinator writes."""
    state = fresh("job", 1, 0.0)
    (line,) = describe(state, replace(state, verdicts=(verdict,)), 0.0)
    return line


def test_a_verdict_is_read_as_it_is_written() -> None:
    found = VERDICT.match(said(SLOW))
    assert found is not None
    assert found.groups() == ("NonCommunicationSlow", "Rank", "2", "0.80")
    link = VERDICT.match(said(replace(SLOW, scope=Scope.LINK, culprits=(2, 1), confirmed=True)))
    assert link is not None
    assert link[3] == "2 1"
    nobody = VERDICT.match(said(DESYNC))
    assert nobody is not None
    assert nobody[3] == "nobody"


def test_only_sure_verdicts_of_coordinators_long_after_any_fault_are_without_one() -> None:
    def line(at: float, verdict: Verdict = SLOW, pod: str = "j-coord-1") -> Line:
        return Line(at, pod, said(verdict))

    lines = [
        line(5.0), line(105.0), line(100.0 + AFTERMATH_S + 1), line(6.0, replace(SLOW, confidence=0.5)),
        line(7.0, pod="j-0-1"), line(8.0, NOTE), line(9.0, DESYNC),
    ]  # fmt: skip
    scene: Any = SimpleNamespace(follower=SimpleNamespace(lines=lines))
    texts = [one.text for one in lines]
    assert without_fault(scene, [(100.0, "rank-kill")]) == [texts[0], texts[2], texts[6]]
    assert without_fault(scene, []) == [texts[0], texts[1], texts[2], texts[6]]
