"""One laboratory: its network, its coordinator, its agents. Warm agents serve many trials, each in a generation of its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Self

from bench.lab import cleaning
from bench.lab.calls import AGENT_TOKEN, OPERATOR_TOKEN, Line, Unreachable, Watcher
from bench.lab.network import COORDINATOR_ADDRESS, PREFIX, Network
from stormjib_fault import network, proc
from stormjib_fault.rank import Control
from stormjib_fault.words import FaultError
from stormjib_fault.world import Laboratory, Place, Traffic, World, find_ranks
from stormjib_runtime.coordinator import PORT
from stormjib_runtime.wire import Bounds, Env, JobPhase, JobState

if TYPE_CHECKING:
    from collections.abc import Callable

    from stormjib_runtime.wire import GenerationId

RANK = Path(__file__).with_name("rank.py")
START_S = 180.0
"""Eight times torch on a machine that others use too."""
FRESH_S = 60.0
SKEW_S = 3600
CALLS = {"dp": 5, "fsdp": 8, "pp": 5}
"""Collectives in a step."""
MOST_ROUNDS = 8
"""In longer rings the rounds of a call overlap, so that not each of them waits for a slow link."""
FIRST_STEPS = 3
"""A generation is up when it has made so many."""


@dataclass(frozen=True)
class Plan:
    """What a step is like; `plan.json` of the control folder."""

    pattern: str = "dp"
    """dp, fsdp or pp."""
    compute_s: float = 0.06
    floats: int = 3 * (1 << 15)
    """Elements of all buckets together."""

    def traffic(self, step_s: float, ranks: int) -> Traffic:
        """What faults of the network reckon with: a ring sends nearly everything twice, in 2 (ranks - 1) rounds a call."""
        size = 4 * (self.floats + (1 << 16))
        sent = size if self.pattern == "pp" else int(2 * size * (ranks - 1) / ranks)
        return Traffic(step_s, sent, rounds=CALLS[self.pattern] * min(2 * (ranks - 1), MOST_ROUNDS))


class Lab:
    """Use as a context manager. `skewed`: agents and ranks in odd slots live an hour ahead."""

    def __init__(self, nodes: int, *, processes: int = 1, skewed: bool = False) -> None:
        self.nodes, self.processes, self.skewed = nodes, processes, skewed
        self.name = f"{PREFIX}{os.getpid() % 100_000}{_letter()}"
        self.network = Network(self.name, nodes)
        self.folder = cleaning.root() / self.name
        self.control = Control(self.folder)
        self.plan = Plan()
        self._lock: int | None = None
        self._agents: dict[int, subprocess.Popen[bytes]] = {}
        self._coordinator: subprocess.Popen[bytes] | None = None
        self._watcher: Watcher | None = None
        self._line = Line(self.network.coordinator)
        slots = {str(slot): f"pod-{slot}" for slot in range(nodes)}
        self._bounds = Bounds(
            version=0,
            incarnation=1,
            spec_generation=1,
            replicas=nodes,
            min_replicas=nodes,
            processes=processes,
            slots=slots,
            restarts_left=1_000_000,
            backoff_initial_s=0.05,
            backoff_max_s=0.05,
        )

    # --- life -------------------------------------------------------------------------------------------------------

    def __enter__(self) -> Self:
        for name in cleaning.stale():
            cleaning.remove(name)
        self.folder.mkdir(mode=0o700)
        self._lock = cleaning.lock(self.folder)
        try:
            self._start()
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End and remove everything."""
        if self._watcher is not None:
            self._watcher.close()
        self._line.close()
        children = [*self._agents.values(), *([self._coordinator] if self._coordinator else [])]
        for child in children:
            child.kill()
        cleaning.remove(self.name)
        for child in children:
            child.wait()
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def _start(self) -> None:
        self.network.create()
        self.give_plan(self.plan)
        self.start_coordinator()
        for slot in range(self.nodes):
            self.start_agent(slot)
        self._watcher = Watcher(self.network.coordinator)
        everybody = range(self.nodes)
        self.watcher.until(lambda s: {a.slot for a in s.agents} >= set(everybody), START_S)
        self.watcher.until(_stepping(None), START_S)

    def start_coordinator(self) -> None:
        """Start it, or start it again where it left off, and give it its bounds."""
        if self._coordinator is not None:
            self._coordinator.wait()
        variables = {
            Env.JOB_UID: cleaning.job_uid(self.name),
            Env.INCARNATION: "1",
            Env.TOKEN: AGENT_TOKEN,
            Env.OPERATOR_TOKEN: OPERATOR_TOKEN,
            Env.RUN_DIR: str(self._folder("coordinator")),
        }
        argv = ["-m", "stormjib_runtime.coordinator", "--port", str(PORT)]
        self._coordinator = self._spawn(self.network.coordinator, argv, variables, "coordinator.log")
        self._put(FRESH_S)

    def start_agent(self, slot: int) -> None:
        """Start the agent of a slot, or its next life."""
        if slot in self._agents:
            self._agents[slot].wait()
        variables = {
            Env.COORDINATOR: f"http://{COORDINATOR_ADDRESS}:{PORT}",
            Env.TOKEN: AGENT_TOKEN,
            Env.JOB_UID: cleaning.job_uid(self.name),
            Env.SLOT: str(slot),
            Env.POD_UID: f"pod-{slot}",
            Env.POD_IP: self.network.address(slot),
            Env.PROCESSES: str(self.processes),
            Env.COMMAND: json.dumps([str(RANK), str(self.folder)]),
            Env.RUN_DIR: str(self._folder(f"agent-{slot}")),
            Env.GRACE_S: "1",
        }
        argv = ["-m", "stormjib_runtime.agent"]
        ahead = self.skewed and slot % 2 == 1
        name = self.network.node(slot)
        self._agents[slot] = self._spawn(name, argv, variables, f"agent-{slot}.log", ahead=ahead)

    def _spawn(
        self, netns: str, argv: list[str], variables: dict[Env, str], log: str, *, ahead: bool = False
    ) -> subprocess.Popen[bytes]:
        """A Python of ours in a namespace, with the same pid from beginning to end."""
        enter = ["nsenter", f"--net=/run/netns/{netns}"]
        clocks = ["unshare", "--time", "--monotonic", str(SKEW_S), "--boottime", str(SKEW_S)] if ahead else []
        env = {**os.environ, "GLOO_SOCKET_IFNAME": "eth0", **{str(k): v for k, v in variables.items()}}
        with open(self.folder / log, "ab") as file:
            return subprocess.Popen(
                [*enter, *clocks, sys.executable, *argv],
                env=env,
                stdout=file,
                stderr=file,
                stdin=subprocess.DEVNULL,
                start_new_session=True,  # Ctrl-C is for the laboratory, which ends them in order
            )

    def _folder(self, name: str) -> Path:
        path = self.folder / name
        path.mkdir(exist_ok=True)
        return path

    # --- what a trial needs -----------------------------------------------------------------------------------------

    @property
    def watcher(self) -> Watcher:
        """What the coordinator says."""
        if self._watcher is None:
            raise FaultError("the laboratory is not up")
        return self._watcher

    def state(self) -> JobState:
        """What the coordinator says now."""
        return self._line.state()

    def give_plan(self, plan: Plan) -> None:
        """What steps shall be like from the next generation on."""
        self.plan = plan
        fresh = self.folder / "plan.new"
        fresh.write_text(json.dumps(plan.__dict__))
        os.replace(fresh, self.folder / "plan.json")

    def fresh(self, before: Callable[[], None] = lambda: None) -> JobState:
        """A new generation on the same agents: every rank is forked anew. `before` runs while no rank lives."""
        self._change(suspend=True)
        self.watcher.until(lambda s: s.phase is JobPhase.SUSPENDED, FRESH_S)
        for slot in range(self.nodes):
            network.remove_all(self.network.node(slot))
        self.control.clear()
        for path in self.folder.glob("trace-*"):
            path.unlink(missing_ok=True)
        before()
        old = self.state().generation
        self._change(suspend=False)
        return self.watcher.until(_stepping(old.id if old else None), FRESH_S)

    def world(self, step_s: float) -> World:
        """The ranks as they are now, for faults."""
        places = []
        for slot, agent in self._agents.items():
            for rank, pid in find_ranks(proc.below(agent.pid)).items():
                node = self.network
                places.append(Place(rank, pid, slot, node.node(slot), node.address(slot), node.port(slot)))
        places.sort(key=lambda place: place.rank)
        if len(places) != self.nodes * self.processes:
            raise FaultError(f"ranks {[p.rank for p in places]} are up; wanted {self.nodes * self.processes}")
        return World(tuple(places), self.folder, self.plan.traffic(step_s, len(places)), self.inside())

    def inside(self) -> Laboratory:
        """What faults may touch beside ranks."""
        return Laboratory(
            prefix=self.name,
            switch=self.network.switch,
            agents={slot: agent.pid for slot, agent in self._agents.items()},
            coordinator=self._coordinator.pid if self._coordinator else 0,
            coordinator_address=COORDINATOR_ADDRESS,
            revive=self.revive,
        )

    def revive(self, what: str, slot: int) -> None:
        """Start what a fault has killed."""
        if what == "agent":
            self.start_agent(slot)
        else:
            self.start_coordinator()

    def _change(self, *, suspend: bool) -> None:
        self._bounds = replace(self._bounds, suspend=suspend)
        self._put(FRESH_S)

    def _put(self, limit_s: float) -> None:
        """Give the bounds, with the next version, as soon as the coordinator listens."""
        self._bounds = replace(self._bounds, version=self._bounds.version + 1)
        deadline = time.monotonic() + limit_s
        while True:
            try:
                self._line.put(self._bounds)
                return
            except Unreachable:
                if time.monotonic() > deadline:
                    raise
                time.sleep(0.02)


def _stepping(old: GenerationId | None) -> Callable[[JobState], bool]:
    """Whether a generation newer than `old` steps."""

    def holds(state: JobState) -> bool:
        now = state.generation
        newer = now is not None and (old is None or now.id > old)
        return newer and state.phase is JobPhase.RUNNING and state.step >= FIRST_STEPS

    return holds


_made = 0


def _letter() -> str:
    """Tells the laboratories of one process apart."""
    global _made
    _made += 1
    return chr(ord("a") + _made % 26)
