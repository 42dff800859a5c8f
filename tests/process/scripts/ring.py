"""Joins, does one collective, says when; then steps until it is told to stop (or the given number of steps)."""

import json
import os
import sys
import time

import torch
import torch.distributed as dist

start = time.monotonic()
with open("/proc/self/stat") as stat:  # when this process began, in ticks since boot
    since_boot = int(stat.read().rpartition(")")[2].split()[19]) / os.sysconf("SC_CLK_TCK")
forked = start - (time.clock_gettime(time.CLOCK_BOOTTIME) - since_boot)
dist.init_process_group("gloo")
joined = time.monotonic()
x = torch.ones(1)
dist.all_reduce(x)
print(
    json.dumps(
        {
            "event": "collective",
            "at": time.monotonic(),
            "init_s": round(joined - start, 4),
            "start": start,
            "forked": forked,
            "generation": os.environ["STORMJIB_GENERATION"],
            "pages": os.environ["STORMJIB_PAGE_DIR"],
            "rank": dist.get_rank(),
            "pid": os.getpid(),
        }
    ),
    flush=True,
)
weight = torch.nn.Parameter(torch.ones(1))
optimizer = torch.optim.SGD([weight], lr=0.1)
steps = int(sys.argv[1]) if len(sys.argv) > 1 else 1_000_000
for step in range(1, steps + 1):
    time.sleep(0.02)
    dist.all_reduce(x)
    weight.grad = torch.ones(1)
    optimizer.step()
    if step % 20 == 0:
        print(json.dumps({"step": step}), flush=True)
dist.destroy_process_group()
