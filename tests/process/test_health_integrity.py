"""Silent corruption on real ranks over Gloo: a flipped bit is found, its rank named, its step done again or gone back from."""

from __future__ import annotations

import json
import os
from typing import TYPE_CHECKING, Any

import pytest

from fakes import gloo, norm_ranks
from fakes.faulty_trainer import LOW, MIDDLE, SIGN, THIRD, TOP, Fault
from fakes.ranks import Warm
from stormjib_checkpoint.history import committed
from stormjib_checkpoint.ledger import audit
from stormjib_checkpoint.storage import Local
from stormjib_health.integrity.slices import SLICES
from stormjib_runtime.wire import EXIT_ROLL_BACK, Env

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping
    from pathlib import Path

    from fakes.ranks import Job

pytestmark = pytest.mark.timeout(300)

WORLD = 3
TINY = {
    "model.dim": 32,
    "model.heads": 2,
    "model.context": 32,
    "train.batch": 12,
    "train.unit": 1,
    "train.steps": 40,
    "optimizer.warmup": 5,
    "validation.sequences": 16,
}


def tiny(replicate: int = WORLD, steps: int = 40) -> list[str]:
    settings = TINY | {"train.steps": steps, "parallel.replicate": replicate}
    return [word for name, value in settings.items() for word in ("--set", f"{name}={value}")]


@pytest.fixture(scope="module")
def warm() -> Iterator[Warm]:
    imports = ["torch.distributed.fsdp", "torch._dynamo", "stormjib_trainer.loop"]
    process = Warm("faulty_trainer", imports)
    yield process
    process.close()


@pytest.fixture(scope="module")
def undisturbed(warm: Warm, tmp_path_factory: pytest.TempPathFactory) -> Job:
    """40 steps of three replicas that nobody disturbs."""
    return ended(warm, Fault(99, 0, "weight"), tmp_path_factory.mktemp("undisturbed"), [0] * WORLD)


def ended(
    warm: Warm,
    fault: Fault,
    folder: Path,
    codes: list[int],
    arguments: list[str] | None = None,
    env: Mapping[str, str] | None = None,
) -> Job:
    """Run a job with a fault; all ranks must end so."""
    job, found = warm.run(len(codes), arguments or tiny(), folder, {**fault.env(), **(env or {})})
    assert found == codes, "\n".join(job.text(rank) for rank in range(len(codes)))
    return job


def said(job: Job, event: str) -> list[dict[str, Any]]:
    return [line for line in job.lines() if line.get("event") == event]


def findings(job: Job) -> list[tuple[str, int, int]]:
    """Kind, step and accused of all findings."""
    return [(line["kind"], line["step"], line["accused"]) for line in said(job, "finding")]


def fired(job: Job, rank: int) -> list[dict[str, Any]]:
    """What the rank says that it has done wrong."""
    return [json.loads(line) for line in job.text(rank).splitlines() if line.startswith('{"fault"')]


# --- a rank's own norm --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(3,), (3, 1), (1, 3), (2, 2)])
@pytest.mark.parametrize("micros", [1, 3])
def test_the_norm_before_mixing_is_the_one_that_the_rank_has_alone(
    shape: tuple[int, ...], micros: int, tmp_path: Path
) -> None:
    world = shape[0] * shape[-1] if len(shape) > 1 else shape[0]
    gloo.run(world, tmp_path, norm_ranks.fsdp, shape, micros)


def test_the_norm_before_mixing_under_ddp(tmp_path: Path) -> None:
    gloo.run(2, tmp_path, norm_ranks.ddp)


@pytest.mark.parametrize("replicate", [1, WORLD])
@pytest.mark.parametrize("where", ["nan", "own"])
def test_a_wrong_gradient_is_named_before_it_is_mixed_and_done_again(
    warm: Warm, where: str, replicate: int, tmp_path: Path
) -> None:
    calm = ended(warm, Fault(99, 0, "nan"), tmp_path / "calm", [0] * WORLD, tiny(replicate, 12))
    fault = Fault(rank=1, step=7, where=where, bit=TOP)
    job = ended(warm, fault, tmp_path / "fault", [0] * WORLD, tiny(replicate, 12))
    assert len(fired(job, 1)) == 1
    first, second = findings(job)
    assert first in [("NotFinite", 7, 1), ("Norm", 7, 1)]
    assert second == ("ReplayDiffers", 7, 1)
    assert job.losses() == calm.losses(), "as if nothing had been, to the bit"


