"""Who reads what several want: pure, the same for all, each byte once where that is worth it."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING

import pytest
from hypothesis import given
from hypothesis import strategies as st

from stormjib_checkpoint.exchange import LEAST_SPAN, WINDOW_BYTES, span_of
from stormjib_checkpoint.sharing import MANY, Handing, Key, Runs, handings, rounds

if TYPE_CHECKING:
    from collections.abc import Iterable

KEYS = [Key(rank, start * 100, 100 - rank) for rank in range(3) for start in range(5)]
NOBODY: list[set[int]] = [set()] * 8


def all_of(keys: Iterable[Key]) -> dict[Key, Runs]:
    return {key: Runs(1, 0, key.length) for key in keys}


ALL = all_of(KEYS)


def test_what_one_or_two_want_each_reads_by_itself() -> None:
    assert handings([ALL, ALL, {}], NOBODY[:3]) == []


def test_what_replicas_want_is_read_once_and_by_all_in_equal_parts() -> None:
    found = handings([ALL] * 4, NOBODY[:4])
    assert [one.key for one in found] == sorted(KEYS)
    assert all(sorted((one.owner, *one.receivers)) == [0, 1, 2, 3] for one in found)
    read = Counter[int]()
    for one in found:
        read[one.owner] += one.key.length
    assert max(read.values()) - min(read.values()) <= 100


def test_what_lies_in_the_memory_of_another_node_is_got_from_there_also_by_one() -> None:
    found = handings([all_of(KEYS[:1]), {}, {}], [set(), set(), {0}])
    assert found == [Handing(KEYS[0], 2, {0: Runs(1, 0, 100)})]


def test_who_has_it_near_reads_it_itself() -> None:
    assert handings([all_of(KEYS[:1]), {}], [{0}, {0}]) == []
    assert handings([all_of(KEYS[:1]), all_of(KEYS[:1]), {}], [{0}, set(), set()]) == [
        Handing(KEYS[0], 0, {1: Runs(1, 0, 100)})
    ]


def test_two_who_want_different_parts_of_the_same_rows_read_them_once() -> None:
    left, right = Runs(10, 0, 4), Runs(10, 4, 6)
    assert handings([{KEYS[0]: left}, {KEYS[0]: right}], NOBODY[:2]) == [Handing(KEYS[0], 0, {1: right})]
    assert handings([{KEYS[0]: left}, {}], NOBODY[:2]) == []


wishes = st.lists(st.sets(st.sampled_from(KEYS)), min_size=1, max_size=6)


@given(wishes, st.data(), st.integers(1, 2000))
def test_everybody_gets_what_it_wants_once_and_nobody_too_much_at_once(
    wanted: list[set[Key]], data: st.DataObject, window: int
) -> None:
    near = data.draw(st.lists(st.sets(st.integers(0, 2)), min_size=len(wanted), max_size=len(wanted)))
    found = handings([all_of(keys) for keys in wanted], near)
    assert len({one.key for one in found}) == len(found)
    for one in found:
        assert one.owner not in one.receivers
        assert all(one.key in wanted[member] and one.key.rank not in near[member] for member in one.receivers)
        asked = [member for member, keys in enumerate(wanted) if one.key in keys]
        assert one.key.rank in near[one.owner] or (one.owner in asked and len(asked) >= MANY)
    packed = list(rounds(found, len(wanted), window))
    assert sorted((one for now in packed for one in now), key=lambda one: one.key) == found
    quota = window // (2 * len(wanted))
    for now in packed:
        for owner in {one.owner for one in now}:
            mine = [one.key.length for one in now if one.owner == owner]
            assert sum(mine) <= quota or len(mine) == 1


@pytest.mark.parametrize("members", [1, 8, 100])
def test_a_span_for_each_member_fits_into_half_of_the_window(members: int) -> None:
    span = span_of(members)
    assert span == LEAST_SPAN or 2 * members * span <= WINDOW_BYTES
