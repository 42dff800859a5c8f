"""The laboratory's rows on simulated traces: what each draws from a seed, and what the right answer is."""

from __future__ import annotations

import random
import statistics
import zlib
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from fakes.traces import RATES, Fault, Shape, Trace
from fakes.traces_play import Play, Told, acts, blames
from stormjib_health.verdict import Scope, Syndrome, Verdict

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

AT = 9.0
"""Faults come between this and half a second more: 60 steps and more are baseline by then."""
STEP_S = (0.06, 0.15)


@dataclass(frozen=True)
class Case:
    """One row: `kind` of fault, what must be said of it, and for how long the engine may look."""

    row: str
    kind: str
    syndrome: Syndrome | None
    """None: nobody may be blamed."""
    scope: Scope = Scope.RANK
    least: float = 1.0
    most: float = 1.0
    """Severity: step time after over before."""
    seconds: float = 5.0


HANG, CUT = Syndrome.NON_COMMUNICATION_HANG, Syndrome.COMMUNICATION_HANG
SLOW, THIN = Syndrome.NON_COMMUNICATION_SLOW, Syndrome.COMMUNICATION_SLOW

CASES = (
    Case("F1", "crash", Syndrome.CRASH, seconds=2.0),
    Case("F3", "stop", HANG),
    Case("F3", "stop_inside", HANG),
    Case("F4", "sleep", HANG),
    Case("F4", "sleep_data", HANG),
    Case("F4", "disk", HANG),
    Case("F4", "spin", HANG, seconds=8.0),
    Case("F5", "skip", Syndrome.DESYNC),
    Case("F5", "wrong_size", Syndrome.DESYNC),
    Case("F6", "slow", SLOW, least=1.15, most=3.0),
    Case("F6", "quota", SLOW, least=1.15, most=3.0),
    Case("F7", "link_cut", CUT, Scope.LINK),
    Case("F8", "node_cut", CUT, Scope.NODE),
    Case("F9", "node_tx", THIN, Scope.NODE, 1.3, 3.0),
    Case("F9", "node_rx", THIN, Scope.NODE, 1.3, 3.0),
    Case("F10", "link_slow", THIN, Scope.LINK, 1.3, 3.0),
    Case("F11", "loss", THIN, Scope.LINK, 1.3, 3.0),
    Case("F12", "latency", THIN, Scope.LINK, 1.3, 3.0),
    Case("F13", "congestion", None, Scope.JOB, 1.3, 3.0, 8.0),
    Case("F14", "imbalance", None, Scope.JOB, 1.15, 3.0, 12.0),
    Case("F15", "none", None, Scope.JOB, seconds=20.0),
)


@dataclass(frozen=True)
class Result:
    """What one trial came to."""

    case: Case
    seed: int
    said: str
    """Syndrome of the first verdict above a note, or `nothing`, or the note."""
    right: bool
    """Syndrome as it should be."""
    exact: bool
    """And the culprit."""
    after_s: float
    """From the fault to the verdict that counts; the first of its syndrome."""
    steps: float
    verdicts: tuple[Told, ...]


def draw(case: Case, seed: int) -> Trace:
    """The trial's job and fault."""
    dice = random.Random(seed * 1_000_003 + hash_of(case.kind))
    shape = draw_shape(case, dice)
    trace = Trace(shape, seed)
    if case.kind == "none":
        return trace
    rank, peer = draw_place(case, trace, dice)
    severity = dice.uniform(case.least, case.most) if dice.random() < 0.7 else case.least
    trace.fault = Fault(case.kind, AT + dice.uniform(0, 0.5), rank, peer, severity, dice.random() < 0.5)
    return trace


def hash_of(text: str) -> int:
    """Alike in every process, unlike `hash`."""
    return zlib.crc32(text.encode())


