"""Saves one step after the other: `ROOT STEPS` ends right after the last call without waiting for it; `ROOT STEPS SECONDS MEMORY` is ended
by the kernel after so long, wherever it is, and stages in MEMORY where that is not empty."""

from __future__ import annotations

import signal
import sys

import torch

from stormjib_checkpoint.engine import Engine

root, steps = sys.argv[1], int(sys.argv[2])
if len(sys.argv) > 3:
    signal.setitimer(signal.ITIMER_REAL, float(sys.argv[3]))  # nothing handles it: as abrupt as SIGKILL
engine = Engine(root, memory=sys.argv[4] if len(sys.argv) > 4 else "")
table: torch.Tensor = torch.nn.Parameter(torch.zeros(3_000_000))
optimizer = torch.optim.SGD([table], lr=1.0)
state: dict[str, torch.Tensor] = {"table": table}
engine.load(state)
begin = int(table[0].item())
for step in range(begin + 1, begin + 1 + steps):
    table.grad = -torch.ones_like(table)
    optimizer.step()
    engine.async_save(state, step=step, train={"step": step})
