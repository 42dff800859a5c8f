"""What ranks save as one layout says, others load as another one does: rows of the resharding table, through real files."""

from __future__ import annotations

import json
import threading
from contextlib import closing, contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch

from fakes.disk import Disk
from fakes.layouts import cut, numbered
from fakes.reshard_specs import ROWS, Row
from fakes.saving import save_rank
from stormjib_checkpoint.boxes import Box
from stormjib_checkpoint.commit import commit_step
from stormjib_checkpoint.engine import Engine
from stormjib_checkpoint.errors import SaveError, StateMismatch, TornCopy, UnsupportedState
from stormjib_checkpoint.history import committed
from stormjib_checkpoint.image import image_of
from stormjib_checkpoint.opening import open_next
from stormjib_checkpoint.reader import Checkpoint
from stormjib_checkpoint.spec.live import Laid, held_by, here
from stormjib_checkpoint.spec.parsing import parse
from stormjib_checkpoint.storage import Local
from stormjib_checkpoint.writer import split

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from stormjib_checkpoint.spec.layout import Layout
    from stormjib_checkpoint.tensors import Held, Value

State = dict[str, torch.Tensor]


def state_of(layout: Layout, rank: int, full: dict[str, Any]) -> dict[str, Value]:
    """A rank's tensors, padding included."""
    return {name: torch.from_numpy(one.astype(np.float64)) for name, one in cut(layout, rank, full).items()}


def saved(storage: Local, layout: Layout, full: dict[str, Any]) -> Checkpoint:
    generation = open_next(storage).generation
    for rank in range(layout.world):
        save_rank(
            storage, step=1, generation=generation, rank=rank, world=layout.world,
            state=state_of(layout, rank, full), train={}, samples={}, layout=layout,
        )  # fmt: skip
    return Checkpoint(storage, commit_step(storage, generation, layout.world, 1))


def loaded(checkpoint: Checkpoint, layout: Layout, rank: int) -> State:
    told = here(layout, rank, layout.world)
    state = {name: torch.full(local.shape, 5.0, dtype=torch.float64) for name, local in told.locals.items()}
    wanted = Laid(told, state, {name: atom.shape for name, atom in checkpoint.atoms.items()})
    checkpoint.fill_parts(wanted.parts)
    wanted.finish()
    return state


THROUGH_FILES = [
    row
    for row in ROWS
    if row.number in {"2", "3", "8", "10", "11", "13", "15", "17", "18", "22", "24", "26", "27", "34"}
]


@pytest.mark.parametrize("row", THROUGH_FILES, ids=lambda row: row.number)
def test_rows_through_files(row: Row) -> None:
    source, target = row.layouts()
    full = numbered(source.atoms)
    for name, shape in source.atoms.items():  # each rank has the same value of what may differ
        if shape != target.atoms[name]:
            full[name] = np.broadcast_to(full[name][:1], shape)
    checkpoint = saved(Local("/job", Disk()), source, full)
    wanted = {
        name: np.broadcast_to(one[:1], target.atoms[name]) if one.shape != target.atoms[name] else one
        for name, one in full.items()
    }
    for rank in range(target.world):
        state = loaded(checkpoint, target, rank)
        for name, tensor in state_of(target, rank, wanted).items():
            assert isinstance(tensor, torch.Tensor)
            assert torch.equal(state[name], tensor.clamp(min=0)), f"{name} on rank {rank}"  # pads are 0


def spec(*rules: dict[str, Any], **fields: Any) -> dict[str, Any]:
    return {"axes": ["dp", "tp"], "rules": list(rules), **fields}


def test_parts_that_lie_between_each_other_in_memory() -> None:
    """Gate and up along the last dimension: rows of the one follow rows of the other."""
    rule = {"match": "w", "parts": {"dim": 1, "of": [1, 1]}, "shard": [{"tp": "parts"}]}
    two, three = (parse(spec(rule)).on({"tp": ranks}, {"model.w": (3, 8)}) for ranks in (2, 3))
    full = numbered(two.atoms)
    checkpoint = saved(Local("/job", Disk()), two, full)
    for rank in range(3):
        wanted = state_of(three, rank, full)["model.w"]
        assert isinstance(wanted, torch.Tensor)
        assert torch.equal(loaded(checkpoint, three, rank)["model.w"], wanted)


