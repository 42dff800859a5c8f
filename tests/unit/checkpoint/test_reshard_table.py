"""Every row of the resharding table: saved as one layout says and loaded as another says, proved, and read as seldom as can be."""

from __future__ import annotations

import pytest

from fakes.reshard_specs import ROWS, Row
from fakes.reshard_table import run

pytestmark = pytest.mark.timeout(120)
ONCE = {"1", "20", "21", "22", "24", "28", "29", "30", "42"}
"""Rows whose tensors are on one rank, or on three or more: each byte is read once."""


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.number)
def test_row(row: Row) -> None:
    shown = run(row)
    assert shown.read <= 1.05 * shown.wanted
    if row.number in ONCE:
        assert shown.read <= 1.05 * shown.unique


def test_the_table_has_42_rows() -> None:
    assert {row.number.partition("-")[0] for row in ROWS} == {str(number) for number in range(1, 43)}
