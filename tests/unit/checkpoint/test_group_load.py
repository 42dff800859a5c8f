"""A group loads together: from any mesh to any mesh, each byte read as seldom as can be, proved by one sum, and healed where only a
copy was wrong."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fakes.counted import Counted
from fakes.disk import Disk
from fakes.groups import Member, together
from fakes.meshes import Mesh, dtypes, filled, held, meshes, raw, shapes, zeros
from fakes.saving import commit_states, save_parts
from stormjib_checkpoint import digest, exchange, loading, tensors
from stormjib_checkpoint.boxes import whole
from stormjib_checkpoint.commit import commit_step
from stormjib_checkpoint.engine import arena
from stormjib_checkpoint.errors import DamagedCheckpoint, StateMismatch, StorageDenied, StorageError
from stormjib_checkpoint.layout import GenerationId
from stormjib_checkpoint.node_memory import Near
from stormjib_checkpoint.opening import open_generation
from stormjib_checkpoint.reader import Checkpoint
from stormjib_checkpoint.spec.parsing import parse
from stormjib_checkpoint.storage import Local
from stormjib_checkpoint.writer import Part

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from stormjib_checkpoint.format import ResumePoint
    from stormjib_checkpoint.storage import Opened, Storage
    from stormjib_checkpoint.tensors import Held, Value

ROOT = "/job"
Atoms = dict[str, torch.Tensor]


class Saved:
    """Atoms that a mesh has saved."""

    def __init__(self, mesh: Mesh, atoms: Atoms, request_bytes: int = 4) -> None:
        self.atoms = atoms
        self.disk = Disk()
        self.storage = Counted(ROOT, self.disk, request_bytes)
        open_generation(self.storage, "1.1", "uid")
        for rank in range(mesh.world):
            parts = [part for part, _ in parts_of(mesh, atoms, rank)]
            save_parts(self.storage, Part(1, GenerationId(1, 1), rank, mesh.world), parts, {}, {}, {})
        self.point: ResumePoint = commit_step(self.storage, "1.1", mesh.world, 1)

    def load(self, mesh: Mesh) -> list[int]:
        """What came to each rank from others. Raises what the load raises."""
        self.storage.bytes_read = self.storage.requests = self.storage.opened = 0

        def one(member: Member) -> int:
            mine = parts_of(mesh, self.atoms, member.member)
            Checkpoint(self.storage, self.point).fill_parts([part for _, part in mine], group=member)
            for wanted, part in mine:
                assert raw(part.local) == raw(wanted.local), f"{part.name} {part.box}"
            return member.handed

        return together(mesh.world, one)

    def damage(self, name: str, of: int) -> None:
        """Change one byte of the tensors of a rank's file."""
        path = f"{ROOT}/step-00000001/g1.1/rank-{of:05d}.safetensors"
        data = bytearray(self.disk.content(path))
        data[-1] ^= 1
        self.disk.damage(path, bytes(data))


def parts_of(mesh: Mesh, atoms: Mapping[str, torch.Tensor], rank: int) -> list[tuple[Held, Held]]:
    """Of each atom what a rank has, with its values, and empty."""
    found = []
    for name, atom in atoms.items():
        shape = tuple(atom.shape)
        box, primary = list(mesh.boxes(shape))[rank]
        copies = mesh.copies(shape)
        empty = zeros(shape, atom.dtype)
        found.append((held(name, atom, box, primary, copies), held(name, empty, box, primary, copies)))
    return found


def nbytes(atoms: Atoms) -> int:
    return sum(atom.numel() * atom.element_size() for atom in atoms.values())


SOME = {"model.w": filled((24, 10), torch.float32, 1), "model.b": filled((7,), torch.bfloat16, 2)}


