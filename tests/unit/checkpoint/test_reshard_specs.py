"""Every layout of the resharding table holds every atom once, and gives the whole model back."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

import stormjib_checkpoint.spec
from fakes.layouts import cut, gathered, numbered
from fakes.reshard_models import MODELS, OPTIMIZERS, atoms_of, loss_of, model_of, optimizer_of
from fakes.reshard_specs import ROWS, Row, own
from stormjib_checkpoint.boxes import flaw
from stormjib_checkpoint.spec.check import check
from stormjib_checkpoint.spec.parsing import parse_text
from stormjib_checkpoint.state import collect
from stormjib_checkpoint.writer import split
from stormjib_trainer.config import ModelConfig
from stormjib_trainer.model import Llama

SHIPPED = Path(stormjib_checkpoint.spec.__file__).parent / "models"


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.number)
def test_every_row_of_the_table(row: Row) -> None:
    for layout in row.layouts():
        check(layout)
        full = numbered(layout.atoms)
        back = gathered(layout, [cut(layout, rank, full) for rank in range(layout.world)])
        assert all(np.array_equal(back[name], full[name]) for name in full)


def test_the_table_is_whole() -> None:
    assert {row.number.partition("-")[0] for row in ROWS} == {str(number) for number in range(1, 43)}


@pytest.mark.parametrize(
    ("name", "optimizer"), [*((name, "adamw") for name in MODELS), *(("L", name) for name in OPTIMIZERS)]
)
def test_a_model_that_has_stepped_holds_all_atoms(name: str, optimizer: str) -> None:
    """The whole state of one process, as its own layout says, is the atoms of the table."""
    model = model_of(MODELS[name])
    stepper = optimizer_of(optimizer, model)
    loss_of(model, 0).backward()  # type: ignore[no-untyped-call]
    stepper.step()
    parts = split(collect(model, stepper), 0, 1, own(name, optimizer)).parts
    held = {
        atom: [part.box for part in parts if part.name == atom and part.primary]
        for atom in {p.name for p in parts}
    }
    assert {*held} == {*atoms_of(name, optimizer)}
    assert not any(flaw(shape, held[atom]) for atom, shape in atoms_of(name, optimizer).items())


@pytest.mark.parametrize("mesh", [{}, {"pp": 2, "tp": 2, "dp": 3}, {"tp": 3}, {"pp": 3}, {"dp": 5}])
@pytest.mark.parametrize("tied", [True, False])
def test_the_spec_of_the_trainer(mesh: dict[str, int], tied: bool) -> None:
    config = ModelConfig(dim=16, layers=3, heads=4, tied=tied)
    name = "stormjib_llama_tied.json" if tied else "stormjib_llama.json"
    spec = parse_text((SHIPPED / name).read_bytes(), name, {"head": 4})
    weights = {f"model.{n}": tuple(p.shape) for n, p in Llama(config).named_parameters()}
    states = {
        f"optim{n.removeprefix('model')}.{key}": s
        for n, s in weights.items()
        for key in ("exp_avg", "exp_avg_sq")
    }
    layout = spec.on(mesh, weights | states)
    check(layout)
    assert {n for rank in range(layout.world) for n in layout.rank(rank)} >= set(weights)
