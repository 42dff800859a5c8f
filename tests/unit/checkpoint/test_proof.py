"""FORMAT.md §12: what a group has read adds up to what was written, or it is said of which atom it does not."""

from __future__ import annotations

from math import prod
from typing import TYPE_CHECKING

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fakes.groups import Member, together
from fakes.indices import index_of
from stormjib_checkpoint.format import AtomRow, StoredBox
from stormjib_checkpoint.proof import MODULUS, MOST, Alone, Share, unproved

if TYPE_CHECKING:
    from collections.abc import Mapping

    from stormjib_checkpoint.index import IndexAtom


def atoms_of(shape: tuple[int, ...], digest: str | None) -> Mapping[str, IndexAtom]:
    """One atom, on one rank."""
    stored = StoredBox(0, (0,) * len(shape), shape, 0, 4 * prod(shape))
    row = AtomRow("F32", shape, (stored,) if prod(shape) else (), digest=digest)
    empty = {} if prod(shape) else {"other": AtomRow("F32", (1,), (StoredBox(0, (0,), (1,), 0, 4),))}
    return index_of({"w": row, **empty}).atoms


DIGESTS = (3, 5 << 61, 7, MODULUS - 9)
"""Of four rows of an atom."""
WHOLE = atoms_of((4, 2), f"{sum(DIGESTS) % MODULUS:016x}")


def row(number: int, copies: int = 1, off: int = 0) -> Share:
    return Share("w", copies, 2, (DIGESTS[number] + off) % MODULUS)


def told(size: int, shares: dict[int, list[Share]]) -> list[list[str]]:
    return together(size, lambda member: unproved(shares.get(member.member, ()), WHOLE, member))


@pytest.mark.parametrize("size", [1, 2, 3, 5])
def test_parts_of_all_members_add_up(size: int) -> None:
    shares = {
        member: [row(number) for number in range(4) if number % size == member] for member in range(size)
    }
    assert told(size, shares) == [[]] * size


def test_replicas_count_for_their_share_and_one_wrong_replica_is_enough() -> None:
    every = {member: [row(number, 3) for number in range(4)] for member in range(3)}
    assert told(3, every) == [[]] * 3
    every[1] = [*every[1][:3], row(3, 3, 1)]
    assert told(3, every) == [["w"]] * 3, "all members learn it"


def test_parts_may_have_different_numbers_of_copies() -> None:
    """Two key heads over five ranks: one is on three of them, one on two."""
    shares = {member: [row(0, 3), row(1, 3)] if member < 3 else [row(2, 2), row(3, 2)] for member in range(5)}
    assert told(5, shares) == [[]] * 5
    shares[4] = [row(2, 2), row(3, 2, 1 << 40)]
    assert told(5, shares) == [["w"]] * 5


def test_two_memories_of_tied_names_are_proved_both() -> None:
    both = [row(number) for number in range(4)] * 2
    assert unproved(both, WHOLE, Alone()) == []
    assert unproved([*both[:7], row(3, off=2)], WHOLE, Alone()) == ["w"]


@pytest.mark.parametrize("shares", [[], [row(0), row(1), row(2)], [row(0), row(1), row(2), row(3), row(0)]])
def test_what_is_not_whole_is_not_proved(shares: list[Share]) -> None:
    assert unproved(shares, WHOLE, Alone()) == ["w"]


def test_the_sum_of_two_halves_that_are_half_too_much_is_no_proof() -> None:
    """Elements are counted, not only added up: nothing read of one row, and another row read twice with half its digest."""
    assert unproved([row(0), row(1), row(2), Share("w", 1, 0, DIGESTS[3])], WHOLE, Alone()) == ["w"]


def test_parts_may_have_many_copies_and_others_nearly_as_many() -> None:
    """Key heads on three and on two ranks of five, and of all that 32 replicas."""
    shares = {
        member: [row(0, 96), row(1, 96)] if member < 96 else [row(2, 64), row(3, 64)] for member in range(160)
    }
    assert told(160, shares) == [[]] * 160
    shares[100] = [row(2, 64), row(3, 64, 1)]
    assert told(160, shares) == [["w"]] * 160


def test_more_different_copies_than_can_be_weighed_are_not_proved() -> None:
    shares = {0: [row(0, MOST), row(1, MOST)], 1: [row(2, 3), row(3, 3)]}
    assert told(2, shares) == [["w"]] * 2


def test_without_a_digest_and_without_elements_there_is_nothing_to_prove() -> None:
    assert unproved([], atoms_of((3,), None), Alone()) == []
    assert unproved([], atoms_of((0, 4), "0" * 16), Alone()) == []


@given(st.lists(st.integers(1, 6), min_size=1, max_size=4), st.integers(1, MODULUS - 1), st.data())
def test_a_wrong_digest_anywhere_is_found(copies: list[int], off: int, data: st.DataObject) -> None:
    """Whatever the copies of each row, an error of one of them is found, unless the weights of even copies shift it out of the 64 bits."""
    shares = [
        (number, count)
        for number, count in zip(range(4), [*copies, 1, 1, 1, 1], strict=False)
        for _ in range(count)
    ]
    wrong = data.draw(st.integers(0, len(shares) - 1))

    def of(member: Member) -> list[Share]:
        number, count = shares[member.member]
        return [row(number, count, off % (1 << 56) + 1 if member.member == wrong else 0)]

    assert together(len(shares), lambda member: unproved(of(member), WHOLE, member)) == [["w"]] * len(shares)
