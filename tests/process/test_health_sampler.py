"""What an agent says of real ranks over Gloo, healthy and not; and what saying it costs."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from bench.health_sampler import Steppers, parts
from fakes.agents import SCRIPTS, AgentProcess, until
from fakes.scripted import TOKEN, ScriptedCoordinator, new_order
from stormjib_health.wire import Check, CheckKind, Kind, Phase, RankSample, Sample, Wish
from stormjib_runtime.wire import Do

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

pytestmark = pytest.mark.timeout(400)


@pytest.fixture
async def coordinator() -> AsyncIterator[ScriptedCoordinator]:
    async with ScriptedCoordinator() as one:
        yield one


def rank(sample: Sample, number: int) -> RankSample:
    return next(one for one in sample.ranks if one.rank == number)


def steps(sample: Sample) -> bool:
    """Both ranks train."""
    return len(sample.ranks) == 2 and all(one.step > 5 and one.step_age_s < 1 for one in sample.ranks)


async def test_an_agent_says_how_its_ranks_do(coordinator: ScriptedCoordinator, tmp_path: Path) -> None:
    agent = AgentProcess(tmp_path, coordinator.url, TOKEN, [str(SCRIPTS / "sampled.py")])
    try:
        await coordinator.run(1, limit_s=60)
        await coordinator.sampled(steps, limit_s=60)
        pids = [pid_of(agent, number) for number in range(2)]
        await healthy(coordinator)
        await heard_again(coordinator)
        await stopped_between_calls(coordinator, pids)
        await stopped_in_a_call(coordinator, pids)
        await long_phase(coordinator, pids)
        await holds_the_gil(coordinator, pids)
        await coordinator.order(0, new_order(Do.FINISH))
        assert await agent.exit() == 0
        assert "SamplingFailed" not in agent.errors()
    finally:
        print(agent.output()[-2000:], agent.errors()[-2000:])
        agent.close()


def pid_of(agent: AgentProcess, number: int) -> int:
    return next(pid for pid in agent.below() if Path(f"/proc/{pid}/comm").read_text() == f"rank{number}\n")


async def healthy(coordinator: ScriptedCoordinator) -> None:
    """Steps, calls, timings, and each connection between the two ranks from both of its ends."""
    seen = len(coordinator.samples)
    first = coordinator.samples[0]
    assert (first.slot, first.agent, first.generation) == (0, 1, "1.1")
    groups = [group for sample in coordinator.samples for group in sample.groups]
    assert [group.ranks for group in groups] == [(0, 1)], "told once"
    sample = await coordinator.sampled(
        lambda sample: (
            steps(sample) and all(one.steps_s and one.timings and one.calls for one in sample.ranks)
        )
    )
    for one in sample.ranks:
        assert one.phase in (Phase.STEP, Phase.FORWARD, Phase.BACKWARD, Phase.OPTIMIZER, Phase.DATA)
        assert one.process in "RSD"
        assert all(0.04 < seconds < 10 for seconds in one.steps_s)
        assert [call.group for call in one.calls] == [groups[0].key]
        assert one.calls[0].kind == Kind.ALL_REDUCE
        assert one.calls[0].issued >= 2 * one.step
        assert all(0 < timing.wait_s < 10 and timing.group == groups[0].key for timing in one.timings)
        assert (one.unread, one.lost) == (0, 0)
    await coordinator.sampled(lambda _: len(pairs(coordinator.samples[seen:])) >= 1)
    moved = {
        edge.rank: edge for one in coordinator.samples[seen:] for edge in one.edges if edge.sent > 1 << 18
    }
    assert moved.keys() == {0, 1}
    assert all(edge.rto_s > 0 and edge.rtt_s > 0 and edge.backoff == 0 for edge in moved.values())
    numbers = [one.number for one in coordinator.samples]
    assert numbers == sorted(set(numbers))
    assert max(coordinator.sizes) <= 1024


def pairs(samples: list[Sample]) -> set[tuple[str, str]]:
    """Connections between different ranks that were told from both ends."""
    ends = {(edge.local, edge.remote): edge.rank for sample in samples for edge in sample.edges}
    return {(a, b) for (a, b), number in ends.items() if ends.get((b, a), number) != number}


async def heard_again(coordinator: ScriptedCoordinator) -> None:
    """A coordinator that refuses costs nothing: the next sample covers the time between, and steps went on."""
    last = coordinator.samples[-1]
    coordinator.deaf = True
    await until(lambda: coordinator.refused >= 2)
    coordinator.deaf = False
    sample = await coordinator.sampled(lambda _: True)
    assert sample.over_s > 1
    assert rank(sample, 0).step > rank(last, 0).step
    # Another coordinator knows no group, and says so; what it asks to be checked is checked once.
    coordinator.wish = Wish(groups=True, checks=(Check(7, CheckKind.COMPUTE, rank=0, limit_s=10.0),))
    again = await coordinator.sampled(lambda sample: bool(sample.groups))
    assert again.groups[0].ranks == (0, 1)
    answered = next((one.answers for one in coordinator.samples if one.answers), ())
    if not answered:
        answered = (await coordinator.sampled(lambda sample: bool(sample.answers))).answers
    assert [(one.id, one.ok, len(one.digest)) for one in answered] == [(7, True, 64)], answered


async def stopped_between_calls(coordinator: ScriptedCoordinator, pids: list[int]) -> None:
    os.kill(pids[0], signal.SIGSTOP)
    coordinator.wish = Wish(stacks=(0,))
    frozen = await coordinator.sampled(lambda sample: rank(sample, 0).process == "T" and bool(sample.stacks))
    assert frozen.stacks[0].text.startswith("process state T for "), frozen.stacks
    assert "phase " in frozen.stacks[0].text
    await coordinator.sampled(lambda sample: rank(sample, 0).process_age_s > 0.5)
    waits = await coordinator.sampled(lambda sample: any(not call.done for call in rank(sample, 1).calls))
    assert rank(waits, 1).process in "SRD"
    os.kill(pids[0], signal.SIGCONT)
    await coordinator.sampled(lambda sample: steps(sample) and rank(sample, 0).process != "T")


async def stopped_in_a_call(coordinator: ScriptedCoordinator, pids: list[int]) -> None:
    """Rank 1 waits in a call for rank 0 when it is stopped: then rank 0 sends what nobody takes."""
    os.kill(pids[0], signal.SIGSTOP)
    await coordinator.sampled(lambda sample: any(not c.done and c.age_s > 0.5 for c in rank(sample, 1).calls))
    os.kill(pids[1], signal.SIGSTOP)
    os.kill(pids[0], signal.SIGCONT)
    sample = await coordinator.sampled(lambda sample: rank(sample, 1).unread > 0)
    assert rank(sample, 1).process == "T"
    assert rank(sample, 0).process != "T"
    assert any(edge.rank == 1 and edge.unread > 0 for edge in sample.edges)
    os.kill(pids[1], signal.SIGCONT)
    await coordinator.sampled(lambda sample: steps(sample) and rank(sample, 1).unread == 0)


async def long_phase(coordinator: ScriptedCoordinator, pids: list[int]) -> None:
    for pid in pids:
        os.kill(pid, signal.SIGUSR2)
    sample = await coordinator.sampled(
        lambda sample: all(one.phase == Phase.CHECKPOINT and one.phase_age_s > 0.6 for one in sample.ranks)
    )
    assert all(one.step > 0 for one in sample.ranks)
    await coordinator.sampled(steps)


async def holds_the_gil(coordinator: ScriptedCoordinator, pids: list[int]) -> None:
    """It is behind, and its stack says where, although no line of Python can run in it."""
    os.kill(pids[1], signal.SIGUSR1)
    laggard = await coordinator.sampled(
        lambda sample: any(not call.done and call.age_s > 0.6 for call in rank(sample, 0).calls)
    )
    issued = {
        one.rank: call.issued for sample in coordinator.samples for one in sample.ranks for call in one.calls
    }
    assert issued[1] < issued[0]
    assert rank(laggard, 1).process in "SR"
    coordinator.wish = Wish(stacks=(1,))
    sample = await coordinator.sampled(lambda sample: bool(sample.stacks))
    assert sample.stacks[0].rank == 1
    assert "hold_the_gil" in sample.stacks[0].text.partition("\n\n")[0]


def test_sampling_eight_ranks_is_cheap_and_small(tmp_path: Path) -> None:
    """Plain processes that record and send as ranks do. The bound is thrice that of a free machine (`bench.health_sampler`)."""
    with Steppers(8, tmp_path) as steppers:
        end = time.monotonic() + 30
        while not all((tmp_path / f"port-{number}").exists() for number in range(8)):
            assert time.monotonic() < end
            time.sleep(0.05)
        found = parts(steppers, 15)
    middle = {name: values[len(values) // 2] for name, values in found.items()}
    print(middle)
    assert middle["sockets"] == 56
    assert middle["bytes"] <= 1024
    assert middle["look"] + middle["take"] + middle["sample and pack"] <= 3 * 2.0, "ms in 200: 1 % of a core"
    assert middle["unpack"] <= 3 * 1.0
