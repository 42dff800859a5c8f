"""Checks and preflight with real processes: forks of a warm zygote, and a whole agent."""

from __future__ import annotations

import asyncio
import os
import signal
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import pytest_asyncio

from fakes.agents import SCRIPTS, AgentProcess, alive, until
from fakes.scripted import TOKEN, ScriptedCoordinator, new_order
from fakes.warm import Warm
from stormjib_health.probe import compute
from stormjib_health.wire import Answer, Check, CheckKind
from stormjib_runtime import codec
from stormjib_runtime.checks import Checks
from stormjib_runtime.fitness import WORDS
from stormjib_runtime.output import Outputs
from stormjib_runtime.preflight import Preflight
from stormjib_runtime.wire import AgentPhase, Do, Env

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from stormjib_runtime.wire import Report

pytestmark = [pytest.mark.asyncio(loop_scope="module"), pytest.mark.timeout(150)]
COMPUTE = ("-m", "stormjib_health.probe.compute")


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def warm(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Warm]:
    async with Warm(tmp_path_factory.mktemp("warm")) as one:
        yield one


def checks_of(warm: Warm) -> Checks:
    """An agent's checks, whose processes are forks of the zygote."""
    outputs = Outputs(asyncio.get_running_loop())
    return Checks(warm.zygote.fork, outputs, "secret", "127.0.0.1", 0, lambda: ())


async def test_a_fork_says_the_same_bits_as_a_process_of_its_own(warm: Warm) -> None:
    fork, own = await warm.fork(*COMPUTE), await warm.python(*COMPUTE)
    ours, theirs = (codec.decode(Answer, done.out) for done in (fork, own))
    assert (ours.ok, ours.text) == (theirs.ok, theirs.text) == (True, "")
    assert (ours.digest, ours.versions) == (theirs.digest, theirs.versions)
    assert ours.digest == compute.measure("cpu").digest
    assert fork.out.count("\n") == 1


async def test_a_device_that_is_not_there_is_an_answer(warm: Warm) -> None:
    done = await warm.fork(*COMPUTE, "--device", "cuda:77")
    answer = codec.decode(Answer, done.out)
    assert (done.exit, answer.ok) == (0, False)
    assert answer.text.startswith("cuda:77: ")


async def test_a_check_by_a_fork_is_cheap(warm: Warm) -> None:
    """In processor time, because here every core may be shared."""
    checks = checks_of(warm)
    begin, before = time.monotonic(), forks_cpu(warm)
    answers = await checks.run([Check(number, CheckKind.COMPUTE, rank=0, limit_s=5.0) for number in range(3)])
    each, cpu = (time.monotonic() - begin) / 3, (forks_cpu(warm) - before) / 3
    print(f"a check: {each:.3f} s, processor {cpu:.3f} s; products: {[one.cpu_s for one in answers]} s")
    assert all(answer.ok and not answer.text for answer in answers)
    assert len({answer.digest for answer in answers}) == 1
    assert cpu < 0.3
    assert all(0 < answer.cpu_s < 0.1 for answer in answers)


async def test_a_preflight_by_a_fork_is_cheap(warm: Warm) -> None:
    """What a healthy start is later by, once its zygote is there."""
    begin, before = time.monotonic(), forks_cpu(warm)
    done = await warm.fork(*WORDS)
    took, cpu = time.monotonic() - begin, forks_cpu(warm) - before
    result = codec.decode(Preflight, done.out)
    print(f"a preflight: {took:.3f} s, processor {cpu:.3f} s: {result.why}")
    assert (done.exit, result.ok) == (0, True)
    assert cpu < 1.0


