"""Digests of raw bits: one flipped bit anywhere changes the digest of its slice, and of no other."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from stormjib_health.integrity.slices import SLICES
from stormjib_health.probe.numbers import DIGEST_HALVES, Digests, halves

DTYPES = [torch.float32, torch.bfloat16, torch.float64, torch.int8]


def digests(tensors: list[torch.Tensor]) -> list[tuple[int, ...]]:
    """Of all slices."""
    digest = Digests(tensors)
    return [tuple(digest.of(index).tolist()) for index in range(SLICES)]


def state(seed: int, sizes: list[int]) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [
        torch.randn(size, generator=generator).mul(50).to(DTYPES[i % len(DTYPES)])
        for i, size in enumerate(sizes)
    ]


def flip(tensor: torch.Tensor, bit: int) -> None:
    """Flip one bit of a tensor's memory."""
    tensor.view(-1).view(torch.uint8)[bit // 8] ^= 1 << bit % 8


@settings(max_examples=30)
@given(data=st.data(), sizes=st.lists(st.integers(0, 5000), min_size=1, max_size=6))
def test_any_flipped_bit_is_seen_in_one_slice(data: st.DataObject, sizes: list[int]) -> None:
    tensors = state(len(sizes), [*sizes, 3])
    before = digests(tensors)
    assert digests(tensors) == before
    tensor = data.draw(st.sampled_from([t for t in tensors if t.numel()]))
    flip(tensor, data.draw(st.integers(0, tensor.numel() * tensor.element_size() * 8 - 1)))
    after = digests(tensors)
    differing = [index for index in range(SLICES) if after[index] != before[index]]
    assert len(differing) == 1
    (index,) = differing
    assert after[index][0] != before[index][0]
    assert after[index][1] != before[index][1]
    whole = Digests(tensors).whole().tolist()
    flip(tensor, 0)
    assert Digests(tensors).whole().tolist() != whole


def test_words_that_change_places_are_seen() -> None:
    one = torch.arange(64, dtype=torch.int64).repeat(64)
    other = one.clone()
    other[0], other[1] = one[1].item(), one[0].item()
    assert digests([one]) != digests([other])


def test_the_memory_is_read_where_it_is_and_not_copied_once() -> None:
    weight = torch.zeros(3000)
    digest = Digests([weight])
    first = digest.of(0).tolist()
    weight[0] = 1.0
    assert digest.of(0).tolist() != first


def test_a_shard_that_begins_anywhere_in_its_storage_is_read() -> None:
    whole = torch.randn(9001)
    assert digests([whole[1:8002]]) == digests([whole[1:8002].clone()])


def test_nothing_has_a_digest_too() -> None:
    assert digests([torch.zeros(0)]) == [(0, 0)] * SLICES


@given(numbers=st.lists(st.integers(-(2**63), 2**63 - 1), min_size=2, max_size=2))
def test_a_digest_survives_a_sum_with_zeros_as_doubles(numbers: list[int]) -> None:
    parts = halves(torch.tensor(numbers, dtype=torch.int64))
    assert parts.shape == (DIGEST_HALVES,)
    low = parts[:2].to(torch.int64) + 0
    high = parts[2:].to(torch.int64)
    again = low | (high << 32)
    assert again.tolist() == numbers
    assert bool(((parts + 0.0) == parts).all())


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_same_bits_give_the_same_digest_in_any_type(dtype: torch.dtype) -> None:
    tensor = torch.randn(4096).to(dtype)
    assert digests([tensor]) == digests([tensor.view(torch.uint8)])
