"""Whether a sample can be true at all. The agent and everything that it reads belong to a tenant: nothing is trusted."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from stormjib_health.engine.report import Malformed
from stormjib_health.wire import PAIRS

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping

    from stormjib_health.wire import Answer, Call, Edge, Group, RankSample, Sample, Timing

LONG_S = 1e7
"""Four months: no age or duration inside a generation is longer."""
MANY = 1 << 53
"""No count is greater; and a double still holds it exactly."""
CALLS = 256
TIMINGS = 256
EDGES = 256
STEPS = 8
FINDINGS = 256
STACK = 8192
MEMBERSHIPS = 256
"""Groups that one rank is in, on average over the generation."""
STATES = frozenset("RSDTtZXIKWP")


def check(
    sample: Sample, seats: Collection[int], slots: Mapping[int, int], known: Mapping[int, Group]
) -> None:
    """Raise Malformed where `sample` cannot be true. `seats`: ranks of its slot; `slots`: slot of every rank; `known`: the groups
    that another agent has told of already, by key."""
    _seconds("over_s", sample.over_s)
    _at_most("edges", sample.edges, EDGES)
    _at_most("ranks", sample.ranks, len(seats))
    for rank in sample.ranks:
        _seat(rank.rank, seats, sample.slot)
        _check_rank(rank)
    for edge in sample.edges:
        _seat(edge.rank, seats, sample.slot)
        _check_edge(edge)
    for group in sample.groups:
        if known.get(group.key) != group:  # else another agent has said the same, of thousands of ranks
            _check_group(group, slots)
    _at_most("findings", sample.findings, FINDINGS)
    for finding in sample.findings:
        _seat(finding.rank, seats, sample.slot)
        _count("step", finding.step + 1)
    for stack in sample.stacks:
        _seat(stack.rank, seats, sample.slot)
        _at_most("stack", stack.text, STACK)


def check_answer(answer: Answer) -> None:
    """Raise Malformed where `answer` cannot be true."""
    _seconds("seconds", answer.seconds)
    _seconds("cpu_s", answer.cpu_s)
    _seconds("rtt_s", answer.rtt_s)
    _seconds("queued_s", answer.queued_s)
    _count("bytes", answer.bytes)
    _count("again", answer.again)
    _at_most("digest", answer.digest, 256)
    _at_most("versions", answer.versions, 1024)
    _at_most("text", answer.text, STACK)


def _check_rank(rank: RankSample) -> None:
    _at_most("steps_s", rank.steps_s, STEPS)
    _at_most("calls", rank.calls, CALLS)
    _at_most("timings", rank.timings, TIMINGS)
    _at_most("wchan", rank.wchan, 64)
    if rank.process not in STATES:
        raise Malformed(f"process is {rank.process[:8]!r}; wanted one state letter of /proc/PID/stat")
    _count("step", rank.step + 1)
    _count("steps_to", rank.steps_to + 1)
    _count("unread", rank.unread)
    for name in ("step_age_s", "phase_age_s", "process_age_s", "idle_s", "throttled_s", "queued_s"):
        _seconds(name, getattr(rank, name))
    if len(rank.own_s) != len(rank.steps_s):
        raise Malformed(f"own_s holds {len(rank.own_s)} items; steps_s holds {len(rank.steps_s)}")
    for step, own in zip(rank.steps_s, rank.own_s, strict=True):
        _seconds("steps_s", step)
        _seconds("own_s", own)
    for call in rank.calls:
        _check_call(call)
    for timing in rank.timings:
        _check_timing(timing)


def _check_call(call: Call) -> None:
    if not 0 <= call.issued < MANY:
        raise Malformed(f"issued of group {call.group} is below 0 or beyond {MANY}")
    _at_most("pairs", call.pairs, PAIRS)
    for pair in call.pairs:
        if not (-1 <= pair.peer < MANY and 0 <= pair.sent < MANY and 0 <= pair.received < MANY):
            raise Malformed(f"a pair of group {call.group} is below 0 or beyond {MANY}")
    if not (0 <= call.kind <= 64 and -1 <= call.peer < MANY):
        raise Malformed(f"kind {call.kind} or peer {call.peer} does not exist")
    _seconds("age_s", call.age_s)


def _check_timing(timing: Timing) -> None:
    if 0 <= timing.number < MANY and 0.0 <= timing.wait_s <= LONG_S:
        return  # thousands a second: told apart only where something is wrong
    _count("number", timing.number)
    _seconds("wait_s", timing.wait_s)


def _check_edge(edge: Edge) -> None:
    if len(edge.local) > 64 or len(edge.remote) > 64:
        raise Malformed(
            f"address of {len(edge.local)} or {len(edge.remote)} characters; at most 64 make sense"
        )
    counts = (
        edge.sent,
        edge.received,
        edge.retransmitted,
        edge.backoff,
        edge.unacked,
        edge.unread,
        edge.unsent,
    )
    if min(counts) < 0 or max(counts) >= MANY:
        raise Malformed(f"a count of {edge.local} to {edge.remote} is below 0 or beyond {MANY}")
    for name in ("busy_s", "rtt_s", "rto_s", "last_ack_s"):
        _seconds(name, getattr(edge, name))


def _check_group(group: Group, slots: Mapping[int, int]) -> None:
    _at_most("name", group.name, 256)
    if min((span.count for span in group.spans), default=0) < 1:
        raise Malformed(f"group {group.key} has an empty span, or none")
    if group.size > len(slots) or len(set(group.ranks)) != group.size:
        raise Malformed(f"group {group.key} lists {group.size} ranks; each of {len(slots)} may be in it once")
    strange = next((rank for rank in group.ranks if rank not in slots), None)
    if strange is not None:
        raise Malformed(f"group {group.key} has rank {strange}; this generation has none of that number")


def _seat(rank: int, seats: Collection[int], slot: int) -> None:
    if rank not in seats:
        raise Malformed(f"rank is {rank}; slot {slot} has {', '.join(map(str, sorted(seats))) or 'none'}")


def _seconds(name: str, value: float) -> None:
    if not 0.0 <= value <= LONG_S or math.isnan(value):
        raise Malformed(f"{name} is {value}; wanted seconds from 0 to {LONG_S:.0f}")


def _count(name: str, value: int) -> None:
    if not 0 <= value < MANY:
        raise Malformed(f"{name} is {value}; wanted a count below {MANY}")


def _at_most(name: str, items: Collection[object], limit: int) -> None:
    if len(items) > limit:
        raise Malformed(f"{name} holds {len(items)} items; the limit is {limit}")
