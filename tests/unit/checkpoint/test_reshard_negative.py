"""What cannot be resharded is refused: by the rule, the atom, the shapes and what to do. Nothing that was saved is touched then, and nothing
that was to be filled. And a load that is broken off is begun again, and does no harm."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import TYPE_CHECKING, Any, NamedTuple

import pytest
import torch

from fakes.counted import Counted
from fakes.disk import Disk
from fakes.groups import Member, together
from fakes.saving import save_rank
from stormjib_checkpoint import filling
from stormjib_checkpoint.agreeing import agreed
from stormjib_checkpoint.commit import commit_step
from stormjib_checkpoint.errors import (
    CheckpointError,
    DamagedCheckpoint,
    Inconsistent,
    SpecError,
    StateMismatch,
    StorageDenied,
    UnsupportedState,
)
from stormjib_checkpoint.history import committed
from stormjib_checkpoint.opening import open_next
from stormjib_checkpoint.reader import Checkpoint
from stormjib_checkpoint.spec.check import check
from stormjib_checkpoint.spec.layout import Layout
from stormjib_checkpoint.spec.parsing import parse

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from stormjib_checkpoint.format import ResumePoint
    from stormjib_checkpoint.spec.layout import Patch
    from stormjib_checkpoint.tensors import Value

Shapes = dict[str, tuple[int, ...]]
ATOMS: Shapes = {"model.a.w": (6, 4), "model.b": (5,)}
ROWS = {"match": "a.*", "shard": [{"tp": 0}]}
"""The rule of `a.w`."""
UNTOUCHED = 7.0


def laid(ranks: int, *rules: dict[str, Any], atoms: Shapes = ATOMS) -> Layout:
    return parse({"axes": ["tp"], "rules": [*rules]}).on({"tp": ranks}, atoms)


def full(atoms: Shapes = ATOMS) -> dict[str, torch.Tensor]:
    return {
        name: torch.arange(1.0, 1 + torch.Size(shape).numel()).reshape(shape) for name, shape in atoms.items()
    }


def cut(layout: Layout, rank: int, whole: Mapping[str, torch.Tensor] | None = None) -> dict[str, Value]:
    """A rank's tensors: filled, or as they are before a load."""
    state: dict[str, Value] = {}
    for name, local in layout.rank(rank).items():
        tensor = state[name] = torch.full(local.shape, UNTOUCHED)
        for patch in local.patches if whole is not None else ():
            part = whole[patch.atom] if whole is not None else tensor
            for dim, (offset, size) in enumerate(zip(patch.box.offset, patch.box.shape, strict=True)):
                part = part.narrow(dim, offset, size)
            tensor.as_strided(patch.box.shape, patch.strides, patch.start).copy_(part)
    return state


class Saved:
    """What two ranks have saved."""

    def __init__(self) -> None:
        self.disk = Disk()
        self.storage = Counted("/job", self.disk)
        self.generation = open_next(self.storage).generation

    def leave(self, layout: Layout) -> Saved:
        for rank in range(layout.world):
            save_rank(
                self.storage, step=1, generation=self.generation, rank=rank, world=layout.world,
                state=cut(layout, rank, full()), train={}, samples={}, layout=layout,
            )  # fmt: skip
        return self

    def commit(self) -> ResumePoint:
        return commit_step(self.storage, self.generation, 2, 1)

    def bytes(self) -> list[bytes]:
        return [*self.disk.tree.files.values()]


class Negative(NamedTuple):
    """A row: what is done to a checkpoint, and what must be told."""

    does: Callable[[Saved], object]
    error: type[CheckpointError]
    rule: str
    atom: str
    shapes: tuple[str, ...]
    fix: str


def load(
    target: Layout | None, state_of: Callable[[int], dict[str, Value]], ranks: int = 3
) -> Callable[[Saved], None]:
    """All ranks load; each must be told, and keep what it had."""

    def act(saved: Saved) -> None:
        point = committed(saved.storage)[0]
        told: list[CheckpointError] = []

        def one(member: Member) -> None:
            state = state_of(member.member)
            with pytest.raises(CheckpointError) as found:
                Checkpoint(saved.storage, point).fill(state, layout=target, group=member)
            told.append(found.value)
            for name, value in state.items():
                assert isinstance(value, torch.Tensor)
                assert bool((value == UNTOUCHED).all()), f"{name} was touched"

        together(ranks, one)
        assert len({str(one).partition(": ")[2] for one in told if str(one).startswith("rank ")} or {0}) == 1
        assert saved.storage.bytes_read == 0, "told by the index alone"
        raise next((one for one in told if not str(one).startswith("rank ")), told[0])

    return act


