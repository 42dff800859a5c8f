"""The agent: PID 1 of a slot's pod. It starts and ends ranks as the coordinator orders, and reports all it sees.

A thin shell: `agent_core.decide` says what to do, `runner` does it. Nothing here blocks, so that the agent answers while
a rank hangs, holds the GIL or is stopped.
"""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from collections import deque
from typing import TYPE_CHECKING

from stormjib_runtime.agent_core import Act, Me, Stage, accepts, decide, phase
from stormjib_runtime.checkpoint_child import CheckpointChild
from stormjib_runtime.checks import Checks
from stormjib_runtime.children import Children
from stormjib_runtime.copies import Copies, this_node
from stormjib_runtime.environment import base_environment, visible_gpus
from stormjib_runtime.errors import CheckpointError, CommandError
from stormjib_runtime.fitness import Fitness
from stormjib_runtime.launching import Launching
from stormjib_runtime.link import Link
from stormjib_runtime.output import Outputs
from stormjib_runtime.processes import (
    become_subreaper,
    end_descendants,
    leftovers,
    remove_files,
    shared_memory_files,
)
from stormjib_runtime.ranks import remove_tree
from stormjib_runtime.runner import Runner
from stormjib_runtime.sampling import Place, Sampling
from stormjib_runtime.settings import Launcher, Settings
from stormjib_runtime.wire import PROTOCOL, Do, Env, Report

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from stormjib_runtime.wire import Order, StorageFinding

SCAN_S = 20.0
"""How long registering waits for the storage: a claim that hangs must not hide the agent."""
EVENTS_KEPT = 16
GRACE_MARGIN_S = 5.0
"""Before the kubelet's SIGKILL there must be time to end ranks and to say so."""
INTERRUPT_S = 5.0
EXIT_BAD_COMMAND = 2
EXIT_INTERRUPTED = 130


