"""First weights do not depend on who holds what: drawn on each rank, cut in any way, they are the same."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from fakes import gloo, init_ranks

if TYPE_CHECKING:
    from pathlib import Path


@pytest.fixture(scope="module")
def alone() -> dict[str, list[float]]:
    """As one process draws them."""
    return {name: p.detach().flatten().tolist() for name, p in init_ranks.drawn().named_parameters()}


@pytest.mark.parametrize("world", [1, 2, 3, 4])
def test_sharded_by_rows(world: int, alone: dict[str, list[float]], tmp_path: Path) -> None:
    gloo.run(world, tmp_path, init_ranks.fsdp, alone)


@pytest.mark.parametrize("world", [2, 3])
def test_cut_by_columns(world: int, alone: dict[str, list[float]], tmp_path: Path) -> None:
    gloo.run(world, tmp_path, init_ranks.columns, alone)