def changed(change: Callable[[Patch], Patch]) -> Callable[[Saved], None]:
    """A spec whose patches are wrong, as a mistake in an operator would make them."""

    def act(_: Saved) -> None:
        with pytest.MonkeyPatch.context() as patch:
            wrong(patch, change)
            check(laid(2, ROWS))

    return act


def wrong(patch: pytest.MonkeyPatch, change: Callable[[Patch], Patch]) -> None:
    true = Layout.rank

    def rank(self: Layout, number: int) -> dict[str, Any]:
        return {
            name: replace(local, patches=tuple(map(change, local.patches)))
            for name, local in true(self, number).items()
        }

    patch.setattr(Layout, "rank", rank)


def lose(patch: Patch) -> Patch:
    """The second half of `a.w` is stored by nobody."""
    return patch._replace(primary=patch.primary and patch.box.offset[0] == 0)


def double(patch: Patch) -> Patch:
    """Both copies are stored."""
    return patch._replace(primary=True)


def committing(change: Callable[[Patch], Patch]) -> Callable[[Saved], object]:
    """Ranks that save so leave parts that are no step."""

    def act(_: Saved) -> object:
        saved = Saved()
        with pytest.MonkeyPatch.context() as patch:
            wrong(patch, change)
            saved.leave(laid(2, ROWS))
        before = saved.bytes()
        try:
            return saved.commit()
        finally:
            assert committed(saved.storage) == []
            assert saved.bytes() == before

    return act


THREE, FOUR = laid(3, ROWS), laid(4, ROWS)
MORE = laid(3, ROWS, {"match": "c", "shard": [{"tp": 0}]}, atoms={**ATOMS, "model.c": (9, 2)})
FEWER = laid(3, ROWS, atoms={"model.a.w": (6, 4)})
WIDER = laid(3, ROWS, atoms={**ATOMS, "model.a.w": (6, 5)})
SAVED_AS = {
    "two rules match": Negative(
        lambda _: laid(3, ROWS, {"match": "*.w", "shard": []}),
        SpecError, "'a.*' and '*.w'", "a.w", ("[6, 4]",), "make one of them narrower",
    ),
    "unused rule": Negative(
        lambda _: laid(3, ROWS, {"match": "a.v", "shard": []}),
        SpecError, "rule 'a.v' is unused", "a.w", ("[6, 4]",), "take it out, or mend it",
    ),
    "shape of an atom": Negative(
        load(WIDER, lambda rank: cut(WIDER, rank)),
        StateMismatch, "rule 'a.*'", "model.a.w", ("[6, 4]", "[6, 5]"), "of the sizes that it was saved with",
    ),
    "shape of an atom, without a layout": Negative(
        load(None, lambda _: {"model.a.w": torch.full((6, 5), UNTOUCHED), "model.b": torch.full((5,), UNTOUCHED)}),
        StateMismatch, "", "model.a.w", ("[6, 4]", "[6, 5]"), "of the sizes that it was saved with",
    ),
    "shape of one rank's tensor": Negative(
        load(THREE, lambda rank: {**cut(THREE, rank), **({"model.a.w": torch.full((3, 4), UNTOUCHED)} if rank == 1 else {})}),
        UnsupportedState, "rule 'a.*'", "model.a.w", ("[3, 4]", "[2, 4]"), "mend the spec, or the mesh",
    ),
    "a layout of other ranks": Negative(
        load(FOUR, lambda rank: cut(FOUR, rank)),
        SpecError, "", "", ("'tp': 4", "4 ranks", "there are 3"), "put the spec on a mesh of as many",
    ),
    "missing atom": Negative(
        load(MORE, lambda rank: cut(MORE, rank)),
        StateMismatch, "rule 'c'", "model.c", ("[9, 2]",), "take it out of the state",
    ),
    "missing atom, without a layout": Negative(
        load(None, lambda _: {name: torch.full(shape, UNTOUCHED) for name, shape in {**ATOMS, "model.c": (9, 2)}.items()}),
        StateMismatch, "", "model.c", ("[9, 2]",), "take it out of the state",
    ),
    "extra atom": Negative(
        load(FEWER, lambda rank: cut(FEWER, rank)),
        StateMismatch, "", "model.b", ("[5]",), "add it to the state",
    ),
    "incomplete tiling": Negative(
        changed(lose), SpecError, "rule 'a.*'", "model.a.w", ("[6, 4]", "12 of 24 elements"), "mend the rule"
    ),
    "incomplete tiling, saved": Negative(
        committing(lose), Inconsistent, "rule for it", "model.a.w", ("[6, 4]", "12 of 24 elements"), "save again"
    ),
    "overlapping boxes": Negative(
        changed(double), SpecError, "no rule", "model.b", ("[5]", "[0:5] overlap"), "mend the rule"
    ),
    "overlapping boxes, saved": Negative(
        committing(double), Inconsistent, "rule for it", "model.b", ("[5]", "[0:5] overlap"), "save again"
    ),
}  # fmt: skip