@pytest.mark.filterwarnings("ignore:.*support is experimental")  # torch, of what the test itself copies
@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    kinds=st.lists(st.tuples(shapes, dtypes), min_size=1, max_size=4),
    source=meshes,
    target=meshes,
    piece=st.integers(1, 300),
)
def test_what_one_mesh_saves_a_group_on_another_loads(
    monkeypatch: pytest.MonkeyPatch,
    kinds: list[tuple[tuple[int, ...], torch.dtype]],
    source: Mesh,
    target: Mesh,
    piece: int,
) -> None:
    """§7.4"""
    monkeypatch.setattr(arena, "PIECE_BYTES", 16 * piece)
    monkeypatch.setattr(exchange, "SPAN", 64)
    monkeypatch.setattr(loading, "SLAB_BYTES", 48)
    monkeypatch.setattr(loading, "WINDOW_BYTES", 100)
    atoms = {f"model.{i}": filled(shape, dtype, i) for i, (shape, dtype) in enumerate(kinds)}
    Saved(source, atoms).load(target)


@pytest.mark.parametrize(
    ("source", "target"),
    [((8,), (7,)), ((7,), (8,)), ((5,), (64,)), ((4,), (4,)), ((1,), (6,)), ((64,), (3,))],
)
def test_each_byte_is_read_once_where_rows_are_cut_otherwise(source: tuple[int], target: tuple[int]) -> None:
    saved = Saved(Mesh(source, (0,)), SOME)
    handed = saved.load(Mesh(target, (0,)))
    assert saved.storage.bytes_read == nbytes(SOME)
    assert not any(handed)


@pytest.mark.parametrize(("source", "target"), [(0, 1), (1, 0)])
def test_each_byte_is_read_once_where_columns_are_cut(source: int, target: int) -> None:
    atoms = {"model.w": filled((40, 64), torch.float32, 1)}
    saved = Saved(Mesh((4,), (source,)), atoms)
    saved.load(Mesh((8,), (target,)))
    assert saved.storage.bytes_read == nbytes(atoms)


@pytest.mark.parametrize("replicas", [3, 4, 8])
def test_replicas_read_each_byte_once_and_hand_it_on(replicas: int) -> None:
    saved = Saved(Mesh((2,), (0,)), SOME)
    handed = saved.load(Mesh((replicas,), (None,)))
    assert saved.storage.bytes_read == nbytes(SOME)
    assert sum(handed) == (replicas - 1) * nbytes(SOME)


def test_a_store_is_asked_for_few_large_pieces() -> None:
    """Where a request costs as much as a megabyte, what lies between is read too."""
    atoms = {f"model.{i}": filled((40, 64), torch.float32, i) for i in range(6)}
    saved = Saved(Mesh((1,), (0,)), atoms, request_bytes=1 << 20)
    saved.load(Mesh((2,), (0,)))
    assert saved.storage.requests == 2, "one for each rank"


def test_what_short_runs_of_two_ranks_lie_in_is_read_once_for_both() -> None:
    atoms = {f"model.{i}": filled((40, 64), torch.float32, i) for i in range(6)}
    saved = Saved(Mesh((1,), (0,)), atoms, request_bytes=1 << 20)
    handed = saved.load(Mesh((2,), (1,)))
    assert saved.storage.bytes_read == nbytes(atoms)
    assert sum(handed) == nbytes(atoms) // 2


@pytest.mark.parametrize(
    "mesh", [Mesh((3,), (0,)), Mesh((4,), (None,)), Mesh((2, 2), (None, 0)), Mesh((2,), (1,))]
)
def test_damage_is_found_by_all_and_the_file_is_named_by_who_has_read_it(mesh: Mesh) -> None:
    saved = Saved(Mesh((2,), (0,)), SOME)
    saved.damage("model.w", 1)
    told: list[str] = []

    def one(member: Member) -> None:
        parts = [part for _, part in parts_of(mesh, SOME, member.member)]
        with pytest.raises(DamagedCheckpoint) as found:
            Checkpoint(saved.storage, saved.point).fill_parts(parts, group=member)
        told.append(str(found.value))

    together(mesh.world, one)
    assert len(told) == mesh.world
    assert any("rank-00001.safetensors: bytes" in text for text in told)
    assert all("model.b" in text for text in told), "the last tensor of the file"