def draw_shape(case: Case, dice: random.Random) -> Shape:
    """Two, four or eight ranks on nodes of their own, in any layout that they allow."""
    link = case.scope in (Scope.LINK, Scope.NODE)
    world = dice.choice((4, 8) if link or case.syndrome is Syndrome.DESYNC else (2, 4, 8))
    layout = dice.choice(("dp", "fsdp") if world == 2 else ("dp", "fsdp", "tp_dp", "pp_dp"))
    # In a deep pipeline a slow connection hides in the bubbles: such a fault would not slow the steps.
    deep = layout == "pp_dp" and world == 8 and case.kind not in RATES
    inner = 4 if deep and dice.random() < 0.5 else 2
    shape = Shape(
        layout, world, 1, inner, dice.uniform(*STEP_S), dice.uniform(0.2, 0.5), dice.uniform(0.005, 0.04),
        dice.random() < 0.5,
    )  # fmt: skip
    if case.kind == "none":
        return replace(
            shape, checkpoint_every=dice.randrange(20, 60), checkpoint_s=1.5, start_s=2.0, stall=0.02
        )
    return shape


def draw_place(case: Case, trace: Trace, dice: random.Random) -> tuple[int, int]:
    """A rank, or the two ends of a connection that carries something."""
    if case.scope is not Scope.LINK:
        return dice.randrange(trace.shape.world), 0
    axes = {op.axis for op in trace.ops}
    lines = [
        line for axis in sorted(axes) for ring in trace.rings[axis] for line in ring.lines
        if line.main and (axis != "inner" or trace.shape.layout != "pp_dp" or case.kind == "link_cut")
        and (axis != "inner" or trace.shape.layout != "pp_dp" or line.source > line.target)
    ]  # fmt: skip
    line = dice.choice(lines)
    return line.source, line.target


def run(case: Case, seed: int, change: Callable[[Play], None] | None = None) -> Result:
    """One trial."""
    trace = draw(case, seed)
    play = Play(trace, seed)
    if change:
        change(play)
    start = 0.0 if case.kind == "none" else trace.fault.at
    told = play.run(start + case.seconds)
    if not fired(case, trace):
        return run(case, seed + 1_000_000, change)  # bubbles of the pipeline have swallowed it
    return judge(case, trace, seed, told)


def fired(case: Case, trace: Trace) -> bool:
    """Whether the steps are slower by what the row asks for at least."""
    if case.least <= 1:
        return True
    before = [seconds for end, seconds in trace.durations if end < trace.fault.at]
    after = [seconds for end, seconds in trace.durations if end - seconds > trace.fault.at]
    slow = statistics.fmean if case.kind == "imbalance" else statistics.median
    return slow(after) / statistics.median(before) > case.least - 0.01


def judge(case: Case, trace: Trace, seed: int, told: Sequence[Told]) -> Result:
    """Compare what was told with the truth. The last verdict of the right syndrome counts for the culprit."""
    # What is taken back before anybody acts is no wrong where nobody is to blame.
    counts = acts if case.kind in ("imbalance", "congestion") else blames
    above = [t for t in told if counts(t.verdict)]
    if case.syndrome is None:
        said = (
            str(above[0].verdict.syndrome) if above else str(told[0].verdict.syndrome) if told else "nothing"
        )
        return Result(case, seed, said, not above, not above, 0.0, 0.0, tuple(told))
    if not above:
        note = str(told[0].verdict.syndrome) if told else "nothing"
        return Result(case, seed, note, False, False, -1.0, -1.0, tuple(told))
    said = above[0].verdict.syndrome
    after = above[0].at - trace.fault.at
    right = said == case.syndrome and after >= 0
    exact = right and _exact(case, trace, above[-1].verdict)
    return Result(
        case,
        seed,
        str(said),
        right,
        exact,
        after,
        after / (trace.shape.step_s * trace.fault.severity),
        tuple(told),
    )


def _exact(case: Case, trace: Trace, verdict: Verdict) -> bool:
    rank, peer = trace.fault.rank, trace.fault.peer
    pairs = any(len(ring.group.ranks) == 2 for rings in trace.rings.values() for ring in rings)
    if case.syndrome is Syndrome.DESYNC and pairs and verdict.scope is Scope.JOB:
        return verdict.software  # a group of two has no minority
    if case.scope is Scope.LINK:
        # Ranks of one slot share its link: which of their connections stands for it does not matter.
        ends = {trace.people[rank].slot, trace.people[peer].slot}
        return verdict.scope is Scope.LINK and set(verdict.slots) == ends
    wanted = trace.people[rank].slot if case.scope is Scope.NODE else rank
    return verdict.scope is case.scope and verdict.culprits == (wanted,)
