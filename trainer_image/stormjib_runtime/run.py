"""`stormjib-run`: torchrun's command line on one machine, without Kubernetes: coordinator and agent in one process.

The ranks' environment is torchrun's, so a script moves over by changing one word. What is not taken is refused by name.
"""

from __future__ import annotations

import asyncio
import json
import os
import signal
import sys
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from stormjib_runtime import codec
from stormjib_runtime.agent import EXIT_BAD_COMMAND, Agent
from stormjib_runtime.coordinator import Coordinator, Stopped
from stormjib_runtime.coordinator import Settings as CoordinatorSettings
from stormjib_runtime.environment import visible_gpus
from stormjib_runtime.errors import CommandError
from stormjib_runtime.http import Client, HttpError
from stormjib_runtime.settings import Launcher, Settings
from stormjib_runtime.wire import INTERVAL_AUTO, Bounds, Env, GenerationId, JobPhase, JobState

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

USAGE = """\
usage: stormjib-run [--standalone] [--nproc-per-node N] [--max-restarts N] [-m | --no-python] program [arguments]

Runs a program as torchrun does, on this machine: the same environment, one process per rank. When a rank dies, all are
forked again from a warm process, in a fraction of a second.

  --nproc-per-node N   ranks: a number, or gpu, cpu, auto (GPUs where there are some); default 1
  --max-restarts N     how often ranks may be restarted; default 3
  --standalone         one machine; it is the default here
  -m, --module         program is a module
  --no-python          program is no Python script
"""

_ELSEWHERE = {
    "--nnodes": "one machine only; for several, apply a TrainingJob with spec.nodes.replicas",
    "--node-rank": "one machine only; in a TrainingJob the coordinator gives node ranks",
    "--master-addr": "the store's address is given to ranks as MASTER_ADDR",
    "--master-port": "the store's port is chosen by the kernel",
    "--rdzv-backend": "there is no rendezvous to set up",
    "--rdzv-endpoint": "there is no rendezvous to set up",
    "--rdzv-id": "there is no rendezvous to set up",
    "--rdzv-conf": "there is no rendezvous to set up",
    "--monitor-interval": "an exit is seen at once, not by looking now and then",
    "--start-method": "ranks are forked from a warm process, or executed where that is not possible",
}
EXIT_FAILED = 1
EXIT_TERMINATED = 128 + signal.SIGTERM
UID = "standalone"


@dataclass(frozen=True)
class Options:
    """The command line, taken apart."""

    processes: str = "1"
    max_restarts: int = 3
    words: tuple[str, ...] = ()
    """What follows our own flags: a program with its arguments, with -m or --no-python before it."""
    help: bool = False


def parse(arguments: Sequence[str]) -> Options:
    """Read torchrun's words. Raises CommandError that names a flag that is not taken, and says what to do instead."""
    options, words, rest = Options(), [], list(arguments)
    while rest and rest[0].startswith("-"):
        flag, equals, value = rest.pop(0).partition("=")
        name = flag.replace("_", "-") if flag.startswith("--") else flag
        match name:
            case "-h" | "--help":
                return Options(help=True)
            case "-m" | "--module" | "--no-python" if not equals:
                words.append("-m" if name != "--no-python" else name)
            case "--standalone" if not equals:
                pass
            case "--nproc-per-node":
                options = replace(options, processes=value if equals else _next(rest, flag))
            case "--max-restarts":
                options = replace(
                    options, max_restarts=_whole(flag, value if equals else _next(rest, flag), least=0)
                )
            case _:
                raise CommandError(f"{flag} is not taken: {_ELSEWHERE.get(name, 'see --help for what is')}")
    if not rest:
        raise CommandError("no program given; see --help")
    return replace(options, words=(*words, *rest))


def _next(rest: list[str], flag: str) -> str:
    if not rest:
        raise CommandError(f"{flag} needs a value")
    return rest.pop(0)


def _whole(flag: str, value: str, least: int) -> int:
    if not (value.isascii() and value.isdecimal() and int(value) >= least):
        raise CommandError(f"{flag} is {value!r}; wanted a number of at least {least}")
    return int(value)


def _variable(environ: Mapping[str, str], name: Env, default: str) -> int:
    return _whole(name.value, environ.get(name) or default, least=0)


def _interval(environ: Mapping[str, str]) -> int:
    """Steps between saves; 0 where no number of steps is wanted."""
    if environ.get(Env.CHECKPOINT_INTERVAL) == INTERVAL_AUTO:
        return 0
    return _variable(environ, Env.CHECKPOINT_INTERVAL, default="0")


def processes(wanted: str, gpus: int, cpus: int) -> int:
    """How many ranks `--nproc-per-node` means on this machine."""
    match wanted:
        case "gpu":
            if not gpus:
                raise CommandError("--nproc-per-node is gpu, and this machine shows none")
            return gpus
        case "cpu":
            return cpus
        case "auto":
            return gpus or cpus
        case _:
            return _whole("--nproc-per-node", wanted, least=1)


