"""torchrun's words, as `stormjib-run` and an agent take them; what is not taken is refused by name."""

from __future__ import annotations

import json

import pytest

from stormjib_runtime.environment import visible_gpus
from stormjib_runtime.errors import CommandError
from stormjib_runtime.run import Options, parse, processes, shell_code
from stormjib_runtime.script import Command, parse_command
from stormjib_runtime.settings import Launcher, Settings
from stormjib_runtime.wire import Env

ENVIRONMENT: dict[str, str] = {
    Env.COORDINATOR: "http://10.0.0.9:7070",
    Env.TOKEN: "t",
    Env.JOB_UID: "0123456789abcdef",
    Env.SLOT: "3",
    Env.POD_UID: "pod",
    Env.POD_IP: "10.0.0.4",
    Env.PROCESSES: "2",
    Env.COMMAND: '["train.py", "--lr", "1"]',
    Env.RUN_DIR: "/run/stormjib",
}


@pytest.mark.parametrize(
    ("line", "options"),
    [
        ("train.py", Options(words=("train.py",))),
        ("--standalone --nproc-per-node 2 train.py --nproc-per-node 9", Options("2", 3, ("train.py", "--nproc-per-node", "9"))),
        ("--nproc_per_node=gpu --max-restarts=0 -m pkg.mod a", Options("gpu", 0, ("-m", "pkg.mod", "a"))),
        ("--max_restarts 5 --module pkg", Options("1", 5, ("-m", "pkg"))),
        ("--no-python sh -c ls", Options(words=("--no-python", "sh", "-c", "ls"))),
        ("--help", Options(help=True)),
    ],
)  # fmt: skip
def test_torchruns_words_are_taken(line: str, options: Options) -> None:
    assert parse(line.split()) == options


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("--nnodes 2 train.py", "--nnodes is not taken: one machine only"),
        ("--rdzv_backend c10d train.py", "--rdzv_backend is not taken: there is no rendezvous"),
        ("--tee 3 train.py", "--tee is not taken: see --help"),
        ("--standalone=1 train.py", "--standalone is not taken"),
        ("--nproc-per-node", "--nproc-per-node needs a value"),
        ("--max-restarts -1 train.py", "--max-restarts is '-1'; wanted a number of at least 0"),
        ("--standalone", "no program given"),
    ],
)
def test_what_is_not_taken_is_refused_by_name(line: str, says: str) -> None:
    with pytest.raises(CommandError, match=says):
        parse(line.split())


def test_number_of_ranks() -> None:
    assert [processes(word, gpus=4, cpus=8) for word in ("3", "gpu", "cpu", "auto")] == [3, 4, 8, 4]
    assert processes("auto", gpus=0, cpus=8) == 8
    for word in ("0", "many", "gpu"):
        with pytest.raises(CommandError, match="--nproc-per-node is"):
            processes(word, gpus=0, cpus=8)
    assert visible_gpus({"CUDA_VISIBLE_DEVICES": "0,3"}) == 2
    assert visible_gpus({"CUDA_VISIBLE_DEVICES": ""}) == 0


@pytest.mark.parametrize(
    ("words", "command", "argv"),
    [
        (["a.py", "-m"], Command("a.py", ("-m",)), ["py", "-u", "a.py", "-m"]),
        (["-m", "pkg", "x"], Command("pkg", ("x",), module=True), ["py", "-u", "-m", "pkg", "x"]),
        (["--no-python", "sh", "-c"], Command("sh", ("-c",), python=False), ["sh", "-c"]),
    ],
)
def test_what_ranks_run(words: list[str], command: Command, argv: list[str]) -> None:
    assert parse_command(words) == command
    assert command.argv("py") == argv


@pytest.mark.parametrize("words", [[], ["-m"], ["-x", "a.py"], ["-m", "--no-python", "a"]])
def test_a_command_that_cannot_be_is_refused(words: list[str]) -> None:
    with pytest.raises(CommandError):
        parse_command(words)


def test_settings_of_an_agent() -> None:
    settings = Settings.from_env(ENVIRONMENT)
    assert settings.coordinator == ("10.0.0.9", 7070)
    assert (settings.slot, settings.launcher, settings.grace_s) == (3, Launcher.STORMJIB, 30.0)
    assert not settings.preflight
    assert Settings.from_env({**ENVIRONMENT, Env.PREFLIGHT: "On"}).preflight
    assert str(settings.pages) == "/dev/shm/stormjib-01234567-3"
    assert not settings.peers
    assert Settings.from_env({**ENVIRONMENT, Env.CHECKPOINT_PEERS: "1"}).peers


@pytest.mark.parametrize("name", list(ENVIRONMENT))
def test_a_missing_variable_is_named(name: str) -> None:
    with pytest.raises(CommandError, match=f"{name} is missing"):
        Settings.from_env({**ENVIRONMENT, name: ""})


@pytest.mark.parametrize(
    ("name", "value"),
    [
        (Env.SLOT, "-1"),
        (Env.PROCESSES, "0"),
        (Env.LAUNCHER, "torchrun"),
        (Env.COORDINATOR, "coordinator:7070"),
        (Env.COMMAND, "train.py"),
        (Env.COMMAND, json.dumps([])),
        (Env.GRACE_S, "soon"),
        (Env.CHECKPOINT_KEEP, "0"),
        (Env.CHECKPOINT_PEERS, "yes"),
        (Env.PREFLIGHT, "true"),
    ],
)
def test_a_wrong_variable_is_named(name: Env, value: str) -> None:
    with pytest.raises(CommandError, match=name.value):
        Settings.from_env({**ENVIRONMENT, name: value})


def test_exit_codes_as_a_shell_gives_them() -> None:
    assert [shell_code(code) for code in (0, 7, -9, -15)] == [0, 7, 137, 143]
