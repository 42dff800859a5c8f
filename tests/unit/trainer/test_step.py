"""What the ranks of a step make of what each of them wishes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist

from stormjib_trainer.step import agree

WISHES = ("stop", "save", "hold", "busy")


@pytest.mark.parametrize("wish", WISHES)
@pytest.mark.parametrize("whose", ["own", "another", "nobody"])
def test_what_one_rank_wishes_all_do(monkeypatch: pytest.MonkeyPatch, wish: str, whose: str) -> None:
    """Above all: where one rank has no room to stage a step, none stages it, or no step would be whole in the memory of all."""
    another = torch.zeros(2 + len(WISHES), dtype=torch.float64)
    another[2 + WISHES.index(wish)] = whose == "another"
    monkeypatch.setattr(dist, "all_reduce", lambda whole: whole.add_(another))
    own: dict[str, Any] = {name: name == wish and whose == "own" for name in WISHES}
    agreed = agree(torch.tensor([3.0, 4.0], dtype=torch.float64), lambda summed: (*summed.tolist(),), **own)
    assert {name: getattr(agreed, name) for name in WISHES} == {
        name: name == wish and whose != "nobody" for name in WISHES
    }
    assert (agreed.loss, agreed.grad_norm) == (3.0, 4.0)
