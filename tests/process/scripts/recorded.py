"""A plain script that knows nothing of the probe: a group, a subgroup, three steps; then it holds the GIL."""

import ctypes
import sys
from typing import Any

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import HashStore

dist.init_process_group("gloo", store=HashStore(), rank=0, world_size=1)
model = torch.nn.Linear(2, 2)
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
for _ in range(3):
    model(torch.ones(2)).sum().backward()
    for parameter in model.parameters():
        gradient: Any = parameter.grad
        dist.all_reduce(gradient)
    optimizer.step()
group: Any = dist.new_group([0])
dist.barrier(group)


def stuck() -> None:
    """As a deadlock in a C extension."""
    print("stuck", flush=True)
    while True:
        ctypes.PyDLL(None).sleep(600)


if "stuck" in sys.argv:
    stuck()
