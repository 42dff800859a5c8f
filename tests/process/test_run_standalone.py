"""`stormjib-run` end to end: its own coordinator and agent, real ranks, faults from outside."""

from __future__ import annotations

import asyncio
import os
import re
import signal
import subprocess
import time
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from fakes.agents import SCRIPTS, comm, until
from fakes.runs import PROGRAM, START_S, TINY, Run
from stormjib_health.sampler.proc import descendants
from stormjib_runtime.http import HttpError, request

if TYPE_CHECKING:
    from collections.abc import Iterator

pytestmark = pytest.mark.timeout(150)


@pytest.fixture
def runs() -> Iterator[list[Run]]:
    made: list[Run] = []
    yield made
    for run in made:
        run.close()


async def test_a_job_goes_on_through_a_kill_and_a_freeze(runs: list[Run], tmp_path: Path) -> None:
    run = Run(tmp_path, "--standalone", "--nproc-per-node", "2", str(SCRIPTS / "ring.py"), "120")
    runs.append(run)
    pids = await run.joined("1.1")
    await until(lambda: '"step": 40' in run.out)  # it has got somewhere: the restart is immediate
    killed = time.monotonic()
    os.kill(pids[1], signal.SIGKILL)
    await run.joined("1.2")
    seconds = max(one["at"] for one in run.collectives("1.2")) - killed
    print(f"rank killed -> all have done a collective: {seconds:.3f} s")
    pids = await run.joined("1.2")
    await until(lambda: run.out.count('"step": 60') >= 2)
    frozen = time.monotonic()
    os.kill(pids[0], signal.SIGSTOP)
    await run.joined("1.3")
    print(f"rank frozen -> all have done a collective: {time.monotonic() - frozen:.3f} s")
    assert await run.exit() == 0
    assert "Prepare 1.2 (RankExit)" in run.err
    assert "Prepare 1.3 (RankHang)" in run.err
    assert run.collectives("1.4") == []
    assert all(re.match(r"\[[01]\] ", line) for line in run.out.splitlines())


async def test_restarts_are_bounded_and_the_last_lines_are_told(runs: list[Run], tmp_path: Path) -> None:
    run = Run(tmp_path, "--nproc-per-node=2", "--max-restarts=1", str(SCRIPTS / "fails.py"))
    runs.append(run)
    assert await run.exit() == 7
    assert run.out.count("about to fail in generation 1.1") >= 1
    assert run.out.count("about to fail in generation 1.2") >= 1
    assert "generation 1.3" not in run.out
    why = run.err.partition("no restarts are left; the last fault was RankExit of rank ")[2]
    assert "exit 7" in why
    assert "the reason why" in why


def points(root: Path) -> set[tuple[str, str]]:
    """(step, generation) of every step that is committed below a checkpoint root."""
    return {(path.parent.parent.name, path.parent.name) for path in root.glob("step-*/g*/MANIFEST.json")}


async def test_a_job_continues_where_its_root_says(runs: list[Run], tmp_path: Path) -> None:
    """Commits during training, after a kill, at a planned stop and at the end; the next run is above them all."""
    root, config = tmp_path / "root", tmp_path / "tiny.toml"
    env = {
        "STORMJIB_CHECKPOINT_ROOT": str(root),
        "STORMJIB_CHECKPOINT_INTERVAL": "20",
        "STORMJIB_CHECKPOINT_KEEP": "100",
    }
    line = ("--nproc-per-node=2", "-m", "stormjib_trainer", "--config", str(config))
    config.write_text(TINY.format(steps=10_000))
    first = Run(tmp_path, *line, **env)
    runs.append(first)
    await until(lambda: len(points(root)) >= 2, START_S)
    told = await metrics(first.process.pid)
    assert re.search(r"^stormjib_checkpoint_saves_total [1-9]", told, re.MULTILINE)
    assert re.search(r"^stormjib_checkpoint_step [1-9]", told, re.MULTILINE)
    assert re.search(r'^stormjib_checkpoint_duration_seconds{stage="durable"} 0\.0*[1-9]', told, re.MULTILINE)
    ranks = [stat.pid for stat in descendants(first.process.pid) if comm(stat.pid) == "rank1"]
    os.kill(ranks[0], signal.SIGKILL)
    await until(lambda: "g1.2" in {generation for _, generation in points(root)})
    assert re.search(r"Run 1.2 \(RankExit\): 2 ranks, resumes from step [1-9]", first.err)
    first.process.send_signal(signal.SIGTERM)
    assert await first.exit() == 128 + signal.SIGTERM
    stopped = re.findall(r'"event":"stopped","step":(\d+)', first.out)
    assert (f"step-{int(stopped[0]):08d}", "g1.2") in points(root)

    last = int(stopped[0]) + 10
    config.write_text(TINY.format(steps=last))
    second = Run(tmp_path, *line, **env)
    runs.append(second)
    assert await second.exit() == 0
    assert f"Run 2.1 (Start): 2 ranks, resumes from step {stopped[0]}" in second.err
    assert (f"step-{last:08d}", "g2.1") in points(root)


