"""The bench itself: verdicts are timed at first sight, trials are recorded and graded, runs go on where they were cut off."""

from __future__ import annotations

import threading
import time
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING

import pytest

from bench import health
from bench.lab import draws, report, trial
from bench.lab.calls import Watcher
from bench.lab.grade import grade
from bench.lab.lab import Lab
from bench.lab.network import namespaces
from fakes.light_lab import NODES, LightLab, light_network
from fakes.scripted_state import ScriptedState
from stormjib_fault import proc
from stormjib_fault.catalogue import FAULTS
from stormjib_health.verdict import Accusation, Scope, Syndrome, Verdict

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from bench.lab.network import Network

STOPPED = Verdict(1, Syndrome.NON_COMMUNICATION_HANG, Scope.RANK, (1,), (1,), 0.8, sentence="it is stopped")


@pytest.fixture(scope="module")
def network() -> Iterator[Network]:
    with light_network() as one:
        yield one


@contextmanager
def watched(network: Network) -> Iterator[Watcher]:
    watcher = Watcher(network.coordinator)
    try:
        yield watcher
    finally:
        watcher.close()


@pytest.fixture
def lab(network: Network, tmp_path: Path) -> Iterator[tuple[LightLab, ScriptedState]]:
    with ScriptedState(network.coordinator) as said, watched(network) as watcher:
        one = LightLab(network, tmp_path, watcher)
        yield one, said
        one.close()


def drawn(fault: str, **more: object) -> draws.Trial:
    kind = FAULTS[fault]
    draw = replace(kind.drawn(3, NODES), victim=1, peer=2, **more)  # type: ignore[arg-type]
    return draws.Trial(f"{kind.row}-3", kind.row, draw, NODES, "dp", 20, 0.01)


def when(holds: Callable[[], object], act: Callable[[], None]) -> threading.Thread:
    """Do something as soon as something holds."""

    def wait() -> None:
        deadline = time.monotonic() + 20
        while not holds():
            if time.monotonic() > deadline:
                return
            time.sleep(0.005)
        act()

    thread = threading.Thread(target=wait)
    thread.start()
    return thread


def test_a_verdict_is_timed_when_it_first_comes_into_sight(network: Network) -> None:
    with watched(network) as watcher:
        with ScriptedState(network.coordinator) as said:
            watcher.until(lambda state: state.version == 1, 10)
            began = time.monotonic()
            said.say(STOPPED)
            sight = watcher.wait_verdict(began, 10)
            assert sight is not None
            assert sight.verdict == STOPPED
            assert sight.at - began < 1.0
            said.say(STOPPED, replace(STOPPED, confirmed=True))
            watcher.until(lambda state: state.version == 3, 10)
            assert [each.verdict.confirmed for each in watcher.sights(began)] == [False, True]
        with ScriptedState(network.coordinator, version=1) as again:
            again.say(replace(STOPPED, id=7))
            watcher.until(lambda state: any(v.id == 7 for v in state.verdicts), 10)


def test_a_trial_records_truth_proof_and_what_was_said(lab: tuple[LightLab, ScriptedState]) -> None:
    site, said = lab
    chance = drawn("stop")
    stopped = when(
        lambda: len(site.ranks) == NODES and proc.state(site.ranks[1].pid) == "T", lambda: said.say(STOPPED)
    )
    record = trial.run(site, chance)
    stopped.join()
    judged = grade(record)
    assert (judged.right, judged.exact, judged.wrongly_blamed) == (True, True, False)
    assert 0 < judged.detected_s < 2
    assert record.proof.endswith("is in state T")
    assert record.truth.culprits == (1,)
    assert record.step_s > 0.015
    assert set(record.trace) == {"0", "1", "2"}
    assert "exact" in report.line(record, judged)


def test_a_slow_rank_is_as_slow_as_was_drawn_and_silence_is_no_answer(
    lab: tuple[LightLab, ScriptedState], monkeypatch: pytest.MonkeyPatch
) -> None:
    site, _ = lab
    monkeypatch.setitem(trial.WATCH_S, "NonCommunicationSlow", 1.5)
    record = trial.run(site, drawn("delay", severity=3.0))
    assert record.proof
    assert 2.0 < record.slowdown < 4.5
    assert (grade(record).syndrome, grade(record).right) == ("none", False)


def test_whoever_is_accused_for_what_is_harmless_is_counted(
    lab: tuple[LightLab, ScriptedState], monkeypatch: pytest.MonkeyPatch
) -> None:
    site, said = lab
    monkeypatch.setattr(trial, "HARMLESS_S", 1.5)
    wrong = replace(STOPPED, syndrome=Syndrome.NON_COMMUNICATION_SLOW)

    def accuse() -> None:
        said.state = replace(said.state, accusations=(Accusation(1, "1.1", 1, "pod-1", wrong, 0.9),))
        said.say(wrong)

    obeyed = when(lambda: len(site.ranks) == NODES and site.control.done(0), accuse)
    record = trial.run(site, drawn("rotating", severity=2.0))
    obeyed.join()
    judged = grade(record)
    assert (judged.exact, judged.wrongly_blamed, judged.wrongly_accused) == (False, True, True)
    assert record.watched_s >= 1.5


def test_what_is_written_is_not_run_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    raw = tmp_path / "one.trials.jsonl"
    planned = draws.plan(["F1"], 8)
    for one in planned[:-1]:
        health.append(raw, report.not_run(one))
    with open(raw, "ab") as file:
        file.write(b'{"id":"F1-1')  # the run was cut off here
    ran: list[str] = []

    def run_all(todo: list[draws.Trial], path: Path) -> list[object]:
        ran.extend(one.id for one in todo)
        return []

    monkeypatch.setattr(health, "_run_all", run_all)
    monkeypatch.setattr(health, "RAW", raw)
    health.main(["--rows", "F1", "--trials", "8", "--resume"])
    assert ran == [planned[-1].id]
    health.append(raw, report.not_run(planned[-1]))
    assert {record.id for record in health.load(raw)} == {one.id for one in planned}


@pytest.mark.timeout(300)
def test_a_real_laboratory_runs_trials_on_warm_agents_and_leaves_nothing() -> None:
    with Lab(2) as lab:
        first = lab.state().generation
        killed = trial.run(lab, replace(drawn("kill"), ranks=2))
        slow = trial.run(lab, replace(drawn("delay", severity=2.0), ranks=2))
        state = lab.state()
    assert killed.proof
    assert killed.restarts == ("RankExit rank 1",)
    assert slow.proof
    assert 1.5 < slow.slowdown < 2.6
    assert slow.restarts == ()
    assert first is not None
    assert state.generation is not None
    assert state.generation.id.number >= first.id.number + 3
    assert {agent.agent for agent in state.agents} == {1}, "the agents stayed the same"
    assert namespaces(lab.name) == []
    assert not lab.folder.exists()
