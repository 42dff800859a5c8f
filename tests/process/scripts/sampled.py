"""Steps of two sizes of all-reduce and a sleep, and does on a signal what a test asks for.

SIGUSR1: hold the GIL for good, between two collectives. SIGUSR2: a checkpoint of two seconds, said by its phase.
"""

import ctypes
import signal
import time

import torch
import torch.distributed as dist

from stormjib_health import probe
from stormjib_health.wire import Phase

wanted: list[str] = []
signal.signal(signal.SIGUSR1, lambda *_: wanted.append("hold"))
signal.signal(signal.SIGUSR2, lambda *_: wanted.append("save"))


def hold_the_gil() -> None:
    """PyDLL, unlike CDLL, keeps it during the call."""
    ctypes.PyDLL(None).sleep(60)


def save() -> None:
    with probe.phase(Phase.CHECKPOINT):
        time.sleep(2)


dist.init_process_group("gloo")
large, small = torch.ones(1 << 18), torch.ones(1)
weight = torch.nn.Parameter(torch.ones(1))
optimizer = torch.optim.SGD([weight], lr=0.1)
while True:
    time.sleep(0.05)
    dist.all_reduce(large)
    dist.all_reduce(small)
    weight.grad = torch.ones(1)
    optimizer.step()
    large.fill_(1)
    while wanted:
        {"hold": hold_the_gil, "save": save}[wanted.pop()]()
