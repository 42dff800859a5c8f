"""Silent corruption, seen from the loop: what a rank tells the others of its numbers, and what all rule of it.

Every rank has a place of its own in the one all-reduce of a step (`step.agree`): the norm of its gradient before mixing,
and the digest of a sixteenth of its state. So all know of all of them, without a collective more.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

import torch

from stormjib_checkpoint.records import Json, build
from stormjib_health.integrity.judge import Judge, Numbers, Replay, unpack
from stormjib_health.integrity.slices import SLICES
from stormjib_health.integrity.votes import replica_groups
from stormjib_health.probe.numbers import DIGEST_HALVES, Digests, LocalNorm, halves
from stormjib_trainer.step import Share

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor, nn

    from stormjib_checkpoint.format import DoubtFile
    from stormjib_checkpoint.order import Micro
    from stormjib_health.integrity.judge import Ruling
    from stormjib_health.probe.numbers import ReduceScatter
    from stormjib_trainer.environment import Environment
    from stormjib_trainer.step import Agreed

RECORDED = 512
"""Steps whose numbers are kept to compare a replay with: more than lie between two checkpoints that are trusted."""


@dataclass(frozen=True)
class Recorded:
    """What a generation that ends because of its numbers leaves for the next one to compare with."""

    voted: bool
    """It ended because replicas differed, not because of the numbers of its last step."""
    facts: dict[str, Json]
    """What must be equal for equal bits."""
    steps: dict[int, str]
    """step -> bits of loss and norm."""

    def __post_init__(self) -> None:
        for bits in self.steps.values():
            unpack(bits)


class Watch:
    """One rank's watch over the numbers of the job."""

    def __init__(self, env: Environment, lmb: Micro, replicas: int, device: torch.device) -> None:
        self._env, self._lmb, self._replicas, self._device = env, lmb, replicas, device
        self._norm = LocalNorm(device) if env.integrity.norms else None
        self._digests: Digests | None = None
        self._recorded: dict[int, str] = {}
        self._judge: Judge | None = None

    def attach(
        self, model: nn.Module, folds: Mapping[nn.Module, ReduceScatter], tensors: list[Tensor]
    ) -> None:
        """Stand at the entrance of the model's reductions, which are in `folds` or FSDP2's own, and read `tensors`, the state that every step changes."""
        if self._norm is not None:
            self._norm.attach(model, folds)
        if self._env.integrity.digests and self._replicas > 1:
            self._digests = Digests(tensors)

    def begin(self, done: int, doubt: DoubtFile | None) -> None:
        """After the resume. `doubt` is what an earlier generation has left of the steps that are done again. Raises
        FormatError where nobody can read it."""
        self._judge = Judge(
            self._env.integrity,
            rank=self._env.rank,
            shares=[Share(self._lmb, rank, self._env.world).sequences for rank in range(self._env.world)],
            groups=replica_groups(self._env.world, self._replicas),
            can_go_back=bool(self._env.checkpoint_root),
            exact=self._device.type == "cpu" or torch.are_deterministic_algorithms_enabled(),
            replay=self._replay(done, doubt) if doubt else None,
        )

    def start(self) -> None:
        """Before the backward pass."""
        if self._norm is not None:
            self._norm.start()

    def told(self, step: int, *, again: bool) -> Tensor:
        """What this rank tells the others of step `step` and of the state before it: of a sixteenth of that, but of all
        of it when the step is done again, since then it may be the state that is wrong."""
        own: list[Tensor] = []
        if self._norm is not None:
            own.append(self._norm.value().reshape(1))
        if self._digests is not None:
            own.append(halves(self._digests.whole() if again else self._digests.of(step - 1)))
        if not own:
            return torch.zeros(0, dtype=torch.float64, device=self._device)
        mine = torch.cat(own)
        places = torch.zeros((self._env.world, mine.numel()), dtype=torch.float64, device=self._device)
        places[self._env.rank] = mine
        return places.flatten()

    def rule(self, step: int, agreed: Agreed) -> Ruling:
        """What all ranks do with this attempt at a step."""
        assert self._judge is not None, "begin comes before the first step"
        numbers = self._numbers(step, agreed)
        self._recorded[step] = numbers.bits()
        self._recorded.pop(step - RECORDED, None)
        return self._judge.rule(numbers)

    def doubt(self, step: int, *, voted: bool) -> tuple[int, dict[str, Json]]:
        """When this generation ends because its numbers at `step` are wrong: the newest step that is still trusted,
        and what the next one compares with. `voted`: because replicas differ."""
        # A flip that stays is seen when its slice comes round: at the latest SLICES votes after, about the step before.
        trusted = step - 1 - (SLICES if self._digests is not None else 0)
        return max(trusted, 0), asdict(Recorded(voted, self._facts(), dict(self._recorded)))

    def _numbers(self, step: int, agreed: Agreed) -> Numbers:
        rows = [*zip(*[iter(agreed.told)] * self._width(), strict=True)] if agreed.told else []
        norms = tuple(row[0] for row in rows) if self._norm is not None else ()
        digests = tuple(row[-DIGEST_HALVES:] for row in rows) if self._digests is not None else ()
        return Numbers(step, agreed.loss, agreed.grad_norm, norms, digests)

    def _width(self) -> int:
        return (self._norm is not None) + DIGEST_HALVES * (self._digests is not None)

    def _replay(self, done: int, doubt: DoubtFile) -> Replay:
        recorded: Recorded = build(Recorded, doubt.numbers, f"the doubt of generation {doubt.generation}")
        self._recorded = {step: bits for step, bits in recorded.steps.items() if step <= done}
        exact = recorded.facts == self._facts()
        return Replay(None if recorded.voted else doubt.step, recorded.steps, done, exact)

    def _facts(self) -> dict[str, Json]:
        """What must be equal for equal bits."""
        return {
            "world": self._env.world,
            "replicas": self._replicas,
            "device": torch.cuda.get_device_name(self._device) if self._device.type == "cuda" else "cpu",
            "torch": torch.__version__,
        }