BIAS = spec({"match": "bias", "partial": {"over": "dp", "union": "mean"}})


def test_values_that_differ_by_rank_become_their_mean_on_other_ranks() -> None:
    shapes = {"model.bias": (2,)}
    three, two = (parse(BIAS).on({"dp": ranks}, shapes) for ranks in (3, 2))
    checkpoint = saved(Local("/job", Disk()), three, {"model.bias": np.array([[1, 2], [3, 4], [8, 9]])})
    for rank in range(2):
        assert loaded(checkpoint, two, rank)["model.bias"].tolist() == [4.0, 5.0]
    assert [loaded(checkpoint, three, rank)["model.bias"].tolist() for rank in range(3)] == [
        [1, 2],
        [3, 4],
        [8, 9],
    ]
    other = Laid(here(two, 0, 2), {"model.bias": torch.zeros(2)}, {"model.bias": (3, 2)})
    assert [part.shape for part in other.parts] == [(3, 2)]
    with pytest.raises(
        StateMismatch, match=r"model\.bias is \[3, 4\] in the checkpoint and \[2, 2\] in the layout"
    ):
        Laid(here(two, 0, 2), {"model.bias": torch.zeros(2)}, {"model.bias": (3, 4)})


GROUPED = spec(
    {"match": "qkv", "shard": [{"tp": 0, "unit": 4}]},
    views=[{"to": "qkv", "of": ["q", "k", "v"], "dim": 0, "groups": 2}],
)
ATOMS = {"model.q": (4, 3), "model.k": (2, 3), "model.v": (2, 3)}


def test_boxes_of_one_atom_have_keys_of_their_own() -> None:
    """§4.1, §4.2"""
    storage = Local("/job", Disk())
    layout = parse(GROUPED).on({}, ATOMS)
    checkpoint = saved(storage, layout, numbered(layout.atoms))
    assert [(box.offset, box.shape) for box in checkpoint.atoms["model.q"].boxes] == [
        ((0, 0), (2, 3)),
        ((2, 0), (2, 3)),
    ]
    point = committed(storage)[0]
    with storage.open(f"step-{point.step:08d}/g0.1/rank-00000.safetensors") as file:
        head = bytearray(4096)
        file.read_into(0, memoryview(head))
    table = json.loads(head[8 : 8 + int.from_bytes(head[:8], "little")])
    assert {*table} - {"__metadata__"} == {f"{key}model.{x}" for key in ("", "__box.1.") for x in "qkv"}


def test_boxes_of_one_atom_are_in_the_order_of_their_offsets() -> None:
    """§4.1: whatever order they have in memory"""
    layout = parse(spec(views=[{"to": "q_proj", "of": ["q"], "rope": 1}])).on({}, {"model.q": (4, 1)})
    contents = split({"model.q_proj": torch.arange(4.0).reshape(4, 1)}, 0, 1, layout)
    file = image_of(contents.parts, 0, {})
    assert [(box.offset[0], box.start) for box in file.atoms["model.q"].boxes] == [
        (part.box.offset[0], start)
        for part, start in sorted(zip(file.parts, file.starts, strict=True), key=_offset)
    ]
    assert {part.name: part.box.offset[0] for part in file.parts} == {
        "model.q": 0, "__box.1.model.q": 1, "__box.2.model.q": 2, "__box.3.model.q": 3,
    }  # fmt: skip
    assert [
        part.local.item() for part, _ in sorted(zip(file.parts, file.starts, strict=True), key=_offset)
    ] == [0, 2, 1, 3]


def _offset(one: tuple[Held, int]) -> tuple[int, ...]:
    return one[0].box.offset


@pytest.fixture
def engine(tmp_path: Path) -> Iterator[Engine]:
    one = Engine(tmp_path / "job", layout=parse(GROUPED).on({}, ATOMS), volatile=["model.free"])
    yield one
    one.close()


