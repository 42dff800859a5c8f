"""One collective, said in one line; then it waits to be killed."""

import os
import signal

import torch
import torch.distributed as dist

dist.init_process_group("gloo")
one = torch.ones(1)
dist.all_reduce(one)
attempt = os.environ["TORCHELASTIC_RESTART_COUNT"]
print(f"worker {dist.get_rank()} of {int(one)}, pid {os.getpid()}, attempt {attempt}", flush=True)
signal.pause()
