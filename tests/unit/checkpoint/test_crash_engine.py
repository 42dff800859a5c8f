"""As test_crash_points, for the engine as it is: two threads write pieces in any order while another commits and deletes."""

from __future__ import annotations

import pytest
import torch

from fakes.disk import Disk
from fakes.power import Cutting
from fakes.saving import until_left
from stormjib_checkpoint.engine import Engine
from stormjib_checkpoint.engine import arena as arenas
from stormjib_checkpoint.storage import Local

pytestmark = pytest.mark.timeout(300)
ROOT = "/team/job"
SOON_S = 10.0


def save(engine: Engine, step: int) -> None:
    state = {"table": torch.full((3000,), float(step))}
    engine.async_save(state, step=step, train={"step": step}).upload_completion.result(SOON_S)


def load(engine: Engine) -> int:
    """The step that was loaded, every bit of which is right; 0 where the engine starts anew."""
    state = {"table": torch.zeros(3000)}
    train = engine.load(state)
    step = train["step"] if train is not None else 0
    assert bool((state["table"] == step).all())
    return int(step)


def test_every_power_cut_under_the_engine_leaves_a_whole_newest_step(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(arenas, "PIECE_BYTES", 8192)
    disk = Disk()
    engine = Engine(Local(ROOT, disk))
    promised = {0: 0}
    for step in range(1, 5):
        save(engine, step)
        promised[len(disk.log)] = step
    until_left(engine.storage, [4, 3])
    engine.close()
    cutting, least = Cutting(), 0
    known: dict[object, int] = {}
    for number, entry in enumerate(disk.log, 1):
        cutting.go(entry)
        least = promised.get(number, least)
        for tree in cutting.states():
            key = tree.key()
            if key not in known:
                again = Engine(Local(ROOT, Disk(tree)))
                known[key] = load(again)
                save(again, 9)
                again.close()
            assert known[key] >= least, f"after {number} calls step {known[key]} is left of {least}"
    assert len(known) > 100
    assert set(known.values()) == {0, 1, 2, 3, 4}
