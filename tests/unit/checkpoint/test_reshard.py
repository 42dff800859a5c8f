"""Any layout to any layout without process groups: bytes equal, on a disk of short writes, with tiny pieces."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fakes.disk import Disk
from fakes.meshes import Mesh, dtypes, filled, held, meshes, raw, shapes, zeros
from fakes.saving import save_parts
from stormjib_checkpoint.boxes import whole
from stormjib_checkpoint.commit import commit_step
from stormjib_checkpoint.engine import arena
from stormjib_checkpoint.errors import Inconsistent
from stormjib_checkpoint.layout import GenerationId
from stormjib_checkpoint.opening import open_generation
from stormjib_checkpoint.reader import Checkpoint
from stormjib_checkpoint.storage import Local
from stormjib_checkpoint.writer import Part

if TYPE_CHECKING:
    from stormjib_checkpoint.tensors import Held

ATOMS = st.lists(st.tuples(shapes, dtypes), min_size=1, max_size=4)


def save(storage: Local, mesh: Mesh, atoms: dict[str, torch.Tensor], lost: int | None = None) -> None:
    parts: list[list[Held]] = [[] for _ in range(mesh.world)]
    for name, atom in atoms.items():
        for rank, (box, primary) in enumerate(mesh.boxes(tuple(atom.shape))):
            parts[rank].append(held(name, atom, box, primary and rank != lost))
    for rank in range(mesh.world):
        save_parts(storage, Part(1, GenerationId(1, 1), rank, mesh.world), parts[rank], {}, {}, {})


@pytest.mark.filterwarnings("ignore:.*support is experimental")  # torch, of what the test itself copies
@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(kinds=ATOMS, source=meshes, target=meshes, piece=st.integers(1, 300))
def test_what_one_mesh_saves_another_loads(
    monkeypatch: pytest.MonkeyPatch,
    kinds: list[tuple[tuple[int, ...], torch.dtype]],
    source: Mesh,
    target: Mesh,
    piece: int,
) -> None:
    """§4.4"""
    monkeypatch.setattr(arena, "PIECE_BYTES", 16 * piece)
    storage = Local("/job", Disk())
    open_generation(storage, "1.1", "uid")
    atoms = {f"model.{i}": filled(shape, dtype, i) for i, (shape, dtype) in enumerate(kinds)}
    save(storage, source, atoms)
    checkpoint = Checkpoint(storage, commit_step(storage, "1.1", source.world, 1))
    for rank in range(target.world):
        mine = []
        for name, atom in atoms.items():
            box, _ = list(target.boxes(tuple(atom.shape)))[rank]
            mine.append(
                (held(name, atom, box, True), held(name, zeros(tuple(atom.shape), atom.dtype), box, True))
            )
        checkpoint.fill_parts([part for _, part in mine])
        for wanted, part in mine:
            assert raw(part.local) == raw(wanted.local), f"{part.name} {part.box}"


def test_a_part_that_nobody_wrote_keeps_the_step_from_being_committed() -> None:
    """§4.3, §5.1"""
    storage = Local("/job", Disk())
    open_generation(storage, "1.1", "uid")
    save(storage, Mesh((2,), (0,)), {"model.w": filled((6, 2), torch.float32, 0)}, lost=1)
    with pytest.raises(Inconsistent, match=r"model\.w exactly once: 6 of 12 elements"):
        commit_step(storage, "1.1", 2, 1)


def test_column_cuts_and_views_are_filled_in_place() -> None:
    storage = Local("/job", Disk())
    open_generation(storage, "1.1", "uid")
    atom = filled((6, 8), torch.float32, 3)
    save(storage, Mesh((3,), (1,)), {"w": atom})
    checkpoint = Checkpoint(storage, commit_step(storage, "1.1", 3, 1))
    backing = torch.zeros(8, 6)
    part = held("w", atom, whole((6, 8)), True)
    view = backing.t()
    checkpoint.fill_parts([type(part)(part.name, part.dtype, part.shape, part.box, view, True, 1)])
    assert raw(backing.t()) == raw(atom)
