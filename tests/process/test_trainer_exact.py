"""Real processes over Gloo whose number changes in the middle: in exact mode not one bit of the state, in fast mode nearly nothing."""

from __future__ import annotations

import hashlib
import sysconfig
from typing import TYPE_CHECKING

import pytest
import torch

from fakes.tiny_jobs import Agent, assert_planned, tiny, warm_trainer
from stormjib_checkpoint.history import committed
from stormjib_checkpoint.ledger import audit
from stormjib_checkpoint.reader import load
from stormjib_checkpoint.step import CommittedStep
from stormjib_runtime.wire import EXIT_STOPPED

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from fakes.ranks import Warm
    from stormjib_checkpoint.storage import Local

pytestmark = pytest.mark.timeout(300)

STEPS = 9
MIXTURE = {
    "data__sources__code__weight": 7,
    "data__sources__prose__path": f"{sysconfig.get_paths()['stdlib']}/argparse.py",
    "data__sources__prose__weight": 3,
}
EXACT = MIXTURE | {
    "train__reduce": "exact",
    "train__batch": 30,
    "train__micro_batch": 2,  # 15 of them: most worlds have ranks with one less than others
    "train__steps": STEPS,
    "optimizer__warmup": 3,
    "model__dropout": 0.1,
    "optimizer__clip": 0.5,
}


@pytest.fixture(scope="module")
def warm() -> Iterator[Warm]:
    process = warm_trainer()
    yield process
    process.close()


def sha256(storage: Local) -> str:
    """Of all weights and moments of the newest step, whole."""
    point = committed(storage)[0]
    assert point.step == STEPS
    atoms = CommittedStep(storage, point).atoms().atoms
    state = {name: torch.empty(atom.shape) for name, atom in atoms.items()}
    load(storage, point, state)
    digest = hashlib.sha256()
    for name in sorted(state):
        digest.update(name.encode() + state[name].numpy().tobytes())
    return digest.hexdigest()


def lives(
    warm: Warm, folder: Path, *worlds: tuple[int, int], **changes: object
) -> tuple[Local, dict[int, float]]:
    """One generation after the other, each on so many ranks up to that step. The storage, and the loss of each step."""
    losses: dict[int, float] = {}
    settings, last = EXACT | changes, worlds[-1][1]
    folder.mkdir(exist_ok=True)
    for number, (world, stop) in enumerate(worlds, start=1):
        agent = Agent(folder, number, world)
        agent.pages[0].stop_after = stop
        job, codes = warm.run(world, tiny(**settings), agent.folder, agent.env())
        assert codes == [EXIT_STOPPED if stop < last else 0] * world, job.text()
        losses |= job.losses()
        agent.commit(stop)
        agent.close()
    return agent.storage, losses


@pytest.fixture(scope="module")
def alone(warm: Warm, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, dict[int, float]]:
    """Digest and losses of one rank that nobody disturbs."""
    folder = tmp_path_factory.mktemp("alone")
    storage, losses = lives(warm, folder, (1, STEPS))
    return sha256(storage), losses


@pytest.mark.parametrize("world", [2, 3, 4, 5, 7])
def test_every_world_size_ends_with_the_same_bits(
    warm: Warm, alone: tuple[str, dict[int, float]], world: int, tmp_path: Path
) -> None:
    storage, losses = lives(warm, tmp_path, (world, STEPS))
    assert (sha256(storage), losses) == alone


def test_reshapes_in_the_middle_change_no_bit_and_lose_no_sample(
    warm: Warm, alone: tuple[str, dict[int, float]], tmp_path: Path
) -> None:
    storage, losses = lives(warm, tmp_path, (8, 2), (7, 4), (5, 6), (8, STEPS))
    assert (sha256(storage), losses) == alone
    found = audit(storage)
    assert found.reshapes() == 3
    assert found.order is not None
    assert found.order.weights == (7, 3)
    assert_planned(storage, found.order, STEPS)


def test_how_layers_are_joined_changes_no_bit(
    warm: Warm, alone: tuple[str, dict[int, float]], tmp_path: Path
) -> None:
    storage, losses = lives(warm, tmp_path, (3, STEPS), train__unit=10**9)
    assert (sha256(storage), losses) == alone


FAST = {
    "train__reduce": "fast",
    "train__batch": 30,
    "train__micro_batch": 1,
    "train__unit": 10**9,
    "train__steps": 200,
    "optimizer__warmup": 50,
    "optimizer__lr": 1e-3,  # at a higher one training itself amplifies rounding
    "model__dropout": 0.1,
}


def test_in_fast_mode_the_losses_stay_within_twice_what_another_world_costs(
    warm: Warm, tmp_path: Path
) -> None:
    """The control never changes its number of ranks."""
    _, two = lives(warm, tmp_path / "two", (2, 200), **FAST)
    _, control = lives(warm, tmp_path / "control", (3, 200), **FAST)
    _, resharded = lives(warm, tmp_path / "resharded", (2, 80), (3, 140), (2, 200), **FAST)
    noise = largest(control, two)
    assert 0 < noise <= 1e-6
    assert largest(resharded, two) <= 2 * noise


def test_thirty_micro_batches_on_seven_ranks(warm: Warm, tmp_path: Path) -> None:
    """Five of the ranks have one less than the others."""
    short = FAST | {"train__steps": 20, "optimizer__warmup": 5, "train__at_once": 2}
    _, one = lives(warm, tmp_path / "one", (1, 20), **short)
    storage, seven = lives(warm, tmp_path / "seven", (4, 8), (7, 20), **short)
    assert largest(seven, one) <= 1e-6
    found = audit(storage)
    assert (found.unplanned(), found.twice(), found.reshapes()) == ([], [], 1)
    assert sorted(len(ids) for ids in found.steps[20]) == [4, 4, 4, 4, 4, 5, 5]


def largest(losses: dict[int, float], wanted: dict[int, float]) -> float:
    """Relative difference, over all steps."""
    assert losses.keys() == wanted.keys()
    return max(abs(losses[step] - loss) / loss for step, loss in wanted.items())
