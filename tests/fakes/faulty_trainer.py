"""The trainer with one fault in its numbers: a rank that flips a bit, makes a NaN, or reads other samples.

Run as a module like `stormjib_trainer`; FAULT in the environment is JSON of a `Fault`. The rank says on its own output
what it has done, so that a test sees that the fault fired.
"""

from __future__ import annotations

import json
import os
import sys
import time
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

import torch

from stormjib_checkpoint.files import Posix
from stormjib_trainer import __main__ as program
from stormjib_trainer import loop

if TYPE_CHECKING:
    from stormjib_health.integrity.judge import Act
    from stormjib_trainer.step import Agreed

DISK_S = 0.05
SIGN, TOP, MIDDLE, THIRD, LOW = 31, 30, 16, 2, 0
"""Bits of a float32: its sign, the highest of its exponent, and of its mantissa one in the middle, the lowest but two and the
lowest. (The lowest of a gradient is mostly rounded away before it reaches the state, and that of a moment where the step takes it
past a power of two; then it does no harm.)"""


@dataclass(frozen=True)
class Fault:
    """What goes wrong, on which rank, at which step."""

    rank: int
    step: int
    where: str
    """`weight`, `exp_avg`, `exp_avg_sq`: in the state, before the step; `own`: in the gradient of an activation, so in
    this rank's own gradient; `mixed`: in the gradient after mixing; `nan`: as `own`, not a flip; `data`: the samples;
    `disk`: in no step, but its disk takes DISK_S for each sync."""
    bit: int = LOW
    place: float = 0.5
    """Which element, as a share of them."""
    again: bool = False
    """Also when the step is done again."""

    def env(self) -> dict[str, str]:
        """For the ranks."""
        return {"FAULT": json.dumps(asdict(self))}


def flip(flat: torch.Tensor, bit: int, place: float) -> None:
    """Flip one bit of one element, and say so. The element is the next one from `place` on that is not zero."""
    start = int(place * flat.numel())
    order = torch.cat((torch.arange(start, flat.numel()), torch.arange(start)))
    index = int(next((i for i in order.tolist() if flat[i] != 0), start))
    before = float(flat[index])
    flat.view(torch.int32)[index] ^= -(1 << 31) if bit == SIGN else 1 << bit
    print(json.dumps({"fault": "flip", "from": before, "to": str(float(flat[index]))}), flush=True)


class Faulty(loop.Run):
    """One rank of one generation, with the fault that FAULT says, if it is this rank's."""

    fault: Fault | None = None

    def attempt(self, step: int, windows: torch.Tensor, *, again: bool = False) -> tuple[Agreed, Act]:
        fault = self.fault
        if fault is not None and (fault.rank, fault.step) == (self.env.rank, step) and again <= fault.again:
            windows = self.go_wrong(fault, step, windows)
        return super().attempt(step, windows, again=again)

    def go_wrong(self, fault: Fault, step: int, windows: torch.Tensor) -> torch.Tensor:
        """Do it, or see to it that it is done in this attempt; the samples to take."""
        if fault.where == "data":
            print(json.dumps({"fault": "data"}), flush=True)
            return torch.randint(256, windows.shape, generator=torch.Generator().manual_seed(step))
        if fault.where == "mixed":
            self.after_mixing(fault)
        elif fault.where in ("own", "nan"):
            self.before_mixing(fault)
        else:
            index = ("weight", "exp_avg", "exp_avg_sq").index(fault.where)
            with torch.no_grad():
                flip(largest(self.optimizer.tensors()[index::3]).view(-1), fault.bit, fault.place)
        return windows

    def before_mixing(self, fault: Fault) -> None:
        """Wrong in the gradient that comes back into the last norm's output, once."""

        def wrong(gradient: torch.Tensor) -> torch.Tensor:
            gradient = gradient.clone()
            if fault.where == "nan":
                gradient.view(-1)[0] = torch.nan
                print(json.dumps({"fault": "nan"}), flush=True)
            else:
                flip(gradient.view(-1), fault.bit, fault.place)
            return gradient

        def forward(module: torch.nn.Module, given: object, output: torch.Tensor) -> None:
            hook.remove()
            output.register_hook(wrong)  # type: ignore[no-untyped-call]

        hook = self.model.norm.register_forward_hook(forward)

    def after_mixing(self, fault: Fault) -> None:
        """Wrong in the largest of this rank's gradients, as the optimizer gets it, once."""
        take = self.optimizer.gradients

        def gradients() -> list[torch.Tensor]:
            self.optimizer.gradients = take  # type: ignore[method-assign]
            taken = take()
            flip(largest(taken).view(-1), fault.bit, fault.place)
            return taken

        self.optimizer.gradients = gradients  # type: ignore[method-assign]


def slow_disk(rank: int) -> None:
    """From now on, if this is the rank."""
    if os.environ["RANK"] != str(rank):
        return
    print(json.dumps({"fault": "disk"}), flush=True)
    sync = Posix.sync

    def late(self: Posix, descriptor: int) -> None:
        time.sleep(DISK_S)  # as a disk takes it: this is the fault, and nothing waits for it to be over
        sync(self, descriptor)

    Posix.sync = late  # type: ignore[method-assign]


def largest(tensors: list[torch.Tensor]) -> torch.Tensor:
    """The one with the most elements."""
    return max(tensors, key=torch.Tensor.numel)


def main() -> None:
    """Run one rank."""
    given = os.environ.get("FAULT")
    Faulty.fault = Fault(**json.loads(given)) if given else None
    if Faulty.fault is not None and Faulty.fault.where == "disk":
        slow_disk(Faulty.fault.rank)
    loop.Run = Faulty  # type: ignore[misc]
    sys.exit(program.main())


if __name__ == "__main__":
    main()