class Agent:
    """One agent, from its start to its exit. Make it inside a running event loop."""

    def __init__(self, settings: Settings, environ: Mapping[str, str]) -> None:
        self.settings = settings
        self.keep: set[int] = set()
        """Children that belong to no generation, beside the agent's own."""
        self._loop = asyncio.get_running_loop()
        self._me = Me(settings.slot, next_agent_number(settings.run_dir), settings.pod_uid)
        self._wake = asyncio.Event()
        self._events: deque[str] = deque(maxlen=EVENTS_KEPT)
        self._order: Order | None = None
        self._obeyed = self._incarnation = 0
        self._storage: StorageFinding | None = None
        self._heard: Report | None = None
        self._leaving = False
        self._exit: int | None = None
        self._interrupts = 0
        self._node = this_node()
        self._said = ""
        env = base_environment(environ)
        self.outputs = Outputs(self._loop)
        self.children = Children(self._loop, self._orphan)
        self._child = self._checkpoint_child(env)
        if self._child is not None:
            env[Env.MEMORY_DIR] = str(settings.memory)
        wanted = settings.peers and self._child is not None
        self._copies = Copies(self.children, settings, env, self.outputs, self.event) if wanted else None
        self._launching = Launching(self.children, self.outputs, env, self._changed, self.event)
        self.checks = Checks(
            self._launching.launch,
            self.outputs,
            settings.token,
            settings.address,
            visible_gpus(environ),
            lambda: self._runner.states(),
        )
        """What this agent can measure, and where others measure against it."""
        sampling = Sampling(
            settings.coordinator,
            settings.token,
            Place(settings.job_uid, self._me.slot, self._me.agent),
            self.outputs.say,
            self.checks.run,
            lambda: self.checks.address,
        )
        self._runner = Runner(
            settings,
            self._me,
            self._launching,
            self._child,
            self._copies,
            sampling,
            self.outputs,
            self._changed,
            self.event,
        )
        self._fitness = Fitness(
            settings.preflight,
            self._launching,
            self.outputs,
            self._changed,
            self.event,
            settings.token,
            lambda: () if self._order is None else self._order.peers,
        )
        self._link = Link(settings.coordinator, settings.token, self.report, self._take, self.outputs.say)

    async def run(self) -> int:
        """Serve until ordered to finish, or until a planned leave is done; the exit code."""
        become_subreaper()
        self._clear_former_life()
        self._loop.add_signal_handler(signal.SIGTERM, self.leave)
        self._start_launching()
        preflight = self._loop.create_task(self._fitness.find_out())
        preflight.add_done_callback(lambda done: done.cancelled() or done.result())  # a bug there is shown
        await self._listen()
        await self._scan()
        link = self._loop.create_task(self._link.run())
        link.add_done_callback(lambda _: self._wake.set())
        try:
            while self._exit is None and not link.done():
                await self._wake.wait()
                self._wake.clear()
                await self._converge()
            if link.done():
                link.result()  # it never ends by itself: a bug there is one here
        finally:
            link.cancel()
            preflight.cancel()
            await self._close()
        return self._exit or 0

    def leave(self) -> None:
        """SIGTERM: a planned leave. Goes on until the coordinator has arranged it, or the grace period is nearly over."""
        if self._leaving:
            return
        self._leaving = True
        self.outputs.say("SIGTERM: leaving as planned")
        grace = self.settings.grace_s
        if self._order is None:
            self.stop(0)  # nobody has ever told us to run anything
        self._loop.call_later(grace - min(GRACE_MARGIN_S, grace / 4), self.stop, 0)
        self._changed()

    def stop(self, code: int) -> None:
        """End everything at once, and exit with `code`."""
        if self._exit is None:
            self._exit = code
        self._wake.set()

    def interrupt(self) -> None:
        """Ctrl-C: the ranks get it too and a moment to end by themselves; the second time they do not."""
        self._interrupts += 1
        self.stop(EXIT_INTERRUPTED)
        if self._interrupts > 1:
            self._runner.hurry()

    def event(self, text: str) -> None:
        """A short fact for people: in the log, and on its way to the operator."""
        if text not in self._events:
            self._events.append(text)
            self.outputs.say(text)
        self._changed()

    @property
    def leaving(self) -> bool:
        """SIGTERM came."""
        return self._leaving

    @property
    def failed_exit(self) -> int:
        """Exit code of the first rank that failed in the newest generation where one did; 0 when none did."""
        return self._runner.failed_exit

    def report(self) -> Report:
        """All that this agent knows."""
        runner = self._runner
        return Report(
            protocol=PROTOCOL,
            job_uid=self.settings.job_uid,
            incarnation=self._incarnation,
            slot=self._me.slot,
            agent=self._me.agent,
            pod_uid=self._me.pod_uid,
            address=self.settings.address,
            processes=self.settings.processes,
            phase=phase(runner.held, self._launching.ready and self._fitness.fit),
            order_version=self._obeyed,
            generation=None if runner.held.stage is Stage.PREPARING else runner.held.generation,
            store=runner.store,
            resume=runner.resume,
            ranks=runner.states(),
            committed=runner.committed,
            saving=runner.saving,
            storage=self._storage,
            leaving=self._leaving,
            preflight=self._fitness.why,
            measures=self.checks.address,
            copies="" if self._copies is None else self._copies.address,
            node="" if self._copies is None else self._node,
            copied=-1 if self._copies is None else self._copies.copied,
            error=runner.error,
            events=tuple(self._events),
        )

    def _take(self, order: Order, report: Report | None) -> None:
        """An order came, perhaps as the answer to a report."""
        self._heard = report or self._heard
        if accepts(order, self._incarnation, -1 if self._order is None else self._order.version):
            self._order = order
            self._incarnation = order.incarnation
        self._wake.set()

    async def _converge(self) -> None:
        """Do what the newest order asks for, as far as it is not done."""
        self._runner.look()
        order = self._order
        if order is None or self._exit is not None:
            return
        for act in decide(self._me, self._runner.held, order, self._heard):
            await self._perform(act, order)
        if order.generation is not None and order.generation.id == self._runner.held.id:
            self._runner.announce(order)
        self._obeyed = order.version
        self._say(order)

    async def _perform(self, act: Act, order: Order) -> None:
        match act:
            case Act.END:
                await self._runner.end(self._kept())
            case Act.PREPARE:
                self._runner.prepare(order)
            case Act.START:
                self._runner.start(order)
            case Act.STOP:
                self._runner.stop(order)
            case Act.SETTLE:
                self._runner.settle(order)
            case Act.EXIT:
                self.stop(0)

    def _say(self, order: Order) -> None:
        """One line whenever an order changes what runs here."""
        generation = order.generation
        text = order.do.value
        if generation is not None and order.do is not Do.WAIT:
            resume = "" if order.resume is None else f", resumes from step {order.resume.step}"
            text = f"{text} {generation.id} ({generation.cause.value}): {generation.world_size} ranks{resume}"
        if text != self._said:
            self._said = text
            self.outputs.say(f"order: {text}")

    def _clear_former_life(self) -> None:
        """A container that was killed could not clean up, and /dev/shm may be a volume that outlives it."""
        remove_tree(self.settings.pages)
        remove_files(leftovers((), shared_memory_files(), (), alone=os.getpid() == 1))

    def _changed(self) -> None:
        """Something is worth another look, and a report."""
        self._wake.set()
        self._link.changed()

    def _orphan(self, pid: int, status: int) -> None:
        self._launching.orphaned(pid, status)

    def _kept(self) -> set[int]:
        ours = (self._child, self._copies)
        return {*self.keep, *(one.pid for one in ours if one is not None)}

    def _checkpoint_child(self, env: Mapping[str, str]) -> CheckpointChild | None:
        """Under torchrun the script commits by itself, as it would without us: torchrun restarts it behind our back."""
        if not self.settings.checkpoint_root or self.settings.launcher is Launcher.TORCHRUN:
            return None
        return CheckpointChild(self.children, self.settings.checkpoint_root, env, self.outputs)

    def _start_launching(self) -> None:
        if self.settings.launcher is Launcher.TORCHRUN:
            self._launching.cold("")
        elif not self.settings.command.python:
            self._launching.cold(f"{self.settings.command.program} is not Python")
        else:
            self._launching.warm()

    async def _listen(self) -> None:
        """Let other agents measure the path to this one, and give it copies."""
        if self._copies is not None:
            await self._copies.start()
        try:
            await self.checks.start()
        except OSError as error:
            self.event(f"MeasuringServerFailed: {error}")

    async def _scan(self) -> None:
        """What the storage holds already, before the first report: a predecessor's generations may be above ours.

        First what ranks of this container's life before had staged gets there: a container that is killed takes its ranks along.
        """
        if self._child is None:
            return
        await self._runner.adopt()
        try:
            async with asyncio.timeout(SCAN_S):
                self._storage = await self._child.scan()
        except (CheckpointError, OSError) as error:
            self.event(f"StorageScanFailed: {error}")
        except TimeoutError:
            self.event(f"StorageScanFailed: no answer from {self.settings.checkpoint_root} in {SCAN_S:.0f} s")

    async def _close(self) -> None:
        if self._interrupts == 1:
            await self._runner.interrupt(INTERRUPT_S)
        await self._runner.end(self._kept())
        remove_tree(self.settings.memory)
        self._link.close()
        await self.checks.close()
        self._launching.close()
        for one in (self._child, self._copies):
            if one is not None:
                one.close()
        await end_descendants(os.getpid(), lambda: self.keep)
        remove_tree(self.settings.copies)
        self.outputs.drain()


def next_agent_number(run_dir: Path) -> int:
    """Number of this life of the slot: one more than the last, kept where it outlives the container."""
    run_dir.mkdir(parents=True, exist_ok=True)
    path, fresh = run_dir / "agent", run_dir / "agent.new"
    number = int(path.read_text()) + 1 if path.exists() else 1
    with open(fresh, "w") as file:
        file.write(str(number))
        file.flush()
        os.fsync(file.fileno())
    os.replace(fresh, path)
    return number


async def _serve() -> int:
    return await Agent(Settings.from_env(), os.environ).run()


def main() -> None:
    """Entry point: everything comes from the environment."""
    try:
        code = asyncio.run(_serve())
    except CommandError as error:
        print(f"stormjib: {error}", file=sys.stderr)
        code = EXIT_BAD_COMMAND
    sys.exit(code)


if __name__ == "__main__":
    main()
