"""The engine on a GPU: what is saved is the state of the call, and no host waits for its copy."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import torch

from stormjib_checkpoint.engine import Engine
from stormjib_checkpoint.reader import load
from stormjib_checkpoint.state import collect

if TYPE_CHECKING:
    from pathlib import Path

    from stormjib_checkpoint.tensors import Value

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]
MEGABYTES = 256


@pytest.mark.parametrize("fused", [False, True])
def test_what_is_saved_is_the_state_of_the_call_while_training_goes_on(tmp_path: Path, fused: bool) -> None:
    torch.manual_seed(3)
    model = torch.nn.Linear(MEGABYTES * 256, 1024, bias=False, device="cuda")
    optimizer = torch.optim.AdamW(model.parameters(), fused=fused)
    engine = Engine(tmp_path / "job")
    engine.prepare(model, optimizer)
    wanted: dict[int, dict[str, torch.Tensor]] = {}
    saves = []
    for number in range(1, 6):
        model.weight.grad = torch.randn_like(model.weight)
        optimizer.step()
        if number > 2:
            state = collect(model, optimizer)
            wanted[number] = {n: t.clone() for n, t in state.items() if isinstance(t, torch.Tensor)}
            saves.append(engine.async_save(state, step=number))
    engine.wait()
    for save in saves[-2:]:
        found: dict[str, Value] = {name: torch.zeros_like(value) for name, value in wanted[save.step].items()}
        assert save.point is not None
        state = collect(model, optimizer)
        load(engine.storage, save.point, {**state, **found})
        assert all(torch.equal(found[name], value) for name, value in wanted[save.step].items())
    assert saves[-1].figures.waited_s < saves[-1].figures.staged_s / 2, "the stream waited, not the host"
    engine.close()
