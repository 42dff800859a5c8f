"""The groups file: equal keys on all ranks, each group once, bounded whatever a rank writes."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

from hypothesis import given, settings
from hypothesis import strategies as st

from stormjib_health.records import groups
from stormjib_health.records.groups import GroupsReader, GroupsWriter, group_key, groups_path
from stormjib_health.records.layout import MAX_GROUPS, MAX_RANK
from stormjib_health.wire import Group, Span

if TYPE_CHECKING:
    from pathlib import Path

    import pytest


def test_groups_come_out_once_and_in_order(tmp_path: Path) -> None:
    path = groups_path(tmp_path, 0)
    writer, reader = GroupsWriter(path), GroupsReader(path)
    assert reader.read() == ()
    assert writer.add("default_pg", (0, 1)) == 0
    assert [(group.name, group.ranks) for group in reader.read()] == [("default_pg", (0, 1))]
    assert writer.add("dp", (1,)) == 1
    assert [group.name for group in reader.read()] == ["dp"]
    assert reader.read() == ()
    assert reader.group(1) == Group.of(group_key("dp", (1,), 0), "dp", (1,))
    assert reader.group(2) is None


def test_a_key_is_equal_on_all_ranks_and_of_no_other_group(tmp_path: Path) -> None:
    keys = []
    for rank in (0, 1):
        writer, reader = GroupsWriter(tmp_path / str(rank)), GroupsReader(tmp_path / str(rank))
        if rank:
            writer.add("only here", (1,))
        for name, ranks in (("dp", (0, 1)), ("dp", (0, 1)), ("dp", (1, 0)), ("tp", (0, 1))):
            writer.add(name, ranks)
        keys.append([group.key for group in reader.read()][-4:])
    assert keys[0] == keys[1]
    assert len(set(keys[0])) == 4
    assert all(0 <= key < 1 << 48 for key in keys[0])


def test_a_line_that_is_not_whole_yet_is_read_later(tmp_path: Path) -> None:
    path = tmp_path / "0.groups"
    line = json.dumps([5, "dp", [0, 1]]).encode() + b"\n"
    path.write_bytes(line[:9])
    reader = GroupsReader(path)
    assert reader.read() == ()
    path.write_bytes(line)
    assert reader.read() == (Group.of(5, "dp", (0, 1)),)


def test_a_bad_line_takes_its_index_so_that_the_others_keep_theirs(tmp_path: Path) -> None:
    path = tmp_path / "0.groups"
    path.write_bytes(b'[1,"a",[0]]\n{}\n[3,"c",[2]]\n')
    reader = GroupsReader(path)
    reader.read()
    assert [group and group.name for group in reader.groups] == ["a", None, "c"]


def test_writer_and_reader_stop_at_the_bound(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "0.groups"
    writer, reader = GroupsWriter(path), GroupsReader(path)
    indices = [writer.add("dp", (0,)) for _ in range(MAX_GROUPS + 2)]
    assert indices[-3:] == [MAX_GROUPS - 1, None, None]
    with path.open("ab") as file:
        file.write(b'[1,"a",[0]]\n' * 5)
    assert len(reader.read()) == MAX_GROUPS
    assert reader.read() == ()
    monkeypatch.setattr(groups, "MAX_FILE", 40)
    small = GroupsWriter(tmp_path / "1.groups")
    assert [small.add("dp", (0, 1)) for _ in range(3)] == [0, None, None]


value = st.recursive(
    st.none() | st.booleans() | st.integers(-2, MAX_RANK + 1) | st.floats() | st.text(max_size=3),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=2), inner, max_size=2),
    max_leaves=6,
)
line = st.binary(max_size=40) | value.map(lambda v: json.dumps(v).encode()) | st.just(b"[" * 3000)


@settings(max_examples=300)
@given(
    lines=st.lists(line | st.tuples(value, value, value).map(lambda v: json.dumps(v).encode()), max_size=6)
)
def test_garbage_never_breaks_the_reader_and_gives_bounded_values(
    tmp_path_factory: pytest.TempPathFactory, lines: list[bytes]
) -> None:
    path = tmp_path_factory.mktemp("groups") / "0.groups"
    path.write_bytes(b"\n".join(lines))
    for group in GroupsReader(path).read():
        assert 0 <= group.key < 1 << 48
        assert type(group.name) is str
        assert group.ranks
        assert all(0 <= rank < MAX_RANK for rank in group.ranks)


@given(st.lists(st.integers(0, 12), max_size=12) | st.lists(st.integers(0, MAX_RANK - 1), max_size=12))
def test_spans_say_all_ranks_in_their_order_and_the_same_ones_for_the_same_ranks(ranks: list[int]) -> None:
    group = Group.of(7, "g", ranks)
    assert group.ranks == tuple(ranks)
    assert group.size == len(ranks)
    assert len(group.spans) <= (len(ranks) + 1) // 2
    assert Group.of(7, "g", group.ranks) == group


def test_rows_and_columns_of_a_mesh_are_one_span() -> None:
    mesh = [range(10_000), range(8, 16), range(3, 10_000, 8)]
    assert [Group.of(7, "g", ranks).spans for ranks in mesh] == [
        (Span(0, 10_000),),
        (Span(8, 8),),
        (Span(3, 1250, 8),),
    ]
