"""What an agent is told by its environment, read once and checked."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING

from stormjib_runtime.errors import CommandError
from stormjib_runtime.http import split_url
from stormjib_runtime.script import Command, parse_command
from stormjib_runtime.wire import Env

if TYPE_CHECKING:
    from collections.abc import Mapping

GRACE_S = 30.0
"""Kubernetes' own default of terminationGracePeriodSeconds."""


class Launcher(StrEnum):
    """`spec.launcher.kind`."""

    STORMJIB = "Stormjib"
    TORCHRUN = "Torchrun"


@dataclass(frozen=True)
class Settings:
    """One agent's place in its job."""

    coordinator: tuple[str, int]
    token: str
    job_uid: str
    slot: int
    pod_uid: str
    address: str
    processes: int
    launcher: Launcher
    words: tuple[str, ...]
    """What follows `torchrun`, as given."""
    command: Command
    run_dir: Path
    grace_s: float
    preflight: bool
    checkpoint_root: str
    keep_last: int
    peers: bool
    """Whether what is staged here is copied to another node, and what is staged there to this one."""

    @property
    def pages(self) -> Path:
        """Folder of this slot's pages: the name keeps two jobs on one machine apart."""
        return self._shared_memory("")

    @property
    def memory(self) -> Path:
        """Folder where this slot's ranks stage what they save. In a pod it outlives the container."""
        return self._shared_memory("-steps")

    @property
    def copies(self) -> Path:
        """Folder of the copies of what other slots' ranks have staged. It outlives the container too."""
        return self._shared_memory("-copies")

    def _shared_memory(self, what: str) -> Path:
        return Path("/dev/shm") / f"stormjib-{self.job_uid.replace('/', '_')[:8]}-{self.slot}{what}"

    @classmethod
    def from_env(cls, environ: Mapping[str, str] = os.environ) -> Settings:
        """Raises CommandError that names the variable and what is wanted of it."""
        words = _words(_need(environ, Env.COMMAND))
        return cls(
            coordinator=_url(_need(environ, Env.COORDINATOR)),
            token=_need(environ, Env.TOKEN),
            job_uid=_need(environ, Env.JOB_UID),
            slot=_number(environ, Env.SLOT, least=0),
            pod_uid=_need(environ, Env.POD_UID),
            address=_need(environ, Env.POD_IP),
            processes=_number(environ, Env.PROCESSES, least=1),
            launcher=_launcher(environ.get(Env.LAUNCHER, Launcher.STORMJIB)),
            words=words,
            command=parse_command(words),
            run_dir=Path(_need(environ, Env.RUN_DIR)),
            grace_s=_seconds(environ, Env.GRACE_S, GRACE_S),
            preflight=_switch(environ, Env.PREFLIGHT),
            checkpoint_root=environ.get(Env.CHECKPOINT_ROOT, ""),
            keep_last=_number({Env.CHECKPOINT_KEEP: "3", **environ}, Env.CHECKPOINT_KEEP, least=1),
            peers=_number({Env.CHECKPOINT_PEERS: "0", **environ}, Env.CHECKPOINT_PEERS, least=0) > 0,
        )


def _need(environ: Mapping[str, str], name: Env) -> str:
    value = environ.get(name, "")
    if not value:
        raise CommandError(
            f"environment variable {name.value} is missing; an agent is started by the operator"
        )
    return value


def _number(environ: Mapping[str, str], name: Env, least: int) -> int:
    value = _need(environ, name)
    if not (value.isascii() and value.isdecimal() and int(value) >= least):
        raise CommandError(f"{name.value} is {value!r}; wanted a number of at least {least}")
    return int(value)


def _seconds(environ: Mapping[str, str], name: Env, default: float) -> float:
    value = environ.get(name, str(default))
    try:
        return max(0.0, float(value))
    except ValueError:
        raise CommandError(f"{name.value} is {value!r}; wanted seconds") from None


def _switch(environ: Mapping[str, str], name: Env) -> bool:
    value = environ.get(name, "Off")
    if value not in ("On", "Off"):
        raise CommandError(f"{name.value} is {value!r}; wanted On or Off")
    return value == "On"


def _url(value: str) -> tuple[str, int]:
    try:
        return split_url(value)
    except ValueError as error:
        raise CommandError(f"{Env.COORDINATOR.value}: {error}") from None


def _launcher(value: str) -> Launcher:
    try:
        return Launcher(value)
    except ValueError:
        raise CommandError(f"{Env.LAUNCHER.value} is {value!r}; wanted {' or '.join(Launcher)}") from None


def _words(value: str) -> tuple[str, ...]:
    try:
        words = json.loads(value)
    except ValueError:
        words = None
    if not (isinstance(words, list) and words and all(isinstance(word, str) for word in words)):
        raise CommandError(f"{Env.COMMAND.value} is {value[:80]!r}; wanted a JSON list of texts")
    return tuple(words)