class Standalone:
    """The operator's part for one job on one machine: bounds, and what the end means."""

    def __init__(self, options: Options, environ: Mapping[str, str], run_dir: Path) -> None:
        self._environ = environ
        self._run_dir = run_dir
        self._job = os.urandom(8).hex()
        self._tokens = os.urandom(16).hex(), os.urandom(16).hex()
        self._words = options.words
        self._bounds = Bounds(
            version=1,
            incarnation=1,
            spec_generation=1,
            replicas=1,
            min_replicas=1,
            processes=processes(options.processes, visible_gpus(environ), len(os.sched_getaffinity(0))),
            slots={"0": UID},
            restarts_left=options.max_restarts,
            interval_steps=_interval(environ),
            keep_last=_variable(environ, Env.CHECKPOINT_KEEP, default="3"),
        )

    async def run(self) -> int:
        """Run the job to its end; its exit code."""
        token, operator_token = self._tokens
        coordinator = Coordinator(
            CoordinatorSettings(self._job, 1, token, operator_token, self._run_dir, "127.0.0.1", 0),
            log=_quiet,
        )
        try:
            port = await coordinator.start()
            coordinator.put_bounds(self._bounds)
            return await self._run_agent(coordinator, port)
        finally:
            await coordinator.close()

    async def _run_agent(self, coordinator: Coordinator, port: int) -> int:
        environ = self._agent_environment(port)
        agent = Agent(Settings.from_env(environ), environ)
        asyncio.get_running_loop().add_signal_handler(signal.SIGINT, agent.interrupt)
        watch = asyncio.create_task(self._watch(coordinator, port, agent.outputs.say))
        watch.add_done_callback(lambda _: _stop_on_error(watch, agent))
        code = await agent.run()
        watch.cancel()
        if code:
            return code
        if coordinator.job.phase is JobPhase.COMPLETE:
            return 0
        return EXIT_TERMINATED if agent.leaving else shell_code(agent.failed_exit) or EXIT_FAILED

    def _agent_environment(self, port: int) -> dict[str, str]:
        return {
            **self._environ,
            Env.COORDINATOR.value: f"http://127.0.0.1:{port}",
            Env.TOKEN.value: self._tokens[0],
            Env.JOB_UID.value: self._job,
            Env.SLOT.value: "0",
            Env.POD_UID.value: UID,
            Env.POD_IP.value: "127.0.0.1",
            Env.PROCESSES.value: str(self._bounds.processes),
            Env.LAUNCHER.value: Launcher.STORMJIB.value,
            Env.COMMAND.value: json.dumps(self._words),
            Env.RUN_DIR.value: str(self._run_dir),
        }

    async def _watch(self, coordinator: Coordinator, port: int, say: Callable[[str], None]) -> None:
        """Do what the operator does: raise the incarnation above a predecessor's, end the job when it is over."""
        client = Client("127.0.0.1", port, token=self._tokens[1])
        version = 0
        while True:
            response = await client.request("GET", f"/v1/state?after={version}", timeout_s=10)
            state = codec.decode(JobState, response.body)
            version = state.version
            if state.phase in (JobPhase.COMPLETE, JobPhase.EXHAUSTED):
                if state.phase is JobPhase.EXHAUSTED:
                    say(_why(state))
                self._put(coordinator, finish=True)
                return
            found = state.storage
            if state.generation is None and found is not None and found.generation >= _first(state):
                self._put(coordinator, incarnation=found.generation.incarnation + 1)

    def _put(self, coordinator: Coordinator, **changes: object) -> None:
        self._bounds = replace(self._bounds, version=self._bounds.version + 1, **changes)  # type: ignore[arg-type]
        coordinator.put_bounds(self._bounds)


def _first(state: JobState) -> GenerationId:
    """The generation that this job would begin with: what the storage holds must be below it."""
    return GenerationId(state.incarnation, 1)


def _why(state: JobState) -> str:
    fault = state.last_fault
    if fault is None:
        return "no restarts are left"
    rank = "" if fault.rank is None else f" of rank {fault.rank}"
    return f"no restarts are left; the last fault was {fault.cause.value}{rank}: {fault.message}"


def shell_code(code: int) -> int:
    """An exit code as a shell gives it: 128 + the signal for a process that a signal ended."""
    return 128 - code if code < 0 else code


def _stop_on_error(watch: asyncio.Task[None], agent: Agent) -> None:
    """Nobody would end the job any more."""
    if not watch.cancelled() and watch.exception() is not None:
        agent.stop(EXIT_FAILED)


def _quiet(line: str) -> None:
    """The coordinator's log: here the agent says the same."""


async def _serve(options: Options, run_dir: Path) -> int:
    return await Standalone(options, os.environ, run_dir).run()


def main() -> None:
    """Entry point of `stormjib-run`."""
    try:
        options = parse(sys.argv[1:])
        if options.help:
            print(USAGE, end="")
            return
        with tempfile.TemporaryDirectory(prefix="stormjib-") as run_dir:
            code = asyncio.run(_serve(options, Path(run_dir)))
    except (CommandError, Stopped, HttpError) as error:
        print(f"stormjib-run: {error}", file=sys.stderr)
        code = EXIT_BAD_COMMAND
    sys.exit(code)


if __name__ == "__main__":
    main()
