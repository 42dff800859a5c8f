"""A healthy step loop of eight ranks of one agent, as readings: ten steps a second, a ring of connections between them."""

from __future__ import annotations

import random
from typing import TYPE_CHECKING

from fakes.readings import MS, batch, call, connection, stat, step
from stormjib_health.records.groups import group_key
from stormjib_health.records.ring import State
from stormjib_health.sampler.core import RankReading, Reading
from stormjib_health.wire import Group, Phase

if TYPE_CHECKING:
    from collections.abc import Iterator

    from stormjib_health.records.layout import Record
    from stormjib_health.sampler.sockets import Socket

RANKS = 8
STEP_MS = 100.0
TIMED = (0, 9)
"""Positions of a step whose ends are taken."""
PER_GROUP = 10
START_MS = 3_000_000.0
EVERYBODY = tuple(range(RANKS))
NOISE = random.Random(7)
GROUPS = (
    Group.of(group_key("default_pg", EVERYBODY, 0), "default_pg", EVERYBODY),
    Group.of(group_key("mesh_dp", EVERYBODY, 0), "mesh_dp", EVERYBODY),
)


def readings(
    count: int, groups: int = 1, every_ms: float = 200.0, bytes_per_step: int = 4 << 20
) -> Iterator[Reading]:
    """So many looks at a job that does well."""
    for number in range(count):
        now_ms = START_MS + number * every_ms + 37.25
        steps = range(round(max(0, number - 1) * every_ms / STEP_MS), round(number * every_ms / STEP_MS))
        ranks = {rank: _rank(rank, number == 0, now_ms, steps, groups) for rank in range(RANKS)}
        moved = int(number * every_ms / STEP_MS * bytes_per_step)
        yield Reading(round(now_ms * MS), ranks, list(_sockets(moved)))


def _rank(rank: int, first: bool, now_ms: float, steps: range, groups: int) -> RankReading:
    records: list[Record] = []
    for number in steps:
        records += _step(rank, number, groups)
    done = max(steps, default=-1)
    at_ns = round((START_MS + (done + 1) * STEP_MS) * MS)
    state = State(Phase.STEP, round(START_MS * MS), done, at_ns, count=1 + len(records))
    return RankReading(
        stat=stat("S", ticks=round(now_ms / 20)),
        batch=batch(*records, state=state),
        groups=GROUPS[:groups] if first else (),
        step=done,
        step_ns=at_ns,
    )


def _step(rank: int, number: int, groups: int) -> Iterator[Record]:
    began = START_MS + number * STEP_MS + rank * 0.137
    for group in range(groups):
        for position in range(PER_GROUP):
            at = began + 4 + position * 9 + group * 3 + NOISE.random()
            wait = NOISE.uniform(1, 4)
            yield call(
                number * PER_GROUP + position + 1,
                at,
                group=group,
                done_ms=at + wait if position in TIMED else 0,
                step=number - 1,
                signature=0x8000_0000 + position * 12345,
            )
    yield step(number, began + STEP_MS - 1, STEP_MS + NOISE.random())


def _sockets(moved: int) -> Iterator[tuple[int, Socket]]:
    """Every rank sends to the one before it: both ends of each connection are here."""
    for rank in range(RANKS):
        yield (
            rank,
            connection(
                40_000 + rank,
                sent=moved,
                received=1000,
                busy_us=moved // 997 + NOISE.randrange(9999),
                rtt_us=NOISE.randrange(50, 150),
            ),
        )
        yield (rank - 1) % RANKS, connection(50_000 + rank, sent=1000, received=moved)
