"""The fixed product: the same bits each time, and a wrong result is found with nobody to compare with."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import torch

from stormjib_health.probe import compute

if TYPE_CHECKING:
    from collections.abc import Iterator


@pytest.fixture(autouse=True)
def threads() -> Iterator[None]:
    """A measurement sets the number of threads of its process: here that is the tests' own."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def test_two_measurements_give_the_same_digest_and_nothing_wrong() -> None:
    one, two = compute.measure("cpu"), compute.measure("cpu")
    assert one.ok
    assert one.text == two.text == ""
    assert one.digest == two.digest
    assert len(one.digest) == 64
    assert one.versions == two.versions
    assert f"torch {torch.__version__}" in one.versions
    assert min(one.cpu_s, one.seconds) > 0


def test_operands_are_made_by_whole_numbers_and_have_every_bit() -> None:
    made = compute.operand(1, 64)
    assert made.dtype == torch.float32
    assert -0.5 <= made.min().item() < -0.4
    assert 0.4 < made.max().item() < 0.5
    bits = ((made + 0.5) * 2**24).to(torch.int64)
    ones = [((bits >> bit) & 1).float().mean().item() for bit in range(24)]
    assert all(0.4 < share < 0.6 for share in ones)
    assert not torch.equal(made, compute.operand(2, 64))


def test_whole_operands_are_as_large_as_a_double_allows() -> None:
    made = compute.whole_operand(3, compute.EXACT_SIZE)
    largest = made.abs().max().item()
    assert largest > 2**19
    assert compute.EXACT_SIZE * largest**2 <= 2**53


def test_a_right_product_of_whole_numbers_is_right() -> None:
    left, right = compute.whole_operand(3, 64), compute.whole_operand(4, 64)
    found = (left.to(torch.float64) @ right.to(torch.float64)).to(torch.int64)
    assert torch.equal(found, left @ right)
    assert compute.compare(left, right, found) == ""


@pytest.mark.parametrize("bit", [0, 1, 13, 30, 44])
def test_one_flipped_bit_is_found_and_placed(bit: int) -> None:
    left, right = compute.whole_operand(3, 64), compute.whole_operand(4, 64)
    found = left @ right
    found[17, 3] ^= 1 << bit
    assert compute.compare(left, right, found) == "a product of whole numbers is wrong in rows 17, columns 3"


def test_many_wrong_rows_are_said_shortly() -> None:
    left, right = compute.whole_operand(3, 64), compute.whole_operand(4, 64)
    said = compute.compare(left, right, left @ right + 1)
    assert said.startswith("a product of whole numbers is wrong in rows 0, 1, 2, 3 and 60 more, columns 0")
    assert len(said) < 200


def test_a_product_that_differs_from_run_to_run_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """A core that errs now and then: one bit of one of the results is flipped, as its digest sees it."""
    runs = iter(range(1000))
    honest = compute.digest

    def flipped(result: torch.Tensor) -> str:
        if next(runs) == 1:
            result = result.clone()
            result.view(torch.int32)[5, 5] ^= 1
        return honest(result)

    monkeypatch.setattr(compute, "digest", flipped)
    assert compute.measure("cpu").text.startswith("one product gave 2 results in ")


def test_a_digest_is_of_the_bits_in_row_order() -> None:
    made = torch.arange(12, dtype=torch.float32).reshape(3, 4)
    assert compute.digest(made) == compute.digest(made.t().contiguous().t())
    assert compute.digest(made) != compute.digest(made.t())
    assert compute.digest(torch.zeros(3)) != compute.digest(-torch.zeros(3))