def test_a_gradient_that_is_wrong_each_time_ends_the_job(warm: Warm, tmp_path: Path) -> None:
    fault = Fault(rank=1, step=7, where="nan", again=True)
    job = ended(warm, fault, tmp_path, [1] * WORLD)
    assert len(fired(job, 1)) == 2
    assert findings(job) == [("NotFinite", 7, 1), ("ReplayAgrees", 7, -1)]
    assert "step 7: loss" in job.text()
    assert max(job.losses()) == 6


# --- votes ----------------------------------------------------------------------------------------------------------


STATE = [("weight", bit) for bit in (SIGN, TOP, LOW)]
STATE += [(where, bit) for where in ("exp_avg", "exp_avg_sq") for bit in (SIGN, TOP, THIRD)]


@pytest.mark.parametrize(("where", "bit"), [*STATE, ("mixed", SIGN), ("mixed", MIDDLE)])
def test_a_flipped_bit_is_voted_on_within_a_round_and_its_rank_named(
    warm: Warm, where: str, bit: int, tmp_path: Path
) -> None:
    place = (0.1 + bit / 40) % 1
    fault = Fault(rank=2, step=9, where=where, bit=bit, place=place)
    job = ended(warm, fault, tmp_path, [EXIT_ROLL_BACK] * WORLD)
    assert len(fired(job, 2)) == 1
    kind, step, accused = findings(job)[-1]
    assert (kind, accused) == ("Digest", 2)
    assert 8 <= step <= 9 + SLICES
    assert said(job, "finding")[-1]["votes"] == 2


def test_a_wild_gradient_after_mixing_is_done_again(warm: Warm, undisturbed: Job, tmp_path: Path) -> None:
    job = ended(warm, Fault(rank=2, step=9, where="mixed", bit=TOP), tmp_path, [0] * WORLD)
    assert len(fired(job, 2)) == 1
    assert findings(job) == [("NotFinite", 9, -1), ("ReplayDiffers", 9, -1)]
    assert job.losses() == undisturbed.losses()


def test_of_two_replicas_a_flip_is_found_and_nobody_named(warm: Warm, tmp_path: Path) -> None:
    fault = Fault(rank=1, step=9, where="weight", bit=LOW)
    job = ended(warm, fault, tmp_path, [EXIT_ROLL_BACK] * 2, tiny(2))
    assert len(fired(job, 1)) == 1
    assert [(kind, accused) for kind, _, accused in findings(job)] == [("Digest", -1)]


def test_shards_have_votes_of_their_own(warm: Warm, tmp_path: Path) -> None:
    fault = Fault(rank=3, step=9, where="weight", bit=LOW)
    job = ended(warm, fault, tmp_path, [EXIT_ROLL_BACK] * 6, tiny(3))
    assert len(fired(job, 3)) == 1
    assert [(kind, accused) for kind, _, accused in findings(job)] == [("Digest", 3)]


@pytest.mark.parametrize(("world", "replicate"), [(3, 3), (4, 2)])
def test_healthy_replicas_are_never_voted_against(
    warm: Warm, world: int, replicate: int, tmp_path: Path
) -> None:
    """Three sequences of a rank may have a gradient far from the others': then the step is done again, and agrees."""
    job = ended(warm, Fault(99, 0, "weight"), tmp_path, [0] * world, tiny(replicate, 200))
    kinds = [(kind, step) for kind, step, _ in findings(job)]
    far = [step for kind, step in kinds if kind == "Norm"]
    assert kinds == [(kind, step) for step in far for kind in ("Norm", "ReplayAgrees")]
    assert len(far) <= 2
    assert max(job.losses()) == 200


# --- going back -------------------------------------------------------------------------------------------------------


def storage(folder: Path, **more: str) -> dict[str, str]:
    return {Env.CHECKPOINT_ROOT: str(folder / "storage"), Env.CHECKPOINT_INTERVAL: "5", **more}


def test_the_job_goes_back_before_the_flip_and_then_trains_as_if_nothing_had_been(
    warm: Warm, undisturbed: Job, tmp_path: Path
) -> None:
    env = storage(tmp_path, **{Env.CHECKPOINT_KEEP: "8"})  # else none is old enough to be trusted
    fault = Fault(rank=2, step=24, where="weight", bit=LOW)
    job = ended(warm, fault, tmp_path / "1", [EXIT_ROLL_BACK] * WORLD, env=env)
    trusted = said(job, "rolled_back")[0]["trusted"]
    assert trusted < 24
    assert committed(Local(tmp_path / "storage"))[0].step > trusted, "there is a newer one, in doubt"
    job = ended(warm, Fault(99, 0, "weight"), tmp_path / "2", [0] * WORLD, env=env)
    resumed = said(job, "resumed")[0]["step"]
    assert trusted - 5 < resumed <= trusted
    assert job.losses() == {s: loss for s, loss in undisturbed.losses().items() if s > resumed}
    found = audit(Local(tmp_path / "storage"))
    assert found.last == 40
    assert not found.problems
    assert not found.gaps()
    assert not found.twice()