def test_what_was_wrong_only_on_the_way_is_healed_from_the_storage(monkeypatch: pytest.MonkeyPatch) -> None:
    """§7.5. A bit flips between two ranks: the sum tells, pieces are read from the storage, and the load is right."""
    flipped: list[int] = []
    swapped = Member.swapped

    def flip(member: Member, outgoing: list[bytearray], incoming: list[int]) -> list[memoryview]:
        found = swapped(member, outgoing, incoming)
        if member.member == 2 and not flipped and any(incoming):
            victim = next(one for one in found if len(one))
            victim[len(victim) // 2] ^= 16
            flipped.append(len(victim))
        return found

    monkeypatch.setattr(Member, "swapped", flip)
    saved = Saved(Mesh((2,), (0,)), SOME)
    saved.load(Mesh((4,), (None,)))
    assert flipped, "the fault fired"
    assert saved.storage.bytes_read > nbytes(SOME)


def test_what_its_saver_has_digested_otherwise_is_refused_though_every_checksum_holds(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """As where a saver takes a shard for another one: what it has written is whole, and it is not what it says."""
    with monkeypatch.context() as patch:
        patch.setattr(digest, "geometry", lambda shape, box: digest.Geometry((box.volume,), (1,), 5))
        saved = Saved(Mesh((2,), (0,)), SOME)
    with pytest.raises(
        DamagedCheckpoint,
        match=r"loaded of model\.b, model\.w does not add up .* from .*rank-0000[01]\.safetensors",
    ):
        saved.load(Mesh((2,), (0,)))


def test_another_type_is_loaded_only_where_that_was_said() -> None:
    saved = Saved(Mesh((3,), (0,)), {"model.w": torch.randn(9, 4)})
    state = {"model.w": torch.zeros(9, 4, dtype=torch.bfloat16)}
    checkpoint = Checkpoint(saved.storage, saved.point)
    with pytest.raises(
        StateMismatch, match=r"model\.w is F32 \[9, 4\] in the checkpoint, BF16.*name it in cast="
    ):
        checkpoint.fill(state)
    checkpoint.fill(state, cast=["model.*"])
    assert torch.equal(state["model.w"], saved.atoms["model.w"].bfloat16())


def test_shapes_are_never_cast() -> None:
    saved = Saved(Mesh((1,), (0,)), {"model.w": torch.randn(9, 4)})
    with pytest.raises(StateMismatch, match=r"\[9, 4\].*\[4, 9\]"):
        Checkpoint(saved.storage, saved.point).fill({"model.w": torch.zeros(4, 9)}, cast=["*"])


def test_each_stage_of_a_pipeline_names_what_it_has_and_together_they_have_all() -> None:
    saved = Saved(Mesh((1,), (None,)), {"model.0": torch.randn(3), "model.1": torch.randn(4)})

    def stage(member: Member) -> None:
        name = f"model.{member.member}"
        state: dict[str, Value] = {name: torch.zeros(3 + member.member)}
        Checkpoint(saved.storage, saved.point).fill(state, group=member)
        assert torch.equal(state[name], saved.atoms[name])

    together(2, stage)


def test_beside_the_tensors_no_more_than_a_window_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    """Strided targets are filled through memory beside them, which is bounded."""
    monkeypatch.setattr(loading, "SLAB_BYTES", 1000)
    monkeypatch.setattr(loading, "WINDOW_BYTES", 4000)
    taken: list[int] = []

    def counted(shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        found = tensors.empty(shape, dtype)
        taken.append(found.numel() * found.element_size())
        return found

    def seen(wanted: Sequence[loading.Wanted]) -> list[list[loading.Aim]]:
        found = loaded_in(wanted)
        windows.extend(sum(aim.box.volume * 4 for aim in batch) for batch in found)
        return found

    windows: list[int] = []
    loaded_in = loading.batches
    monkeypatch.setattr(loading, "batches", seen)
    monkeypatch.setattr(loading, "empty", counted)
    atom = torch.randn(60, 50)
    saved = Saved(Mesh((3,), (0,)), {"model.w": atom})
    target = torch.zeros(50, 60).t()
    part = held("model.w", atom, whole((60, 50)), True)
    checkpoint = Checkpoint(saved.storage, saved.point)
    checkpoint.fill_parts([type(part)(part.name, part.dtype, part.shape, part.box, target, True, 1)])
    assert torch.equal(target, atom)
    assert max(taken) <= 1000
    assert max(windows) <= 4000
    assert sum(windows) >= atom.numel() * 4, "the whole tensor has gone through them"


def test_files_of_which_all_has_been_handed_on_are_not_opened() -> None:
    saved = Saved(Mesh((2,), (0,)), SOME)
    saved.load(Mesh((4,), (None,)))
    assert saved.storage.opened == 2, "by who reads them for all"


class Spoiled(Near):
    """A node's memory that has every file: with its last byte changed, or gone when it is opened."""

    def __init__(self, storage: Storage, gone: bool) -> None:
        self._of, self._gone = storage, gone

    def has(self, path: str) -> bool:
        return True

    @contextlib.contextmanager
    def open(self, path: str) -> Iterator[Opened]:
        with self._of.open(f"{path}.lost" if self._gone else path) as file:
            yield Flipped(file)


class Flipped:
    def __init__(self, file: Opened) -> None:
        self._file, self.size = file, file.size

    def read_into(self, offset: int, buffer: memoryview) -> int:
        found = self._file.read_into(offset, buffer)
        if offset + found == self.size:
            buffer[-1] ^= 1
        return found


@pytest.mark.parametrize("gone", [True, False])
@pytest.mark.parametrize("size", [1, 3])
def test_what_a_nodes_memory_has_lost_or_changed_is_read_from_the_storage(size: int, gone: bool) -> None:
    saved = Saved(Mesh((1,), (0,)), SOME)

    def one(member: Member) -> None:
        near = Spoiled(saved.storage, gone) if member.member == 0 else None
        state: dict[str, Value] = {name: torch.zeros_like(value) for name, value in SOME.items()}
        Checkpoint(saved.storage, saved.point, None, near).fill(state, group=member)
        for name, value in SOME.items():
            found = state[name]
            assert isinstance(found, torch.Tensor)
            assert raw(found) == raw(value)

    together(size, one)


def test_what_shares_memory_counts_too_when_the_rest_is_healed() -> None:
    """One rank has both atoms in one memory, which is read apart; what the other has read of its node's memory is wrong, and read again."""
    value = filled((4, 2), torch.float32, 1)
    saved = Saved(Mesh((1,), (0,)), {"model.a": value, "model.b": value.clone()})

    def one(member: Member) -> None:
        first = torch.zeros(4, 2)
        state: dict[str, Value] = {
            "model.a": first,
            "model.b": first if member.member == 0 else torch.zeros(4, 2),
        }
        near = Spoiled(saved.storage, gone=False) if member.member == 1 else None
        Checkpoint(saved.storage, saved.point, None, near).fill(state, group=member)
        assert all(torch.equal(one, value) for one in state.values() if isinstance(one, torch.Tensor))

    together(2, one)


def test_of_tied_names_each_rank_may_have_one_or_both() -> None:
    """The last stage of a pipeline has the embedding under both of its names, in one memory; the first one has it under one."""
    storage = Local(ROOT, Disk())
    weight = filled((4, 2), torch.float32, 1)
    point = commit_states(storage, {"model.emb": weight, "model.head": weight})

    def one(member: Member) -> None:
        mine = torch.zeros(4, 2)
        state: dict[str, Value] = {"model.emb": mine}
        if member.member:
            state["model.head"] = mine if member.member == 1 else torch.zeros(4, 2)
        Checkpoint(storage, point).fill(state, group=member)
        assert all(torch.equal(one, weight) for one in state.values() if isinstance(one, torch.Tensor))

    for size in (2, 3, 5):
        together(size, one)


def test_parts_that_lie_between_each_other_in_one_tensor_are_read_as_others_are(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Gate and up along the last dimension: rows of the one follow rows of the other, and share no element."""
    rule = {"match": "w", "parts": {"dim": 1, "of": [1, 1]}, "shard": [{"tp": "parts"}]}
    layout = parse({"axes": ["tp"], "rules": [rule]}).on({"tp": 2}, {"model.w": (3, 8)})
    weight = filled((3, 8), torch.float32, 1)
    saved = Saved(Mesh((1,), (0,)), {"model.w": weight})

    def one(member: Member) -> None:
        state: dict[str, Value] = {"model.w": torch.zeros(3, 4)}
        Checkpoint(saved.storage, saved.point).fill(state, layout=layout, group=member)
        first = 2 * member.member
        wanted = torch.cat([weight[:, first : first + 2], weight[:, 4 + first : 6 + first]], 1)
        assert isinstance(state["model.w"], torch.Tensor)
        assert torch.equal(state["model.w"], wanted)

    saved.storage.bytes_read = 0
    together(2, one)
    assert saved.storage.bytes_read == weight.numel() * 4, "and none of it in whole pieces"


def test_what_nobody_else_wants_is_not_talked_about(monkeypatch: pytest.MonkeyPatch) -> None:
    """Hundreds of ranks with ten thousand requests each would tell one another of them for minutes."""
    told: list[int] = []
    gathered = Member.gathered

    def listen(member: Member, numbers: list[int]) -> list[list[int]]:
        told.append(len(numbers))
        return gathered(member, numbers)

    monkeypatch.setattr(Member, "gathered", listen)
    saved = Saved(Mesh((8,), (0,)), SOME)
    saved.load(Mesh((7,), (0,)))
    assert told
    assert not any(told)
    saved.load(Mesh((4,), (None,)))
    assert any(told), "replicas do"


@pytest.mark.parametrize("mesh", [Mesh((3,), (0,)), Mesh((3,), (None,))])
def test_where_one_rank_may_not_read_no_other_waits_for_it(
    monkeypatch: pytest.MonkeyPatch, mesh: Mesh
) -> None:
    saved = Saved(Mesh((2,), (0,)), SOME)
    stored = loading.Loading._stored

    def denied(self: loading.Loading, rank: int) -> contextlib.AbstractContextManager[Opened]:
        if self._group.member == 1:
            raise StorageDenied("rank-00000", "no permission", "Grant it.")
        return stored(self, rank)

    monkeypatch.setattr(loading.Loading, "_stored", denied)

    def one(member: Member) -> str:
        parts = [part for _, part in parts_of(mesh, SOME, member.member)]
        with pytest.raises(StorageError) as found:
            Checkpoint(saved.storage, saved.point).fill_parts(parts, group=member)
        return str(found.value)

    told = together(3, one)
    assert told[1] == "rank-00000: no permission. Grant it."
    assert told[0] == told[2] == f"rank 1: {told[1]}. Mend it there, and try again."


def test_what_all_want_is_read_once_though_it_lies_between_what_each_has_a_part_of() -> None:
    """As weights between the moments of an optimizer that is shared out: in one request with them they would be read by everybody."""
    atoms = {f"model.{i}": filled((8, 6), torch.float32, i) for i in range(6)}
    saved = Saved(Mesh((1,), (0,)), atoms, request_bytes=64)
    whole_, shared = Mesh((4,), (None,)), Mesh((4,), (0,))

    def one(member: Member) -> None:
        pairs = [
            pair
            for number, name in enumerate(atoms)
            for pair in parts_of((whole_, shared)[number % 2], {name: atoms[name]}, member.member)
        ]
        Checkpoint(saved.storage, saved.point).fill_parts([part for _, part in pairs], group=member)
        assert all(raw(part.local) == raw(wanted.local) for wanted, part in pairs)

    together(4, one)
    assert saved.storage.bytes_read == nbytes(atoms)
