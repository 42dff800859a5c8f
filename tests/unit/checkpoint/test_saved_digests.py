"""What a saver says of its boxes: partial digests of exactly the elements that lie in its file, whoever copied them and in which order."""

from __future__ import annotations

import threading
from random import Random
from typing import TYPE_CHECKING, Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.distributed.checkpoint.state_dict_saver import save as dcp_save

from fakes.digests import of, said
from fakes.meshes import Mesh, filled, held, meshes, raw
from fakes.saving import commit_states, save_parts
from stormjib_checkpoint import hashing
from stormjib_checkpoint.boxes import whole
from stormjib_checkpoint.dcp import StormjibWriter
from stormjib_checkpoint.engine import Engine
from stormjib_checkpoint.engine.arena import Arena
from stormjib_checkpoint.engine.staging import Copying
from stormjib_checkpoint.format import ITEM_BYTES, PIECE_BYTES
from stormjib_checkpoint.hashing import Hashing, Memory
from stormjib_checkpoint.image import image_of
from stormjib_checkpoint.layout import GenerationId
from stormjib_checkpoint.storage import Local
from stormjib_checkpoint.tensors import TAGS
from stormjib_checkpoint.writer import Part

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

pytestmark = pytest.mark.filterwarnings("ignore:.* support is experimental:UserWarning")

GENERATION = GenerationId(1, 1)


def wanted(state: Mapping[str, Any]) -> dict[str, str]:
    return {name: of(tensor) for name, tensor in state.items()}


every_type = {
    f"w{number:02}": filled((2, 3), dtype, number) for number, dtype in enumerate(sorted(TAGS, key=str))
}


def test_every_type_and_size_that_is_saved_has_a_digest(tmp_path: Path) -> None:
    """§4.8"""
    state = every_type | {
        "scalar": torch.tensor(1.5),
        "none": torch.zeros(0, 3),
        "row": filled((1, 9), torch.float64, 1),
    }
    commit_states(Local(tmp_path), state)
    assert said(tmp_path, 1) == wanted(state)


@settings(max_examples=40)
@given(meshes, st.tuples(st.integers(1, 9), st.integers(1, 9)), st.sampled_from(sorted(TAGS, key=str)))
def test_the_digest_of_an_atom_does_not_depend_on_how_it_was_sharded(
    tmp_path_factory: pytest.TempPathFactory, mesh: Mesh, shape: tuple[int, int], dtype: torch.dtype
) -> None:
    """§4.8"""
    root, atom = tmp_path_factory.mktemp("mesh"), filled(shape, dtype, 3)
    for rank, (box, primary) in enumerate(mesh.boxes(shape)):
        part = held("w", atom, box, primary)
        save_parts(Local(root), Part(1, GENERATION, rank, mesh.world), [part], {}, {}, {})
    assert said(root, 1) == {"w": of(atom)}


def test_one_that_spans_pieces_and_blocks_and_is_copied_by_several_threads() -> None:
    state = {
        "w": filled((2 * PIECE_BYTES // 4 + 77,), torch.float32, 1),
        "z": filled((5 << 20,), torch.uint8, 2),
    }
    file = image_of([held(name, atom, whole(tuple(atom.shape)), True) for name, atom in state.items()], 0, {})
    arena = Arena(file.size)
    copying = Copying(file, [part.local for part in file.parts], arena, arena.free)
    threads = [threading.Thread(target=copying.work) for _ in range(3)]
    for thread in threads:
        thread.start()
    staged = copying.finish()
    for thread in threads:
        thread.join()
    assert list(staged.digests) == [of(state[part.name]) for part in file.parts]


@given(
    st.lists(st.tuples(st.sampled_from(sorted(TAGS, key=str)), st.integers(1, 900)), max_size=6),
    st.integers(0, 99),
)
def test_pieces_and_blocks_hold_whole_elements(parts: list[tuple[torch.dtype, int]], seed: int) -> None:
    """§4.1: the data begins at 4096, widest elements first, so each part begins where its elements are aligned."""
    atoms = [filled((count,), dtype, seed + number) for number, (dtype, count) in enumerate(parts)]
    file = image_of(
        [held(f"w{number}", atom, whole(tuple(atom.shape)), True) for number, atom in enumerate(atoms)], 0, {}
    )
    arena = Arena(file.size)
    arena.piece_bytes = 1024
    ours = Hashing(file, arena.piece_bytes)
    source = file.head + b"".join(raw(part.local) for part in file.parts)
    order = list(range(ours.pieces))
    Random(seed).shuffle(order)
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(hashing, "BLOCK_BYTES", 256)
        for piece in order:
            for number, at, upto in ours.blocks(piece, Memory(arena.view, arena.address)):
                arena.view[at:upto] = source[at:upto]
                size = ITEM_BYTES[file.parts[number - 1].dtype] if number else 1
                start = file.starts[number - 1] if number else 0
                assert (at - start) % size == (upto - start) % size == 0
    assert list(ours.staged().digests) == [of(part.local) for part in file.parts]


def test_what_the_engine_saves_has_digests_of_the_state_of_the_call(tmp_path: Path) -> None:
    engine = Engine(tmp_path)
    state = every_type | {
        "turned": torch.randn(50, 30).t(),
        "conj": torch.randn(9, dtype=torch.complex64).conj(),
    }
    right = wanted(state)
    save = engine.async_save(dict(state), step=1)
    engine.guard()
    state["turned"].zero_()
    save.upload_completion.result(10)
    engine.close()
    assert said(tmp_path, 1) == right


@pytest.mark.filterwarnings("ignore:torch.distributed is:UserWarning")
def test_what_dcp_saves_with_our_writer_has_digests(tmp_path: Path) -> None:
    state = {"w": torch.randn(33, 7), "b": torch.randn(5).to(torch.bfloat16)}
    dcp_save(dict(state), checkpoint_id=str(tmp_path), storage_writer=StormjibWriter())
    assert said(tmp_path, 0) == wanted(state)
