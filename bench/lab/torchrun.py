"""Stock torchrun on two nodes of a laboratory's network, with the same ranks and the same fault: how long until it notices?"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

from bench.lab import cleaning, traces
from bench.lab.lab import RANK, Plan
from bench.lab.network import COORDINATOR_ADDRESS, PREFIX, Network
from stormjib_fault import catalogue, proc
from stormjib_fault.rank import Control
from stormjib_fault.words import FaultError, NotFired
from stormjib_fault.world import Laboratory, Place, World, find_ranks

if TYPE_CHECKING:
    from pathlib import Path

    from stormjib_fault.words import Draw

NODES = 2
CAP_S = 60.0
START_S = 120.0
STEPS = 40
PORT = 29400


@dataclass(frozen=True)
class Noticed:
    """When the first torchrun ended, which is how it says that something is wrong; CAP_S when none did."""

    fault: str
    row: str
    after_s: float
    proof: str


def measure(draw: Draw) -> Noticed:
    """Train, inject, wait. Raises FaultError where torchrun does not start."""
    network = Network(f"{PREFIX}{os.getpid() % 100_000}r", NODES)
    folder = cleaning.root() / network.name
    folder.mkdir(mode=0o700)
    held = cleaning.lock(folder)
    runs: list[subprocess.Popen[bytes]] = []
    try:
        network.create()
        (folder / "plan.json").write_text(json.dumps(Plan().__dict__))
        runs += [_start(network, folder, slot) for slot in range(NODES)]
        world = _stepping(network, folder, runs)
        return _notice(world, draw, runs)
    finally:
        cleaning.remove(network.name)
        for run in runs:
            run.wait()
        if held is not None:
            os.close(held)


def _start(network: Network, folder: Path, slot: int) -> subprocess.Popen[bytes]:
    flags = ["--nnodes", str(NODES), "--node-rank", str(slot), "--nproc-per-node", "1", "--max-restarts", "0"]
    flags += ["--master-addr", network.address(0), "--master-port", str(PORT)]
    argv = [sys.executable, "-m", "torch.distributed.run", *flags, str(RANK), str(folder)]
    env = {**os.environ, "GLOO_SOCKET_IFNAME": "eth0", "OMP_NUM_THREADS": "1"}
    with open(folder / f"torchrun-{slot}.log", "ab") as log:
        enter = ["nsenter", f"--net=/run/netns/{network.node(slot)}"]
        return subprocess.Popen([*enter, *argv], env=env, stdout=log, stderr=log, stdin=subprocess.DEVNULL)


def _stepping(network: Network, folder: Path, runs: list[subprocess.Popen[bytes]]) -> World:
    """The world once rank 0 has made STEPS steps."""
    deadline = time.monotonic() + START_S
    while time.monotonic() < deadline:
        places = [
            Place(rank, pid, slot, network.node(slot), network.address(slot), network.port(slot))
            for slot, run in enumerate(runs)
            for rank, pid in find_ranks(proc.below(run.pid)).items()
        ]
        trace = traces.read(folder, {place.rank: place.pid for place in places}, 0.0)
        if len(places) == NODES and len(trace[0]) >= STEPS:
            step_s = traces.median_step(trace, 0.0, float("inf"))
            agents = {slot: run.pid for slot, run in enumerate(runs)}
            # torchrun has no coordinator of ours; what stands for one is the first agent.
            lab = Laboratory(network.name, network.switch, agents, runs[0].pid, COORDINATOR_ADDRESS, _nothing)
            return World(tuple(places), folder, Plan().traffic(step_s, NODES), lab)
        time.sleep(0.1)
    raise FaultError(f"torchrun did not step in {START_S:.0f} s; see {folder}")


def _nothing(what: str, slot: int) -> None:
    """Nobody restarts what torchrun lost."""


def _notice(world: World, draw: Draw, runs: list[subprocess.Popen[bytes]]) -> Noticed:
    fault = catalogue.make(world, draw)
    fault.arm()
    began = time.monotonic()
    try:
        fault.inject()
        ended = _first_end(runs, began)
        try:
            proof = fault.prove()
        except NotFired:
            proof = ""
    finally:
        fault.heal()
        if world.control is not None:
            Control(world.control).clear()
    return Noticed(draw.fault, fault.row, round(ended, 3), proof[:200])


def _first_end(runs: list[subprocess.Popen[bytes]], began: float) -> float:
    while (passed := time.monotonic() - began) < CAP_S:
        if any(run.poll() is not None for run in runs):
            return passed
        time.sleep(0.01)
    return CAP_S
