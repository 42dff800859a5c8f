"""What becomes of a step whose numbers are known and that is not yet applied: apply it, do it again, skip it, go back.

Every rank has a judge of its own and feeds it the same numbers, which come from one all-reduce: so all rule alike
without a word to each other. The ladder (anchors: Gemini's deterministic replay, PaLM's skipped batches):

1. A doubtful step is thrown away and done again at once, from the same state and the same samples. Other bits the
   second time are a fault of hardware, and the rank whose own gradient norm differs is the one.
2. The same bits again: the state is wrong, or the data or the program are as they are. Replicas have compared all of
   their state meanwhile: if it differs, the job goes back. Else it does where the policy says so, and what follows is
   compared with what was recorded (`Replay`).
3. The same bits even so: data or program. The batch is skipped, or the job fails.
"""

from __future__ import annotations

import math
import struct
from dataclasses import dataclass, field, replace
from enum import StrEnum
from typing import TYPE_CHECKING

from stormjib_health.integrity.norms import suspects
from stormjib_health.integrity.spikes import Window
from stormjib_health.integrity.votes import NOBODY, dissents
from stormjib_health.verdict import OnRecurrence, OnSpike
from stormjib_health.wire import Doubt, Finding

if TYPE_CHECKING:
    from collections.abc import Hashable, Mapping, Sequence

MAX_SKIPS = 200
"""Steps skipped in a row; PaLM skipped 200 to 500. After more it is no spike but the end of learning."""


class Act(StrEnum):
    """What all ranks do with a step."""

    APPLY = "Apply"
    AGAIN = "Again"
    SKIP = "Skip"
    ROLL_BACK = "RollBack"
    FAIL = "Fail"


@dataclass(frozen=True)
class Policy:
    """What the job wants."""

    norms: bool = True
    digests: bool = True
    on_spike: OnSpike = OnSpike.NOTIFY
    on_recurrence: OnRecurrence = OnRecurrence.FAIL


@dataclass(frozen=True)
class Numbers:
    """What all ranks know of one attempt at one step, equal on every one of them to the bit."""

    step: int
    loss: float
    norm: float
    """Of the gradient of the whole job."""
    norms: tuple[float, ...] = ()
    """Of each rank's own gradient, before mixing; empty where they are not taken."""
    digests: tuple[Hashable, ...] = ()
    """Of each rank's state before this step; empty where they are not taken."""

    @property
    def finite(self) -> bool:
        return math.isfinite(self.loss) and math.isfinite(self.norm)

    def bits(self) -> str:
        """Loss and norm as they are compared with a replay: 32 hexadecimal digits."""
        return bits(self.loss, self.norm)

    def differing(self, other: Numbers) -> set[int]:
        """Ranks whose own gradient was another one."""
        pairs = zip(self.norms, other.norms, strict=True)
        return {rank for rank, (one, two) in enumerate(pairs) if bits(one) != bits(two)}

    def same(self, other: Numbers) -> bool:
        """Whether all is equal to the bit."""
        return self.bits() == other.bits() and not self.differing(other)


def bits(*values: float) -> str:
    """The bits of doubles as hexadecimal digits: the only equality that a NaN has with itself."""
    return struct.pack(f">{len(values)}d", *values).hex()


@dataclass(frozen=True)
class Replay:
    """What an earlier generation recorded of the steps that this one does again."""

    doubted: int | None = None
    """The step because of whose numbers it went back; None where replicas differed."""
    recorded: Mapping[int, str] = field(default_factory=dict)
    """step -> `Numbers.bits`."""
    done: int = 0
    """The step that this generation resumed from."""
    exact: bool = True
    """False where this generation cannot give equal bits: it has another world, or another kind of device."""

    def of(self, step: int) -> str | None:
        """What was recorded of a step, where it can be compared with."""
        return self.recorded.get(step) if self.exact else None

    def before(self) -> list[tuple[float, float]]:
        """Loss and norm of the recorded steps that are not done again."""
        return [unpack(text) for step, text in sorted(self.recorded.items()) if step <= self.done]