def forks_cpu(warm: Warm) -> float:
    """Processor time of all forks that have ended."""
    fields = Path(f"/proc/{warm.zygote.pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[13]) + int(fields[14])) / os.sysconf("SC_CLK_TCK")


async def test_a_check_that_is_cut_off_leaves_no_process(warm: Warm) -> None:
    os.kill(warm.zygote.pid, signal.SIGSTOP)  # asked, it forks only later
    checks = checks_of(warm)
    late = await checks.run([Check(1, CheckKind.COMPUTE, limit_s=0.1)])
    os.kill(warm.zygote.pid, signal.SIGCONT)
    assert (late[0].ok, late[0].text) == (False, "check was not done in 0.10 s")
    task = asyncio.create_task(checks.run([Check(2, CheckKind.COMPUTE, limit_s=9.0)]))
    await until(lambda: forks(warm) > 0)
    task.cancel()
    await asyncio.wait([task])
    await until(lambda: forks(warm) == 0)


def forks(warm: Warm) -> int:
    """Living ones, as the kernel lists them."""
    listed = Path(f"/proc/{warm.zygote.pid}/task/{warm.zygote.pid}/children").read_text()
    return sum(alive(int(pid)) for pid in listed.split())


# --- a whole agent --------------------------------------------------------------------------------------------------

SLOW_LOOPBACK = """
import asyncio
from stormjib_health.confirm import transfer
honest = transfer._burst
async def slow(reader, writer, found):
    await asyncio.sleep(0.3)
    await honest(reader, writer, found)
    found.bursts[-1] += 0.3
transfer._burst = slow
"""
"""As sitecustomize of every process of the job: a host on which each burst takes 0.3 s longer."""


async def start(folder: Path, coordinator: ScriptedCoordinator, switch: str) -> tuple[AgentProcess, float]:
    """An agent, and how long it took to be ready; its zygote included."""
    folder.mkdir()
    begin = time.monotonic()
    env: dict[str, Any] = {Env.PREFLIGHT: switch}
    agent = AgentProcess(folder, coordinator.url, TOKEN, [str(SCRIPTS / "ring.py")], **env)
    await coordinator.until(lambda report: report.phase is AgentPhase.IDLE, limit_s=90)
    return agent, time.monotonic() - begin


async def finish(coordinator: ScriptedCoordinator, agent: AgentProcess) -> None:
    await coordinator.order(0, new_order(Do.FINISH))
    assert await agent.exit() == 0


async def test_a_fit_node_joins_and_the_start_is_little_later(tmp_path: Path) -> None:
    took = {}
    for switch in ("Off", "On"):
        async with ScriptedCoordinator() as coordinator:
            agent, took[switch] = await start(tmp_path / switch, coordinator, switch)
            try:
                assert coordinator.reports[0].preflight == ""
                assert ("preflight: fit: memory " in agent.errors()) == (switch == "On")
                assert not any("Preflight" in event for event in coordinator.reports[0].events)
                await finish(coordinator, agent)
            finally:
                print(agent.errors()[-1000:])
                agent.close()
    print(f"ready after {took['Off']:.2f} s without, {took['On']:.2f} s with a preflight")


async def test_an_unfit_node_says_why_and_stays_out(tmp_path: Path) -> None:
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken/sitecustomize.py").write_text(SLOW_LOOPBACK)
    async with ScriptedCoordinator() as coordinator:
        env: dict[str, Any] = {Env.PREFLIGHT: "On", "PYTHONPATH": str(tmp_path / "broken")}
        agent = AgentProcess(tmp_path, coordinator.url, TOKEN, [str(SCRIPTS / "ring.py")], **env)
        try:
            report = await coordinator.until(lambda report: bool(report.preflight), limit_s=90)
            assert report.phase is AgentPhase.STARTING
            assert "loopback 0.00" in report.preflight
            assert "is slow: any node does 0.01" in report.preflight
            assert f"PreflightFailed: {report.preflight}" in report.events
            assert not ever_ready(coordinator)
            await finish(coordinator, agent)
            assert not ever_ready(coordinator)
        finally:
            print(agent.errors()[-1000:])
            agent.close()


def ever_ready(coordinator: ScriptedCoordinator) -> list[Report]:
    return [report for report in coordinator.seen if report.phase is not AgentPhase.STARTING]


async def test_an_agent_without_a_zygote_is_checked_by_exec(tmp_path: Path) -> None:
    async with ScriptedCoordinator() as coordinator:
        begin = time.monotonic()
        env: dict[str, Any] = {Env.PREFLIGHT: "On"}
        agent = AgentProcess(tmp_path, coordinator.url, TOKEN, ["--no-python", "sleep", "60"], **env)
        try:
            await coordinator.until(lambda report: report.phase is AgentPhase.IDLE, limit_s=90)
            print(f"ready after {time.monotonic() - begin:.2f} s")
            assert "preflight: fit: memory " in agent.errors()
            assert coordinator.seen[0].phase is AgentPhase.STARTING
            await finish(coordinator, agent)
        finally:
            print(agent.errors()[-1000:])
            agent.close()
