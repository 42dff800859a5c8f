"""A real coordinator process over loopback: what it refuses, what survives its death, how quick and how cheap it is."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import time
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING

import pytest

from fakes.coordinator import OPERATOR, TOKEN, Process, running_job, step
from fakes.runtime import JOB, FakeAgent, bounds
from stormjib_runtime import engine
from stormjib_runtime.codec import decode, encode
from stormjib_runtime.coordinator import Coordinator, Settings, Stopped
from stormjib_runtime.http import request
from stormjib_runtime.kept import FILE
from stormjib_runtime.wire import (
    Cause,
    Do,
    GenerationId,
    JobPhase,
    JobState,
    Order,
    ResumePoint,
    Saving,
)

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path


@pytest.fixture
async def coordinator(tmp_path: Path) -> AsyncIterator[Process]:
    process = await Process.start(tmp_path)
    yield process
    await process.kill()


async def test_tokens_are_for_their_calls_only(coordinator: Process) -> None:
    report, given = encode(FakeAgent(0).report()), encode(bounds())
    calls = [("POST", "/v1/report", report, TOKEN), ("GET", "/v1/order?slot=0&agent=1&after=0", None, TOKEN)]
    calls += [("PUT", "/v1/bounds", given, OPERATOR), ("GET", "/v1/state", None, OPERATOR)]
    for method, path, body, right in calls:
        other = OPERATOR if right == TOKEN else TOKEN
        for token, status in (("", 401), ("wrong", 401), (other, 403)):
            assert (await coordinator.call(method, path, token=token, body=body)).status == status
    for path in ("/metrics", "/healthz"):
        assert (await coordinator.call("GET", path, token="")).status == 200


async def test_what_is_stale_or_foreign_is_refused(coordinator: Process) -> None:
    async def report(agent: FakeAgent, **change: object) -> int:
        body = encode(replace(agent.report(), **change))  # type: ignore[arg-type]
        return (await coordinator.call("POST", "/v1/report", token=TOKEN, body=body)).status

    assert await report(FakeAgent(0)) == 403, "no bounds yet"
    await coordinator.put(bounds(version=3))
    assert await report(FakeAgent(0, number=2)) == 200
    assert await report(FakeAgent(0, number=1)) == 409
    assert await report(FakeAgent(0, number=2, pod_uid="another")) == 403
    assert await report(FakeAgent(0, number=2), job_uid="another") == 403
    assert await report(FakeAgent(0, number=2), protocol=99) == 409
    assert (await coordinator.call("PUT", "/v1/bounds", body=encode(bounds(version=2)))).status == 409
    for path, status in (
        ("/v1/order?slot=1&agent=1&after=0", 404),
        ("/v1/order?slot=0&agent=1&after=0", 409),
        ("/v1/order?slot=x&agent=1&after=0", 400),
        ("/v1/order?slot=0", 400),
    ):
        assert (await coordinator.call("GET", path, token=TOKEN)).status == status
    assert (await coordinator.call("GET", "/v1/state?above=2")).status == 400
    for body in (b"{}", b"nonsense", b"[" * 10_000):
        assert (await coordinator.call("POST", "/v1/report", token=TOKEN, body=body)).status == 400
    assert coordinator.lines[0] == "slot 0: agent 2 registered, 10.0.0.0"
    assert all(line.startswith("slot 0: ") for line in coordinator.lines), "no traceback, no noise"


async def test_a_killed_rank_is_one_generation_and_the_others_hear_of_it_at_once(tmp_path: Path) -> None:
    async with running_job(tmp_path, bounds(2, 1, spares=1)) as (coordinator, agents):
        killed = time.monotonic()
        agents[1].fake.rank(0, exit=-9)
        agents[1].changed()
        state = await coordinator.until(lambda one: len(one.history) == 2)
        await step(coordinator, agents, 2)
        assert (state.history[1].generation.cause, state.history[1].counted) == (Cause.RANK_EXIT, True)
        ends = [
            moment
            for moment, order in agents[0].obeyed
            if order.generation and order.generation.id.number == 2
        ]
        assert ends[0] - killed < 1.0, "not by the next heartbeat or poll"
        assert any(
            "generation 1.2: RankExit, slot 1 rank 2: exit -9; members 0,1" in one
            for one in coordinator.lines
        )
        metrics = (await coordinator.call("GET", "/metrics", token="")).body.decode()
        assert 'stormjib_job_restarts_total{cause="RankExit"} 1' in metrics
        assert "stormjib_job_world_size 4" in metrics
        assert "stormjib_checkpoint" not in metrics, "nothing was saved"


async def test_what_saves_cost_is_told_by_metrics_over_generations(tmp_path: Path) -> None:
    async with running_job(tmp_path, bounds(2, 1, spares=1)) as (coordinator, agents):
        for slot, agent in enumerate(agents):
            agent.fake.saving = Saving(saves=3, failures=slot, bytes=100, lost_s=0.5 + slot, durable_s=2.0)
            agent.fake.committed = ResumePoint(7, GenerationId(1, 1), "d")
            agent.changed()
        told = await until_metrics(coordinator, "stormjib_checkpoint_bytes_total 200")
        assert "stormjib_checkpoint_saves_total 3\n" in told
        assert "stormjib_checkpoint_failures_total 1\n" in told
        assert "stormjib_checkpoint_lost_seconds_total 1.5\n" in told
        assert 'stormjib_checkpoint_duration_seconds{stage="durable"} 2.0\n' in told
        assert "stormjib_checkpoint_step 7\n" in told
        assert 0 <= value(told, "stormjib_checkpoint_age_seconds") < 30
        for agent in agents:
            agent.fake.saving = None  # the pages of new ranks are empty
        agents[1].fake.rank(0, exit=-9)
        agents[1].changed()
        await coordinator.until(lambda one: len(one.history) == 2)
        await step(coordinator, agents, 2)
        for agent in agents:
            agent.fake.saving = Saving(saves=1, bytes=10, in_flight=1)
            agent.changed()
        told = await until_metrics(coordinator, "stormjib_checkpoint_bytes_total 220")
        assert "stormjib_checkpoint_saves_total 4\n" in told
        assert "stormjib_checkpoint_in_flight 1\n" in told


async def until_metrics(coordinator: Process, line: str) -> str:
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline:
        told = (await coordinator.call("GET", "/metrics", token="")).body.decode()
        if f"{line}\n" in told:
            return told
        await asyncio.sleep(0.02)
    raise AssertionError(f"{line} never came; there is: {told}")


def value(told: str, name: str) -> float:
    return float(next(line.split()[1] for line in told.splitlines() if line.startswith(f"{name} ")))


async def test_the_number_is_on_the_disk_before_the_order_is_out(tmp_path: Path) -> None:
    coordinator = await Process.start(tmp_path)
    await coordinator.put(bounds(1))
    agent = FakeAgent(0)
    answer = await coordinator.call("POST", "/v1/report", token=TOKEN, body=encode(agent.report()))
    os.kill(coordinator.process.pid, signal.SIGKILL)
    order = decode(Order, answer.body)
    assert (order.do, order.generation and order.generation.id) == (Do.PREPARE, GenerationId(1, 1))
    await coordinator.kill()
    assert json.loads((tmp_path / FILE).read_bytes())["number"] == 1


async def test_after_kill_9_the_same_generation_goes_on_and_the_next_number_follows(tmp_path: Path) -> None:
    async with running_job(tmp_path, bounds(2, 1, spares=1)) as (coordinator, agents):
        await coordinator.kill()
        again = await Process.start(tmp_path, port=coordinator.port)
        try:
            state = await again.until(lambda one: len(one.agents) == 3 and one.phase is JobPhase.RUNNING)
            assert state.generation is not None
            assert state.generation.id == GenerationId(1, 1)
            assert [agent.fake.ran for agent in agents] == [["1.1"], ["1.1"], []]
            agents[0].fake.rank(0, exit=1)
            agents[0].changed()
            await again.until(
                lambda one: one.generation is not None and one.generation.id == GenerationId(1, 2)
            )
            await step(again, agents, 2)
            assert [agent.fake.ran for agent in agents] == [["1.1", "1.2"], ["1.1", "1.2"], []]
        finally:
            await again.kill()


async def test_a_new_incarnation_adopts_and_the_old_one_stands_down(tmp_path: Path) -> None:
    (tmp_path / "new").mkdir()
    async with running_job(tmp_path, bounds(2, 1)) as (coordinator, agents):
        new = await Process.start(tmp_path / "new", incarnation=2)
        try:
            await new.put(bounds(2, 1, incarnation=2, version=2))
            for agent in agents:
                answer = await new.call("POST", "/v1/report", token=TOKEN, body=encode(agent.fake.report()))
                agent.fake.obey(decode(Order, answer.body))
            state = await new.until(lambda one: one.phase is JobPhase.RUNNING)
            assert state.generation is not None
            assert state.generation.id == GenerationId(1, 1)
            assert await coordinator.ended() == 0
            assert "has obeyed incarnation 2; this is 1" in coordinator.lines[-1]
        finally:
            await new.kill()


async def test_a_killed_container_is_seen_by_its_connection_and_replaced_by_the_spare(tmp_path: Path) -> None:
    async with running_job(tmp_path, bounds(2, 1, spares=1)) as (coordinator, agents):
        killed = time.monotonic()
        await agents[0].close()
        agents[1].changed()  # a heartbeat that comes just now tells of no new step
        state = await coordinator.until(lambda one: len(one.history) == 2)
        assert time.monotonic() - killed < 2.5, "far below three missed heartbeats"
        assert state.history[1].generation.cause is Cause.CONTAINER_EXIT
        assert [member.slot for member in state.history[1].generation.members] == [2, 1]


async def test_a_long_poll_answers_within_milliseconds(coordinator: Process) -> None:
    await coordinator.put(bounds(2, 2))
    first = await coordinator.call("POST", "/v1/report", token=TOKEN, body=encode(FakeAgent(0).report()))
    path = f"/v1/order?slot=0&agent=1&after={decode(Order, first.body).version}"
    poll = asyncio.create_task(request("GET", "127.0.0.1", coordinator.port, path, token=TOKEN, timeout_s=12))
    done, _ = await asyncio.wait({poll}, timeout=0.3)
    assert not done, "there is nothing to say yet"
    started = time.monotonic()
    await coordinator.call("POST", "/v1/report", token=TOKEN, body=encode(FakeAgent(1).report()))
    assert decode(Order, (await poll).body).do is Do.PREPARE
    assert time.monotonic() - started < 1.0


async def test_sigterm_ends_it_at_once_though_polls_are_open(tmp_path: Path) -> None:
    async with running_job(tmp_path, bounds(2)) as (coordinator, _):
        started = time.monotonic()
        coordinator.process.terminate()
        assert await coordinator.ended() == 0
        assert time.monotonic() - started < 5, "polls last ten"
        assert coordinator.lines[-1] == "SIGTERM"


async def test_a_run_directory_that_cannot_be_written_is_said_and_not_survived(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="nowhere"):
        await Process.start(tmp_path / "nowhere")


async def test_a_disk_that_fails_later_ends_it_before_anything_is_told(tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    run_dir.mkdir()
    coordinator = Coordinator(
        Settings(JOB, 1, TOKEN, OPERATOR, run_dir, "127.0.0.1", 0), log=lambda line: None
    )
    try:
        port = await coordinator.start()
        coordinator.put_bounds(bounds(1))
        (run_dir / FILE).unlink()
        run_dir.rmdir()
        body = encode(FakeAgent(0).report())
        answer = await request("POST", "127.0.0.1", port, "/v1/report", token=TOKEN, body=body)
        assert answer.status == 503
        with pytest.raises(Stopped, match="run"):
            await coordinator.wait()
        assert coordinator.job.generation is None
    finally:
        await coordinator.close()


async def test_a_missing_environment_is_named() -> None:
    process = await asyncio.create_subprocess_exec(
        *("python3", "-m", "stormjib_runtime.coordinator"),
        env={"PATH": os.environ["PATH"], "PYTHONPATH": os.pathsep.join(os.sys.path)},  # type: ignore[attr-defined]
        stderr=asyncio.subprocess.PIPE,
    )
    _, said = await process.communicate()
    assert process.returncode == 1
    assert b"STORMJIB_JOB_UID" in said


async def test_the_state_is_a_heartbeat_for_the_operator(coordinator: Process) -> None:
    state = await coordinator.put(bounds())
    started = time.monotonic()
    answer = await coordinator.call("GET", f"/v1/state?after={state.version}")
    assert decode(JobState, answer.body).version == state.version
    assert 0.8 < time.monotonic() - started < 3.0


async def test_it_costs_next_to_nothing(tmp_path: Path) -> None:
    """Three agents, each with a heartbeat and a poll: far below the promise, so that a busy machine passes too."""
    async with running_job(tmp_path, bounds(2, 1, spares=1)) as (coordinator, agents):
        cpu, began = coordinator.cpu_s(), time.monotonic()
        while time.monotonic() - began < 5:
            for agent in agents[:2]:
                agent.fake.step(agent.fake.ranks[0].step + 1)
            await asyncio.sleep(0.5)
        share = (coordinator.cpu_s() - cpu) / (time.monotonic() - began)
        assert share < 0.02
        assert coordinator.rss_mb() < 60
        assert len((await coordinator.state()).history) == 1


async def test_where_a_decision_takes_long_the_next_one_waits_for_the_tick(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("stormjib_runtime.coordinator.LONG_S", 0.0)
    monkeypatch.setattr("stormjib_runtime.coordinator.SELDOM", 1e9)
    coordinator = Coordinator(Settings(JOB, 1, TOKEN, OPERATOR, tmp_path, "127.0.0.1", 0))
    try:
        await coordinator.start()
        coordinator.put_bounds(bounds(2, 2))
        for slot in (0, 1):
            coordinator._take(partial(engine.heard, report=FakeAgent(slot).report()))
        assert coordinator.job.generation is None
        async with asyncio.timeout(2):
            while coordinator.job.generation is None:
                await asyncio.sleep(0.01)
    finally:
        await coordinator.close()


async def test_a_tick_that_is_urgent_does_not_wait_for_one_that_is_not(tmp_path: Path) -> None:
    coordinator = Coordinator(Settings(JOB, 1, TOKEN, OPERATOR, tmp_path, "127.0.0.1", 0))
    try:
        await coordinator.start()
        coordinator._tick_in(5.0)
        coordinator._tick_in(0.05)
        first = coordinator._timer
        coordinator._tick_in(0.2)
        assert coordinator._timer is first, "one comes sooner"
        assert first
        assert first.when() < asyncio.get_running_loop().time() + 0.1
    finally:
        await coordinator.close()
