"""What the digest finds: every fault that was injected, also those in pairs, which make a weaker sum cancel."""

from __future__ import annotations

import ctypes
from itertools import product
from random import Random
from typing import TYPE_CHECKING

import pytest

from stormjib_checkpoint import digest
from stormjib_checkpoint.boxes import whole
from stormjib_checkpoint.digest.definition import BLOCK, mix

if TYPE_CHECKING:
    from collections.abc import Callable

ROWS, COLUMNS = 60, 100
"""More than one block of weights, for elements of any size."""
COUNT = ROWS * COLUMNS
DTYPES = {1: "F8_E4M3", 2: "BF16", 4: "F32", 8: "F64", 16: "C128"}
EACH = 1000
RANKS = 4


class Atom:
    """An atom in memory that can be spoiled."""

    def __init__(self, size: int, random: Random) -> None:
        self.size, self.random = size, random
        self.data = bytearray(random.randbytes(COUNT * size))

    def __getitem__(self, element: int) -> int:
        return int.from_bytes(self.data[element * self.size : (element + 1) * self.size], "little")

    def __setitem__(self, element: int, value: int) -> None:
        value %= 1 << 8 * self.size
        self.data[element * self.size : (element + 1) * self.size] = value.to_bytes(self.size, "little")

    def pair(self) -> tuple[int, int]:
        one, other = self.random.sample(range(COUNT), 2)
        return one, other

    def swap(self, one: int, other: int, elements: int) -> None:
        """Two stretches of as many elements."""
        a, b = (slice(at * self.size, (at + elements) * self.size) for at in (one, other))
        self.data[a], self.data[b] = self.data[b], self.data[a]


def bit(atom: Atom) -> None:
    atom[atom.random.randrange(COUNT)] ^= 1 << atom.random.randrange(8 * atom.size)


def two_signs(atom: Atom) -> None:
    for element in atom.pair():
        atom[element] ^= 1 << 8 * atom.size - 1


def same_bit_of_two(atom: Atom) -> None:
    number = atom.random.randrange(8 * atom.size)
    for element in atom.pair():
        atom[element] ^= 1 << number


def two_swapped(atom: Atom) -> None:
    atom.swap(*atom.pair(), 1)


def neighbours_swapped(atom: Atom) -> None:
    element = atom.random.randrange(COUNT - 1)
    atom.swap(element, element + 1, 1)


def constant_added_to_two(atom: Atom) -> None:
    constant = atom.random.randrange(1, 1 << 8 * atom.size)
    for element in atom.pair():
        atom[element] += constant


def constant_moved(atom: Atom) -> None:
    constant = atom.random.randrange(1, 1 << 8 * atom.size)
    for element, sign in zip(atom.pair(), (1, -1), strict=True):
        atom[element] += sign * constant


def rows_swapped(atom: Atom) -> None:
    one, other = atom.random.sample(range(ROWS), 2)
    atom.swap(one * COLUMNS, other * COLUMNS, COLUMNS)


def shifted_by_one(atom: Atom) -> None:
    row = atom.random.randrange(ROWS) * COLUMNS * atom.size
    end = row + COLUMNS * atom.size
    atom.data[row:end] = atom.data[row + atom.size : end] + atom.data[row : row + atom.size]


def slice_of_another_rank(atom: Atom) -> None:
    share = len(atom.data) // RANKS
    mine, theirs = atom.random.sample(range(RANKS), 2)
    atom.data[mine * share : (mine + 1) * share] = atom.data[theirs * share : (theirs + 1) * share]


def last_bits_of_a_stale_attempt(atom: Atom) -> None:
    for element in atom.random.sample(range(COUNT), 50):
        atom[element] ^= 1


FAULTS: list[Callable[[Atom], None]] = [
    bit,
    two_signs,
    same_bit_of_two,
    two_swapped,
    neighbours_swapped,
    constant_added_to_two,
    constant_moved,
    rows_swapped,
    shifted_by_one,
    slice_of_another_rank,
    last_bits_of_a_stale_attempt,
]


def seen(size: int, fault: Callable[[Atom], None]) -> tuple[int, int]:
    """Faults that were injected, and those that the digest has found."""
    atom, box = Atom(size, Random(f"{size} {fault.__name__}")), digest.geometry((COUNT,), whole((COUNT,)))
    memory = (ctypes.c_char * len(atom.data)).from_buffer(atom.data)

    def now() -> int:
        return digest.partial(ctypes.addressof(memory), DTYPES[size], box, 0, COUNT)

    good, value = bytes(atom.data), now()
    injected = found = 0
    while injected < EACH:
        fault(atom)
        if atom.data != good:  # swapping two that are equal is no fault
            injected += 1
            found += now() != value
            atom.data[:] = good
    return injected, found


@pytest.mark.parametrize("size", DTYPES)
def test_every_injected_fault_is_found(size: int) -> None:
    """§12.6"""
    assert {fault.__name__: seen(size, fault) for fault in FAULTS} == {
        fault.__name__: (EACH, EACH) for fault in FAULTS
    }


def test_more_than_ten_thousand_are_injected() -> None:
    assert len(FAULTS) * len(DTYPES) * EACH > 50_000


def test_weights_of_a_block_are_far_from_each_other_and_from_each_others_negatives() -> None:
    """§12.6: 33 equal low bits would let two flipped signs through, and two swapped words that differ by 2^31 only."""
    weights = [mix(within) | 1 for within in range(BLOCK)]
    assert [zeros(weights, sign) for sign in (1, -1)] == [19, 18]


def zeros(weights: list[int], sign: int) -> int:
    """The most low bits that the difference of two weights (or with -1, their sum) has as zeros."""
    for bits in range(64, -1, -1):
        low = 1 << bits
        if sign == 1:
            met = len({weight % low for weight in weights}) < len(weights)
        else:
            mine = {weight % low: number for number, weight in enumerate(weights)}
            met = any(mine.get(-weight % low, number) != number for number, weight in enumerate(weights))
        if met:
            return bits
    return 0


def test_words_of_64_bits_would_let_two_flipped_signs_through() -> None:
    """Why wide elements are several words: with one word each, whatever their weights, these two cancel."""
    for one, other in product([mix(1) | 1, mix(2) | 1], [mix(3) | 1, mix(4) | 1]):
        assert ((1 << 63) * one + (1 << 63) * other) % 2**64 == 0
