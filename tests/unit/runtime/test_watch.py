"""The health engine at work in a coordinator: whose samples are heard, what agents are asked for, what comes of it."""

from __future__ import annotations

from dataclasses import replace

import pytest

from fakes.runtime import JOB, World, bounds, on_report, running_world
from stormjib_health.verdict import Syndrome
from stormjib_health.wire import Call, Group, RankSample, Sample
from stormjib_runtime import engine
from stormjib_runtime.narrate import health_metrics
from stormjib_runtime.state import Refused
from stormjib_runtime.watch import PACE, Watch
from stormjib_runtime.wire import PROTOCOL

GROUP = Group.of(7, "default_pg", (0, 1, 2, 3))


class Watched:
    """A world of two agents with two ranks each, and a watch over it."""

    def __init__(self) -> None:
        self.world: World = running_world(bounds(2, 1))
        self.watch = Watch()
        self.watch.follow(self.world.state, self.world.now)
        self.number = 0

    def sample(self, slot: int, *ranks: RankSample, **change: object) -> Sample:
        """What the agent of `slot` would say."""
        self.number += 1
        given = ranks or tuple(self.rank(2 * slot + local) for local in range(2))
        base = Sample(PROTOCOL, JOB, slot, 1, "1.1", self.number, 0.2, ranks=given, groups=(GROUP,))
        return replace(base, **change)  # type: ignore[arg-type]

    def rank(self, rank: int, **change: object) -> RankSample:
        step = int(self.world.now * 10)
        call = Call(GROUP.key, issued=step, kind=1, age_s=0.05)
        base = RankSample(
            rank,
            step=step,
            step_age_s=0.05,
            steps_s=(0.1, 0.1),
            own_s=(0.05, 0.05),
            steps_to=step,
            phase=2,
            calls=(call,),
        )
        return replace(base, **change)  # type: ignore[arg-type]

    def take(self, sample: Sample) -> int:
        """Status with which a sample is refused; 200 where it is taken."""
        try:
            self.watch.take(self.world.state, sample, self.world.now)
        except Refused as error:
            return error.status
        return 200

    def look(self) -> None:
        """One look of the coordinator, and what follows from it."""
        for generation, verdict in self.watch.tick(self.world.state, self.world.now):
            self.world.state = engine.on_verdict(self.world.state, generation, verdict, self.world.now)
        self.watch.follow(self.world.state, self.world.now)


@pytest.mark.parametrize(
    ("change", "status", "reason"),
    [
        ({"protocol": 99}, 409, "protocol"),
        ({"job_uid": "another"}, 403, "job"),
        ({"generation": "1.0"}, 409, "generation"),
        ({"generation": "x" * 9999}, 409, "generation"),
        ({"slot": 5}, 403, "slot"),
        ({"agent": 2}, 403, "slot"),
        ({"ranks": (RankSample(3),)}, 400, "malformed"),
        ({"ranks": (RankSample(10**9),)}, 400, "malformed"),
        ({"ranks": (RankSample(0, step_age_s=-1.0),)}, 400, "malformed"),
        ({"number": 0}, 409, "old"),
    ],
)
def test_what_is_not_an_agents_own_is_refused_and_counted(
    change: dict[str, object], status: int, reason: str
) -> None:
    watched = Watched()
    assert watched.take(watched.sample(0)) == 200
    assert watched.take(replace(watched.sample(0), **change)) == status  # type: ignore[arg-type]
    assert dict(watched.watch.refused) == {reason: 1}
    assert watched.watch.accepted == 1
    assert watched.watch.tick(watched.world.state, watched.world.now) == []
    assert f'stormjib_health_samples_refused_total{{reason="{reason}"}} 1' in health_metrics(watched.watch)


def test_a_thousand_samples_a_second_are_not_heard() -> None:
    watched = Watched()
    taken = 0
    for _ in range(1000):
        watched.world.now += 0.001
        taken += watched.take(watched.sample(0)) == 200
    assert taken <= 2 * PACE + 1
    watched.world.now += 1
    assert watched.take(watched.sample(0)) == 200
    assert watched.take(watched.sample(1)) == 200, "the others are not held up by it"


def test_a_frozen_rank_is_named_within_two_seconds_and_the_job_restarts() -> None:
    watched = Watched()
    frozen_at = 0.0
    for tick in range(400):
        watched.world.now += 0.1
        if tick == 350:
            frozen_at = watched.world.now
        frozen = watched.world.now - frozen_at if frozen_at else 0.0
        if tick % 10 == 0:
            watched.world.settle()  # heartbeats
        if tick % 2 == 0 and frozen:
            held = {"steps_s": (), "own_s": (), "step": 0, "step_age_s": frozen, "calls": ()}
            stopped = watched.rank(2, process="T", process_age_s=frozen, **held)
            watched.take(watched.sample(1, stopped, watched.rank(3, **held)))
            watched.take(watched.sample(0, watched.rank(0, **held), watched.rank(1, **held)))
        elif tick % 2 == 0:
            watched.take(watched.sample(0))
            watched.take(watched.sample(1))
        watched.look()
        if watched.world.state.history[-1].fault or str(watched.world.state.stage).startswith("Idle"):
            break
    watched.world.settle()
    (verdict,) = watched.world.job().verdicts
    assert (verdict.syndrome, verdict.culprits) == (Syndrome.NON_COMMUNICATION_HANG, (2,))
    assert watched.world.now - frozen_at <= 2.0
    assert watched.world.causes == ["Start", "RankHang"]
    assert watched.watch.found[Syndrome.NON_COMMUNICATION_HANG] == 1


def test_who_died_first_is_told_although_the_generation_is_over_by_then() -> None:
    watched = Watched()
    world = watched.world
    for slot, exit_, lines in ((0, 1, "RuntimeError: Connection closed by peer [10.0.0.1]:1"), (1, -11, "")):
        world.agents[slot].rank(0, exit=exit_, last_lines=lines)
        report = world.agents[slot].report()
        watched.watch.exits(world.state, report, world.now)
        world.state = on_report(world.state, report, world.now)
        watched.watch.follow(world.state, world.now)
        assert watched.watch.urgent
    world.settle()
    watched.watch.follow(world.state, world.now)
    assert world.job().verdicts == ()
    for _ in range(5):
        world.now += 0.1
        watched.look()
    (verdict,) = world.job().verdicts
    assert not watched.watch.urgent, "it is told"
    assert (verdict.syndrome, verdict.culprits, verdict.generation) == (Syndrome.CRASH, (2,), "1.1")
    assert world.causes == ["Start", "RankExit"], "it is said, not acted on again"


def test_a_new_engine_asks_for_the_groups_it_does_not_know() -> None:
    watched = Watched()
    wish = watched.watch.take(watched.world.state, watched.sample(0, groups=()), watched.world.now)
    assert wish.groups
    wish = watched.watch.take(watched.world.state, watched.sample(0), watched.world.now)
    assert not wish.groups