SPIKE = Fault(rank=0, step=70, where="data", again=True)


def spiking(on_spike: str, on_recurrence: str = "Fail", **more: str) -> dict[str, str]:
    return {
        Env.INTEGRITY_ON_SPIKE.value: on_spike,
        Env.INTEGRITY_ON_RECURRENCE.value: on_recurrence,
        Env.INTEGRITY_NORMS.value: "Off",  # one rank's wild samples show in its norm as well
        **more,
    }


def spike(warm: Warm, folder: Path, code: int, env: Mapping[str, str], fault: Fault = SPIKE) -> Job:
    """One rank reads noise at step 70, where the job runs on one rank: its loss jumps."""
    return ended(warm, fault, folder, [code], tiny(1, 80), env)


def test_a_spike_is_told_and_trained_on_by_default(warm: Warm, tmp_path: Path) -> None:
    job = spike(warm, tmp_path, 0, {Env.INTEGRITY_NORMS.value: "Off"})
    assert len(fired(job, 0)) == 2
    assert findings(job) == [("Spike", 70, -1), ("ReplayAgrees", 70, -1)]
    assert max(job.losses()) == 80


def test_a_spike_that_is_not_there_again_was_hardware(warm: Warm, tmp_path: Path) -> None:
    job = spike(warm, tmp_path, 0, spiking("Fail"), Fault(rank=0, step=70, where="data"))
    assert findings(job) == [("Spike", 70, -1), ("ReplayDiffers", 70, -1)]


def test_a_spike_fails_the_job_that_wants_it(warm: Warm, tmp_path: Path) -> None:
    job = spike(warm, tmp_path, 1, spiking("Fail"))
    assert max(job.losses()) == 69


def test_a_skipped_step_leaves_nothing_behind(warm: Warm, tmp_path: Path) -> None:
    env = spiking("Skip", **storage(tmp_path))
    job = spike(warm, tmp_path / "1", 0, env)
    assert [line["step"] for line in said(job, "skipped")] == [70]
    losses = job.losses()
    os.rename(tmp_path / "storage/step-00000080", tmp_path / "gone")
    again = spike(warm, tmp_path / "2", 0, env, Fault(99, 0, "data"))
    assert said(again, "resumed")[0]["step"] == 75
    assert again.losses() == {s: losses[s] for s in range(76, 81)}, "after a restart it goes on the same"


def test_a_spike_that_vanishes_after_going_back_was_hardware(warm: Warm, tmp_path: Path) -> None:
    env = spiking("Replay", **storage(tmp_path))
    job = spike(warm, tmp_path / "1", EXIT_ROLL_BACK, env)
    assert findings(job) == [("Spike", 70, -1)]
    job = spike(warm, tmp_path / "2", 0, env, Fault(99, 0, "data"))
    assert said(job, "resumed")[0]["step"] == 65
    assert findings(job) == [("ReplayDiffers", 70, -1)]


@pytest.mark.parametrize(("on_recurrence", "code"), [("Fail", 1), ("Skip", 0)])
def test_a_spike_that_recurs_after_going_back_is_data_or_program(
    warm: Warm, on_recurrence: str, code: int, tmp_path: Path
) -> None:
    env = spiking("Replay", on_recurrence, **storage(tmp_path))
    spike(warm, tmp_path / "1", EXIT_ROLL_BACK, env)
    job = spike(warm, tmp_path / "2", code, env)
    assert findings(job) == [("ReplayAgrees", 70, -1)]
    assert [line["step"] for line in said(job, "skipped")] == ([70] if code == 0 else [])
    assert max(job.losses()) == (80 if code == 0 else 69)


def test_an_unknown_wish_is_named(warm: Warm, tmp_path: Path) -> None:
    job = ended(warm, SPIKE, tmp_path, [2], tiny(1), {Env.INTEGRITY_ON_SPIKE.value: "Pray"})
    assert "STORMJIB_INTEGRITY_ON_SPIKE = 'Pray'; wanted one of Notify, Skip, Fail, Replay" in job.text()