async def metrics(pid: int) -> str:
    """What a coordinator in this process says once it was told of a save: by the next heartbeat, or by the one after it."""
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline:
        for port in listening(pid):
            with suppress(HttpError, OSError):
                told = (await request("GET", "127.0.0.1", port, "/metrics")).body.decode()
                if "stormjib_checkpoint_saves_total" in told and "stormjib_checkpoint_step" in told:
                    return told
        await asyncio.sleep(0.05)
    raise AssertionError("no metrics of saves came")


def listening(pid: int) -> list[int]:
    """TCP ports that a process listens on."""
    sockets = {os.readlink(file) for file in Path(f"/proc/{pid}/fd").iterdir() if os.path.lexists(file)}
    rows = [line.split() for line in Path("/proc/net/tcp").read_text().splitlines()[1:]]
    return [
        int(row[1].rpartition(":")[2], 16)
        for row in rows
        if row[3] == "0A" and f"socket:[{row[9]}]" in sockets
    ]


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
async def test_a_signal_ends_everything(
    runs: list[Run], tmp_path: Path, number: signal.Signals, code: int
) -> None:
    run = Run(tmp_path, "--standalone", "--nproc-per-node", "2", str(SCRIPTS / "ring.py"))
    runs.append(run)
    await run.joined("1.1")
    run.process.send_signal(number)
    assert await run.exit() == code
    if number == signal.SIGINT:
        assert "KeyboardInterrupt" in run.err


async def test_a_program_that_is_not_python_runs_by_exec(runs: list[Run], tmp_path: Path) -> None:
    line = "echo $RANK of $WORLD_SIZE; test $RANK = 0 || exit 3; exec sleep 60"
    run = Run(tmp_path, "--nproc-per-node=2", "--max-restarts=0", "--no-python", "sh", "-c", line)
    runs.append(run)
    assert await run.exit() == 3
    assert sorted(run.out.splitlines()) == ["[0] 0 of 2", "[1] 1 of 2"]
    assert "ZygoteUnfit: sh is not Python; ranks start by exec" in run.err


async def test_a_program_that_is_not_there_fails_with_its_name(runs: list[Run], tmp_path: Path) -> None:
    run = Run(tmp_path, "--max-restarts=0", "--no-python", "/no/such/program")
    runs.append(run)
    assert await run.exit() == 127
    assert "cannot start: [Errno 2] No such file or directory: '/no/such/program'" in run.err


async def test_an_unfit_zygote_is_told_and_done_without(runs: list[Run], tmp_path: Path) -> None:
    """A thread that runs after the imports would be missing in every fork."""
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / "sitecustomize.py").write_text(
        "import sys, threading\n"
        "if 'stormjib_runtime.zygote' in sys.orig_argv:\n"
        "    threading.Thread(target=threading.Event().wait, daemon=True).start()\n"
    )
    run = Run(
        tmp_path,
        "--nproc-per-node=2",
        str(SCRIPTS / "ring.py"),
        "3",
        PYTHONPATH=str(tmp_path / "site"),
    )
    runs.append(run)
    assert await run.exit(90) == 0
    assert "ZygoteUnfit: it has 2 threads after the imports" in run.err
    assert len(run.collectives("1.1")) == 2


def test_the_command_line_is_explained() -> None:
    done = subprocess.run([PROGRAM, "--help"], check=True, capture_output=True, text=True, timeout=20)
    assert done.stdout.startswith("usage: stormjib-run")
    done = subprocess.run(
        [PROGRAM, "--nnodes", "2", "x.py"], check=False, capture_output=True, text=True, timeout=20
    )
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("stormjib-run: --nnodes is not taken: one machine only")