def found(engine: Engine) -> torch.Tensor:
    """The newest step, through the layout."""
    state = {"model.qkv": torch.zeros(8, 3)}
    told = here(parse(GROUPED).on({}, ATOMS), 0, 1)
    checkpoint = Checkpoint(engine.storage, committed(engine.storage)[0])
    checkpoint.fill_parts(held_by(told, state))
    return state["model.qkv"]


def test_an_engine_saves_as_its_layout_says(engine: Engine) -> None:
    state: dict[str, Value] = {"model.qkv": torch.randn(8, 3), "model.free": torch.randn(2)}
    engine.reserve(state)
    for step in (1, 2):
        weight = state["model.qkv"]
        assert isinstance(weight, torch.Tensor)
        weight.add_(1)
        wanted = weight.clone()
        engine.async_save(state, step=step).upload_completion.result(10)
        assert torch.equal(found(engine), wanted)
    atoms = Checkpoint(engine.storage, committed(engine.storage)[0]).atoms
    assert {*atoms} == {*ATOMS, "model.free"}


def test_an_engine_loads_as_another_layout_says(engine: Engine, tmp_path: Path) -> None:
    """What was one matrix is three, with one more beside it that no layout speaks of."""
    weight, free = torch.arange(24.0).reshape(8, 3), torch.randn(2)
    engine.async_save({"model.qkv": weight, "model.free": free}, step=1).upload_completion.result(10)
    engine.close()
    apart = {f"model.{x}": torch.zeros(ATOMS[f"model.{x}"]) for x in "qkv"}
    with closing(Engine(tmp_path / "job")) as plain:
        plain.load(state := {**apart, "model.free": torch.zeros(2)})
    assert torch.equal(state["model.q"], weight[[0, 1, 4, 5]])
    assert torch.equal(state["model.v"], weight[[3, 7]])
    with closing(Engine(tmp_path / "job", layout=parse(GROUPED).on({}, ATOMS))) as again:
        again.load(back := {"model.qkv": torch.zeros(8, 3), "model.free": torch.zeros(2)})
    assert torch.equal(back["model.qkv"], weight)
    assert torch.equal(back["model.free"], free)


def test_a_volatile_tensor_is_copied_in_the_call_also_where_a_layout_cuts_it(tmp_path: Path) -> None:
    layout = parse(GROUPED).on({}, ATOMS)
    for pattern in ("model.q", "model.qkv"):  # by the name of an atom, or its own
        with closing(Engine(tmp_path / pattern, layout=layout, volatile=[pattern])) as engine:
            weight = torch.randn(8, 3)
            wanted = weight.clone()
            engine.reserve({"model.qkv": weight})
            with paused(engine):
                save = engine.async_save({"model.qkv": weight}, step=1)
                weight.zero_()
            save.upload_completion.result(10)
            assert torch.equal(found(engine), wanted)


def test_a_change_while_it_is_copied_is_found_also_where_a_layout_cuts_it(engine: Engine) -> None:
    weight = torch.randn(8, 3)
    engine.reserve({"model.qkv": weight})
    with paused(engine):
        save = engine.async_save({"model.qkv": weight}, step=1)
        weight.add_(1)
    with pytest.raises(TornCopy, match=r"model\.[qkv] changed while it was copied"):
        save.staging_completion.result(10)
    with pytest.raises(TornCopy):
        engine.wait()


@contextmanager
def paused(engine: Engine) -> Iterator[None]:
    """Nothing is copied within it."""
    arena, go_on = engine._berths._berths[0].arena, threading.Event()
    take = arena.take

    def take_later(piece: int) -> None:
        assert go_on.wait(10)
        take(piece)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(arena, "take", take_later)
        yield
        go_on.set()


def test_a_tensor_that_is_cut_otherwise_than_before_is_planned_anew(engine: Engine) -> None:
    """§9: the same shape, and other memory order."""
    state: dict[str, Value] = {"model.qkv": torch.randn(8, 3)}
    engine.async_save(state, step=1).upload_completion.result(10)
    turned = torch.randn(3, 8).t()
    with pytest.raises(SaveError, match="is not what it was at the save before"):
        engine.async_save({"model.qkv": turned}, step=2).staging_completion.result(10)
    engine.wait()
    with pytest.raises(UnsupportedState, match=r"model\.qkv is not contiguous"):
        engine.async_save({"model.qkv": turned}, step=3)