@pytest.mark.parametrize("row", SAVED_AS.values(), ids=SAVED_AS.keys())
def test_negative_rows(row: Negative) -> None:
    saved = Saved().leave(laid(2, ROWS))
    saved.commit()
    before = saved.bytes()
    with pytest.raises(row.error) as found:
        row.does(saved)
    assert type(found.value) is row.error
    for word in (row.rule, row.atom, *row.shapes, row.fix):
        assert word in str(found.value)
    assert saved.bytes() == before


def test_where_one_rank_is_refused_all_are_and_know_why() -> None:
    """Rank 1 alone has a tensor of another shape. The others learn of it, instead of waiting for it."""
    saved = Saved().leave(laid(2, ROWS))
    point = saved.commit()
    told = {}

    def one(member: Member) -> None:
        state = cut(THREE, member.member)
        if member.member == 1:
            state["model.a.w"] = torch.zeros(9, 9)
        with pytest.raises(CheckpointError) as found:
            Checkpoint(saved.storage, point).fill(state, layout=THREE, group=member)
        told[member.member] = found.value

    together(3, one)
    assert isinstance(told[1], UnsupportedState)
    assert all(isinstance(told[rank], StateMismatch) for rank in (0, 2))
    assert str(told[0]) == str(told[2]) == f"rank 1: {told[1]}"


def all_or_none(member: Member, error: CheckpointError | None) -> None:
    with agreed(member):
        if error is not None:
            raise error


def test_of_several_failures_all_raise_the_worst() -> None:
    """Of a damaged step there is another one to take, and all take it or none does."""
    errors = [DamagedCheckpoint("d\udc80"), None, StateMismatch("m"), StorageDenied("p", "s", "f")]

    def one(member: Member) -> str:
        with pytest.raises(CheckpointError) as found:
            all_or_none(member, errors[member.member])
        return f"{type(found.value).__name__} {found.value}"

    assert together(3, one) == ["StateMismatch rank 2: m", "StateMismatch rank 2: m", "StateMismatch m"]
    assert together(2, one) == [
        "DamagedCheckpoint d\udc80",
        "DamagedCheckpoint rank 0: d\\udc80",
    ]
    assert together(4, one)[1:] == [
        *["StorageError rank 3: p: s. f. Mend it there, and try again."] * 2,
        "StorageDenied p: s. f",
    ]


@pytest.mark.parametrize("after", [0, 1, 2])
def test_a_load_that_breaks_off_is_begun_again_without_harm(
    monkeypatch: pytest.MonkeyPatch, after: int
) -> None:
    """A rank dies between two reads. The files are what they were, and the same tensors are filled from the start."""
    saved = Saved().leave(laid(2, ROWS))
    point, before = saved.commit(), saved.bytes()
    states = [cut(THREE, rank) for rank in range(3)]
    died: list[int] = []

    def breaking(self: filling.Filling, start: int, view: memoryview) -> None:
        died.append(start)
        if len(died) > after:
            raise KeyboardInterrupt
        true(self, start, view)

    def one(member: Member) -> None:
        Checkpoint(saved.storage, point).fill(states[member.member], layout=THREE, group=member)

    true = filling.Filling._get
    with monkeypatch.context() as patch:
        patch.setattr(filling.Filling, "_get", breaking)
        with pytest.raises(KeyboardInterrupt):
            together(3, one)
    assert len(died) > after
    assert saved.bytes() == before
    together(3, one)
    for rank, state in enumerate(states):
        for name, value in cut(THREE, rank, full()).items():
            assert isinstance(value, torch.Tensor)
            assert torch.equal(state[name], value), f"{name} on rank {rank}"
    assert saved.bytes() == before


def test_what_is_renamed_is_filled_as_a_layout_says_and_what_is_left_over_is_told() -> None:
    saved = Saved().leave(laid(2, ROWS))
    point = saved.commit()
    renamed = laid(3, {"match": "z.*", "shard": [{"tp": 0}]}, atoms={"model.z.w": (6, 4), "model.b": (5,)})

    def rename(name: str) -> str:
        return name.replace("model.a.", "model.z.")

    def one(member: Member) -> None:
        state = cut(renamed, member.member)
        Checkpoint(saved.storage, point, rename).fill(state, layout=renamed, group=member)
        wanted = {rename(name): value for name, value in cut(THREE, member.member, full()).items()}
        assert all(torch.equal(state[name], wanted[name]) for name in wanted)
        less = laid(3, atoms={"model.b": (5,)})
        with pytest.raises(StateMismatch, match=re.escape("model.z.w of the checkpoint is not in the state")):
            Checkpoint(saved.storage, point, rename).fill(cut(less, member.member), layout=less, group=member)

    together(3, one)