@dataclass(frozen=True)
class Ruling:
    """What to do, what was found, and why in a few words."""

    act: Act
    findings: tuple[Finding, ...] = ()
    why: str = ""


class Judge:
    """Rules on every attempt of every step, in order."""

    def __init__(
        self,
        policy: Policy,
        *,
        rank: int,
        shares: Sequence[int],
        groups: Sequence[Sequence[int]] = (),
        can_go_back: bool = False,
        exact: bool = True,
        replay: Replay | None = None,
    ) -> None:
        """`shares`: sequences per step of each rank; `groups`: ranks that hold the same shard; `can_go_back`: there
        is a storage that checkpoints lie on; `exact`: the same work gives the same bits (on a GPU only where its
        deterministic algorithms are used)."""
        self._policy, self._rank = policy, rank
        self._shares, self._groups = tuple(shares), groups
        self._can_go_back, self._exact, self._replay = can_go_back, exact, replay
        self._window = Window()
        self._first: tuple[Numbers, tuple[Finding, ...]] | None = None
        """The attempt that is being done again, and what is doubtful in it."""
        self._accused: frozenset[int] = frozenset()
        """By norms, in the step before this one."""
        self._spiking = False
        """The step before this one was a spike, and applied: what follows from it is not told again."""
        self._skipped = 0
        for loss, norm in replay.before() if replay is not None else ():
            self._window.add(loss, norm)

    def rule(self, now: Numbers) -> Ruling:
        """What to do with this attempt. After AGAIN comes another attempt at the same step, never a third."""
        votes = self._votes(now)
        if votes:
            return Ruling(Act.ROLL_BACK, votes, "replicas of a shard differ")
        first, self._first = self._first, None
        if first is not None:
            return self._second(*first, now)
        if self._recurs(now):
            return self._recurrence(self._finding(Doubt.REPLAY_AGREES, now.step))
        findings = (*self._unlike_recorded(now), *(doubts := self._doubts(now)))
        if not doubts:
            return self._apply(now, findings)
        self._first = now, doubts
        return Ruling(Act.AGAIN, findings, "its numbers are doubtful")

    # --- what is doubtful -------------------------------------------------------------------------------------------

    def _votes(self, now: Numbers) -> tuple[Finding, ...]:
        if not (self._policy.digests and now.digests):
            return ()
        found = dissents(now.digests, self._groups)
        return tuple(self._finding(Doubt.DIGEST, now.step - 1, d.accused, votes=d.votes) for d in found)

    def _doubts(self, now: Numbers) -> tuple[Finding, ...]:
        found = [
            self._finding(s.kind, now.step, s.rank, s.value, s.typical)
            for s in (suspects(now.norms, self._shares) if now.norms else ())
        ]
        if not now.finite and not found:
            found = [self._finding(Doubt.NOT_FINITE, now.step)]
        spike = self._window.spike(now.loss, now.norm) if now.finite else None
        if spike is not None and not self._spiking:
            found.append(self._finding(Doubt.SPIKE, now.step, NOBODY, spike.value, spike.typical))
        return tuple(found)

    def _finding(
        self,
        kind: Doubt,
        step: int,
        accused: int = NOBODY,
        value: float = 0.0,
        typical: float = 0.0,
        votes: int = 0,
    ) -> Finding:
        value, typical = (x if math.isfinite(x) else 0.0 for x in (value, typical))
        return Finding(self._rank, kind, step, accused, value, typical, votes)

    # --- the second attempt -----------------------------------------------------------------------------------------

    def _second(self, first: Numbers, doubted: tuple[Finding, ...], now: Numbers) -> Ruling:
        doubts = self._doubts(now)
        if not doubts or (self._exact and not first.same(now)):
            return self._differs(first, doubted, now, doubts)
        if now.finite and all(finding.kind is Doubt.NORM for finding in doubts):
            return self._far_again(now, doubts)
        return self._came_again(now)

    def _differs(
        self, first: Numbers, doubted: tuple[Finding, ...], now: Numbers, doubts: tuple[Finding, ...]
    ) -> Ruling:
        """Whose own gradient was another one is to blame; where nothing gives the same bits twice, who was suspected."""
        ranks = first.differing(now) if self._exact else {f.accused for f in doubted} - {NOBODY}
        accused = min(ranks) if len(ranks) == 1 else NOBODY
        said = self._finding(Doubt.REPLAY_DIFFERS, now.step, accused, first.norm, now.norm)
        if doubts:
            return Ruling(Act.FAIL, (said, *doubts), "done twice, it gave two results, both of them doubtful")
        return self._apply(now, (said,))

    def _far_again(self, now: Numbers, doubts: tuple[Finding, ...]) -> Ruling:
        """A norm that is far from the others' twice, with the same bits: this rank's data may be so. In the next step
        it has other data, so the same rank again is no chance."""
        accused = frozenset(finding.accused for finding in doubts)
        if again := accused & self._accused:
            why = f"rank {min(again)}'s gradient is far from the others' in two steps in a row"
            return Ruling(Act.FAIL, doubts, why)
        return self._apply(now, (self._finding(Doubt.REPLAY_AGREES, now.step),), accused)

    def _came_again(self, now: Numbers) -> Ruling:
        """A spike, or numbers that are not finite, with the same bits when done again."""
        policy, agrees = self._policy.on_spike, self._finding(Doubt.REPLAY_AGREES, now.step)
        if policy is OnSpike.REPLAY and self._can_go_back:
            if self._replay is not None and self._replay.doubted == now.step:
                return self._recurrence(agrees)
            return Ruling(Act.ROLL_BACK, why="done again, it gave the same")
        if policy is OnSpike.SKIP:
            return self._skip(agrees)
        if policy is OnSpike.FAIL or not now.finite:
            return Ruling(Act.FAIL, (agrees,), "done again, it gave the same")
        return self._apply(now, (agrees,))

    # --- after going back ---------------------------------------------------------------------------------------------

    def _recurs(self, now: Numbers) -> bool:
        """Whether this is the step because of which the job went back, and it is as it was. Told by its bits, because
        few steps may have been made since, with too short a window to see the spike in."""
        replay = self._replay
        return (
            replay is not None and replay.doubted == now.step and replay.recorded.get(now.step) == now.bits()
        )

    def _unlike_recorded(self, now: Numbers) -> tuple[Finding, ...]:
        """Tells the first step that is not as it was recorded; what comes after it differs in any case."""
        recorded = self._replay.of(now.step) if self._replay else None
        if self._replay is None or recorded is None or recorded == now.bits():
            return ()
        self._replay = replace(self._replay, exact=False)
        return (self._finding(Doubt.REPLAY_DIFFERS, now.step, NOBODY, now.norm, unpack(recorded)[1]),)

    def _recurrence(self, said: Finding) -> Ruling:
        if self._policy.on_recurrence is OnRecurrence.SKIP:
            return self._skip(said)
        return Ruling(Act.FAIL, (said,), "it came again after going back: data or program, not hardware")

    # --- ends -----------------------------------------------------------------------------------------------------------

    def _apply(
        self, now: Numbers, findings: tuple[Finding, ...], accused: frozenset[int] = frozenset()
    ) -> Ruling:
        self._spiking = self._window.spike(now.loss, now.norm) is not None
        self._accused, self._skipped = accused, 0
        self._window.add(now.loss, now.norm)
        return Ruling(Act.APPLY, findings)

    def _skip(self, said: Finding) -> Ruling:
        self._skipped += 1
        if self._skipped > MAX_SKIPS:
            return Ruling(Act.FAIL, (said,), f"{MAX_SKIPS} steps in a row were skipped")
        return Ruling(Act.SKIP, (said,))


def unpack(text: str) -> tuple[float, float]:
    """Loss and norm of `Numbers.bits`. Raises ValueError on anything else."""
    data = bytes.fromhex(text)
    if len(data) != 16:
        raise ValueError(f"{text[:64]!r} is not the 32 hexadecimal digits of loss and norm")
    loss, norm = struct.unpack(">dd", data)
    return loss, norm