@pytest.mark.parametrize(
    ("rule", "state", "why"),
    [
        ({}, {"model.w": torch.zeros(4, 2)}, r"model\.w has shape \[4, 2\], and the layout says \[2, 2\]"),
        ({"cast": "BF16"}, {"model.w": torch.zeros(2, 2)}, r"model\.w is F32, and the spec casts it to BF16"),
        ({}, {"model.w": torch.zeros(2, 2).t()}, r"model\.w is not contiguous"),
    ],
)
def test_what_a_layout_says_otherwise_is_refused(
    rule: dict[str, Any], state: dict[str, Value], why: str
) -> None:
    layout = parse(spec({"match": "w", "shard": [{"tp": 0}], **rule})).on({"tp": 2}, {"model.w": (4, 2)})
    with pytest.raises(UnsupportedState, match=why):
        split(state, 0, 2, layout)


def test_another_name_of_a_cut_tensor_has_to_be_tied() -> None:
    layout = parse(spec({"match": "w", "shard": [{"tp": 0}]})).on({"tp": 2}, {"model.w": (4, 2)})
    weight = torch.zeros(2, 2)
    with pytest.raises(UnsupportedState, match=r"model\.head is the memory of model\.w.*tie it there"):
        split({"model.w": weight, "model.head": weight}, 0, 2, layout)
    apart = torch.zeros(6, 2)
    beside = {"model.w": apart[:2], "model.other": apart[2:]}
    assert {part.name for part in split(beside, 0, 2, layout).parts} == {"model.w", "model.other"}


def test_a_tie_is_told_and_stored_once() -> None:
    """§9.5"""
    rules = ({"match": "w", "shard": [{"tp": 0}]}, {"match": "head", "tie": "w"})
    layout = parse(spec(*rules)).on({"tp": 2}, {"model.w": (4, 2)})
    weight = torch.zeros(2, 2)
    contents = split({"model.w": weight, "model.head": weight, "step": 3}, 0, 2, layout)
    assert contents.ties == {"model.head": "model.w"}
    assert [(part.name, part.primary) for part in contents.parts] == [("model.w", False), ("model.w", True)]
    checkpoint = saved(Local("/job", Disk()), layout, numbered(layout.atoms))
    assert checkpoint.atoms["model.head"] is checkpoint.atoms["model.w"]


def test_an_atom_without_elements_is_not_lost() -> None:
    """§4.3"""
    layout = parse(spec({"match": "w", "shard": [{"tp": 0}]})).on({"tp": 2}, {"model.w": (0, 2)})
    checkpoint = saved(Local("/job", Disk()), layout, numbered(layout.atoms))
    assert checkpoint.atoms["model.w"].shape == (0, 2)
    assert loaded(checkpoint, layout, 1)["model.w"].shape == (0, 2)


def test_boxes_name_their_copies() -> None:
    layout = parse(spec({"match": "w", "shard": [{"tp": 0}]})).on({"tp": 2, "dp": 3}, {"model.w": (4, 2)})
    (part,) = held_by(here(layout, 4, layout.world), {"model.w": torch.zeros(2, 2)})
    assert (part.box, part.copies, part.tensor) == (Box((2, 0), (2, 2)), 3, "model.w")


def test_a_load_that_was_refused_before_its_first_byte_leaves_a_state_that_can_be_saved(
    tmp_path: Path,
) -> None:
    layout = parse(spec({"match": "w", "shard": [{"tp": 0}]})).on({}, {"model.w": (4, 2)})
    with closing(Engine(tmp_path, layout=layout)) as engine:
        engine.async_save({"model.w": torch.zeros(4, 2)}, step=1).upload_completion.result(10)
    with closing(Engine(tmp_path, layout=layout)) as again:
        with pytest.raises(UnsupportedState, match=r"model\.w has shape \[3, 2\].*rule 'w'"):
            again.load({"model.w": torch.zeros(3, 2)})
        again.async_save({"model.w": torch.zeros(4, 2)}, step=2).upload_completion.result(10)
