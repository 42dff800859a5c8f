"""What this process is: rank facts and orders of the launcher, read from the environment once, here and nowhere else."""

from __future__ import annotations

import os
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, TypeVar

from stormjib_health.integrity.judge import Policy
from stormjib_health.verdict import OnRecurrence, OnSpike
from stormjib_runtime import codec
from stormjib_runtime.wire import INTERVAL_AUTO, Env, GenerationId, ResumePoint
from stormjib_trainer.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Mapping

T = TypeVar("T")
AUTO = -1
_SWITCH = {"On": True, "Off": False}


@dataclass(frozen=True)
class Environment:
    """Rank facts are torchrun's; without any launcher it is a job of one rank."""

    rank: int = 0
    world: int = 1
    local_rank: int = 0
    launched: bool = False
    """A launcher has given us a store to meet at."""
    omp_threads: int = 1
    generation: GenerationId | None = None
    """Given by an agent, which has opened it on the storage. None: this job opens its own (plain torchrun)."""
    resume: ResumePoint | None = None
    replicate: int = 0
    """How many ranks shall hold the same shard, as planned for this many nodes; 0: nobody has planned it."""
    job_uid: str = ""
    checkpoint_root: str = ""
    """Empty: nothing is saved."""
    checkpoint_memory: str = ""
    """Where steps are staged so that they outlive this process; empty: in its own memory."""
    checkpoint_interval: int = 0
    """Steps between saves; 0: only when asked to, and at the end; AUTO: as often as it costs next to nothing."""
    checkpoint_keep: int = 3
    integrity: Policy = field(default_factory=Policy)
    """What is done against silent corruption."""


def read(env: Mapping[str, str] = os.environ) -> Environment:
    """The environment of this process."""
    generation, resume = env.get(Env.GENERATION), env.get(Env.RESUME)
    return Environment(
        rank=int(env.get("RANK", 0)),
        world=int(env.get("WORLD_SIZE", 1)),
        local_rank=int(env.get("LOCAL_RANK", 0)),
        launched="MASTER_ADDR" in env,
        omp_threads=int(env.get("OMP_NUM_THREADS", 1)),
        generation=GenerationId.parse(generation) if generation and Env.PAGE_DIR in env else None,
        resume=codec.decode(ResumePoint, resume) if resume else None,
        replicate=int(env.get(Env.REPLICATE) or 0),
        job_uid=env.get(Env.JOB_UID, ""),
        checkpoint_root=env.get(Env.CHECKPOINT_ROOT, ""),
        checkpoint_memory=env.get(Env.MEMORY_DIR, ""),
        checkpoint_interval=_interval(env.get(Env.CHECKPOINT_INTERVAL, "")),
        checkpoint_keep=int(env.get(Env.CHECKPOINT_KEEP) or 3),
        integrity=_integrity(env),
    )


def _interval(text: str) -> int:
    if text == INTERVAL_AUTO:
        return AUTO
    if text and not (text.isascii() and text.isdecimal()):
        raise ConfigError(
            f"{Env.CHECKPOINT_INTERVAL.value} = {text[:64]!r}; wanted steps, or {INTERVAL_AUTO}"
        )
    return int(text or 0)


def _integrity(env: Mapping[str, str]) -> Policy:
    default = Policy()
    return Policy(
        norms=_word(env, Env.INTEGRITY_NORMS, _SWITCH, default.norms),
        digests=_word(env, Env.INTEGRITY_DIGESTS, _SWITCH, default.digests),
        on_spike=_word(env, Env.INTEGRITY_ON_SPIKE, {w.value: w for w in OnSpike}, default.on_spike),
        on_recurrence=_word(
            env, Env.INTEGRITY_ON_RECURRENCE, {w.value: w for w in OnRecurrence}, default.on_recurrence
        ),
    )


def _word(env: Mapping[str, str], name: Env, known: Mapping[str, T], default: T) -> T:
    text = env.get(name, "")
    if text and text not in known:
        raise ConfigError(f"{name.value} = {text[:64]!r}; wanted one of {', '.join(known)}")
    return known[text] if text else default


def age_s() -> float:
    """Seconds since this process was forked, to the kernel's tick (10 ms). The zygote's imports are not in it."""
    with open("/proc/self/stat") as file:
        started = int(file.read().rpartition(") ")[2].split()[19]) / os.sysconf("SC_CLK_TCK")
    return time.clock_gettime(time.CLOCK_BOOTTIME) - started
